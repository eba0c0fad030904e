"""Losses, samplers and scores: pure functions of tensors."""
