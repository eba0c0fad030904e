"""From media files to training batches: manifests, shards, streams and signal front ends."""
