"""Image and token shards: writing, indexing, deterministic reading, demo data."""
