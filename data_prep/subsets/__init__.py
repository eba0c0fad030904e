"""Choosing from finished shards."""
