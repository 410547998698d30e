"""Runs a stage over shards: with Ray, or inline in this process."""
