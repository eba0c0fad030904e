"""Whether shards are what they should be."""
