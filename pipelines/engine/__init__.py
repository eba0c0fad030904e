"""The one training loop of all stages, and what it stands on."""
