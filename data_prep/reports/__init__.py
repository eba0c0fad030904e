"""What a folder of shards holds, in figures and as a picture."""
