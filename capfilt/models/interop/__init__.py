"""Checkpoints in other projects' layouts, in and out: transformers' BLIP directories and the original repository's `.pth`.

What capfilt writes itself is `capfilt.models.checkpoint`'s, which also decides which layout a path is in. Nothing here
needs transformers: both layouts are tensors, a JSON file and a vocabulary.
"""
