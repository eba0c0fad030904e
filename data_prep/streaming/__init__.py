"""What the stream is made of: reading, decoding, worker processes, quarantine."""
