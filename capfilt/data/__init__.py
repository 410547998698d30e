"""Rows to tensors: bounded decoding, transforms, tokenizers, batches."""
