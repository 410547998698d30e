"""capfilt: web image-text pairs in, a bootstrapped corpus and retrained vision-language models out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capfilt.inference.captioner import Caption, Captioner
    from capfilt.inference.filter import Filter, Score

__version__ = "0.1.0"
__all__ = ["Caption", "Captioner", "Filter", "Score", "__version__"]

_LAZY = {
    "Caption": "capfilt.inference.captioner",
    "Captioner": "capfilt.inference.captioner",
    "Filter": "capfilt.inference.filter",
    "Score": "capfilt.inference.filter",
}


def __getattr__(name: str) -> Any:
    # `capfilt --help` imports this package, so torch may come in only when somebody asks for a model.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'capfilt' has no attribute {name!r}")
