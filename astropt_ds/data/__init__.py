"""Survey images to shards, and shards to batches."""
