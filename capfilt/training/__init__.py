"""The training loop, optimisers, schedules, states, and several processes that train together. Plain torch."""
