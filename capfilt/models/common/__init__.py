"""Layers, towers and objectives that families share. Nothing here knows a family."""
