"""The name of the user who runs a job; imports nothing heavy, since every command asks for it first."""

from __future__ import annotations

import getpass
import os


def user_name() -> str:
    """The user's name, or `uid<number>` where the system knows none, as in containers with a uid of their own."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return f"uid{os.getuid()}"
