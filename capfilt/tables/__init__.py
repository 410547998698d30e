"""What a table is on disk: contracts, ids, shards, formats. Knows nothing of models."""
