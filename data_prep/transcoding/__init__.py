"""From any media file to the clip of a shard."""
