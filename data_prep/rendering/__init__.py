"""Sounding events drawn and synthesised from a seed, with known truth: what `readers.rendered` encodes."""
