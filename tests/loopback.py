"""Run a command where only the loopback exists: `python tests/loopback.py COMMAND ...`.

Tests start clusters and ranks in a network namespace of their own: nobody reaches them, and their ports are free. Needs
Linux and root, or user namespaces; exits with 77 where neither is to be had.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
UNAVAILABLE = 77


def isolate() -> None:
    """Leave the network for a namespace with nothing but a loopback that is up. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = CLONE_NEWNET if os.geteuid() == 0 else CLONE_NEWUSER | CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    if flags & CLONE_NEWUSER:
        for path, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with Path(f"/proc/self/{path}").open("w") as file:
                file.write(line)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("16sh14x", b"lo", 0)
        now = struct.unpack("16sh14x", fcntl.ioctl(probe, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(probe, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", now | IFF_UP))


if __name__ == "__main__":
    try:
        isolate()
    except OSError as error:
        print(f"no network namespace to be had: {error}", file=sys.stderr)
        sys.exit(UNAVAILABLE)
    os.execvp(sys.argv[1], sys.argv[1:])
