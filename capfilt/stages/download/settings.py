"""The options of `download` that its child process needs to know, as the child of one of several workers has them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import capfilt
from capfilt.options import option
from capfilt.stages.download import DownloadOptions, NetworkOptions, PictureOptions

RETRY_AFTER_MOST = 30.0
"""Seconds that a host's Retry-After is waited for, all in all until it answers; one that asks for more is left alone."""


@dataclass(frozen=True)
class Settings(NetworkOptions, PictureOptions):
    """What the engine needs to know of the options; JSON-able. Sizes in pixels, times in seconds."""

    user_agent: str = option("capfilt", "what every request says it is")

    @staticmethod
    def of(values: dict[str, Any]) -> Settings:
        """The settings in a JSON object."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return Settings(**values | lists)

    @property
    def longest_silence(self) -> float:
        """Seconds that may pass without a word from a child that is well: between the ends of two fetches."""
        # robots.txt has a deadline of its own before that of what it is asked for.
        fetch = (2 if self.robots else 1) * self.total_timeout + self.timeout
        pause = 1 / self.host_rate if self.host_rate else 0.0
        return 60.0 + RETRY_AFTER_MOST + fetch + pause


def settings_of(options: DownloadOptions, workers: int = 1) -> Settings:
    """What the child of one of so many workers is told of the options.

    What a host is to bear is shared out: workers know nothing of one another, and all of them may meet the same host.
    """
    token, program = options.user_agent_token.strip(), f"capfilt/{capfilt.__version__}"
    values: dict[str, Any] = {each.name: getattr(options, each.name, "") for each in fields(Settings)}
    values["user_agent"] = program if token.lower() in ("", "capfilt") else f"{token} {program}"
    # As img2dataset's Downloader prepares them for its comparison with the header.
    values["user_agent_token"] = token.lower()
    values["disallowed_header_directives"] = tuple(
        directive.strip().lower() for directive in options.disallowed_header_directives
    )
    values["host_concurrency"] //= workers
    values["host_rate"] /= workers
    return Settings(**values)
