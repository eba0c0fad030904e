"""Real services on loopback that slow tests and benchmarks talk to."""
