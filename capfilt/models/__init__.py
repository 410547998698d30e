"""One file per model, built from a few shared layers; objectives; presets; checkpoints."""
