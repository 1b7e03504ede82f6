"""Make an API key: its digest is appended to a file of keys, and the key is printed once and stored nowhere."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from afmrl_ray.errors import UserError
from afmrl_ray.serving.security import ROLES, new_key


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="of the key's holder")
    parser.add_argument(
        "--role", choices=ROLES, default="user", help="admin may also change items and switch the round"
    )
    parser.add_argument("--file", required=True, help="file of keys, created if it is missing")
    options = parser.parse_args(argv)
    try:
        key, line = new_key(options.name, options.role)
        descriptor = os.open(options.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a") as file:
            file.write(line + "\n")
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(key)
    return 0
