"""The training loop, optimisers and schedules. Plain torch."""
