"""What writes captions and what scores texts: BLIP checkpoints, a CLIP, and whatever else an entry point brings."""
