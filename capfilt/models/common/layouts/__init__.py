"""Checkpoints in other projects' layouts: one engine, and what families share. A family's tables are its `layouts.py`.

Nothing here needs those projects: a layout is tensors, a JSON file and a vocabulary. Not here: which layout a path is in
(`capfilt.models.layouts`), capfilt's own layout (`capfilt.models.checkpoint`).
"""
