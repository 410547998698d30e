"""Downstream evaluations, written against what a model can do."""
