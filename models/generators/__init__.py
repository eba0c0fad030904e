"""Flow-matching transformers that generate audio latents from video and text."""
