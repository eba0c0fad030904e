"""What is measured: retrieval, synchrony, distributions, and the statistics that say whether a difference is real."""
