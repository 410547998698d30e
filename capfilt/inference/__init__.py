"""The captioner and filter engines."""
