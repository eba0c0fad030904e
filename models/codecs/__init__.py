"""From log-mels to latents and back, and from log-mels to waveforms."""
