"""Readers: each lists the clips of one collection as manifest rows."""
