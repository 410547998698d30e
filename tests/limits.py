"""Runs code on hostile inputs in a process of its own: 10 seconds of a processor and 1 GiB must do for a refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MOST_SECONDS, MOST_BYTES = 10, 2**30

_REFUSALS = """
import re, sys, time
from pathlib import Path
from capfilt.errors import UserError

{code}

for case in sys.argv[1:]:
    before = time.process_time()
    try:
        read(case)
        told = "READ"
    except UserError as error:
        told = str(error)
    print(f"{{time.process_time() - before:.2f}}", repr(told))
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def refused(code: str, cases: list[str]) -> list[str]:
    """What UserError says of each case, given to the function `read` that `code` defines: one line, in time and in bounds."""
    made = subprocess.run(
        [sys.executable, "-c", _REFUSALS.format(code=code), *cases],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    *lines, most = made.stdout.splitlines()
    assert len(lines) == len(cases), made.stdout
    for case, line in zip(cases, lines, strict=True):
        assert float(line.split()[0]) < MOST_SECONDS, (case, line)
        assert line.split()[1] != "'READ'", case
        assert "\\n" not in line, line
    assert int(most) * 1024 < MOST_BYTES, f"{int(most) / 2**20:.2f} GiB"
    return [line.partition(" ")[2] for line in lines]
