"""The stages, the training loop they share, and what follows training: generation, evaluation, reports."""
