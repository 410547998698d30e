"""What the child process of `download` needs to know of the options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

RETRY_AFTER_MOST = 30.0
"""Seconds that a host's Retry-After is waited for, all in all until it answers; one that asks for more is left alone."""


@dataclass(frozen=True)
class Settings:
    """What the engine needs to know of the options; JSON-able. Sizes in pixels, times in seconds."""

    image_size: int
    resize_mode: str
    resize_only_if_bigger: bool
    encode_format: str
    encode_quality: int
    min_image_size: int
    max_aspect_ratio: float
    thread_count: int
    timeout: float
    total_timeout: float
    retries: int
    host_concurrency: int
    host_rate: float
    robots: bool
    max_bytes: int
    max_pixels: int
    user_agent: str
    user_agent_token: str
    disallowed_header_directives: tuple[str, ...]
    allow_host: tuple[str, ...]
    allow_private: bool

    @staticmethod
    def of(values: dict[str, Any]) -> Settings:
        """The settings in a JSON object."""
        known = {each.name: values[each.name] for each in fields(Settings)}
        for name in ("disallowed_header_directives", "allow_host"):
            known[name] = tuple(known[name])
        return Settings(**known)

    @property
    def longest_silence(self) -> float:
        """Seconds that may pass without a word from a child that is well: between the ends of two fetches."""
        # robots.txt has a deadline of its own before that of what it is asked for.
        fetch = (2 if self.robots else 1) * self.total_timeout + self.timeout
        pause = 1 / self.host_rate if self.host_rate else 0.0
        return 60.0 + RETRY_AFTER_MOST + fetch + pause
