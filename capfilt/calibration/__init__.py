"""Probabilities and noise rates from scores, on numpy alone: hub correction, calibration, the share of true pairs."""
