"""The kinds of rows that a model can learn from. Light: model families say theirs before anything is loaded."""

from __future__ import annotations

PAIR_ROWS, IMAGE_ROWS, TEXT_ROWS, EXAMPLE_ROWS = "pairs", "images", "texts", "examples"
"""Pictures with their texts, pictures alone, texts alone, or a task's examples (questions with answers, texts or pictures with
classes)."""

ROWS = (PAIR_ROWS, IMAGE_ROWS, TEXT_ROWS, EXAMPLE_ROWS)
