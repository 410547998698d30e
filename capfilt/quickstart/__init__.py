"""The generated world of `capfilt quickstart`: scenes, captions, a troubled web, and the truth for grading."""
