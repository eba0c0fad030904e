"""Encoders of video and audio: contrastive towers and the features they hand to generators."""
