"""Make an API key: its line goes to a file of keys, the key itself is printed once and kept nowhere."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from afmrl_ray.errors import UserError
from afmrl_ray.serving.security import ROLES, new_key


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="who gets the key")
    parser.add_argument("--role", choices=ROLES, default="user", help="admin may change items and go over to a round")
    parser.add_argument("--file", required=True, help="file of keys, created if it is not there")
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


if __name__ == "__main__":
    sys.exit(main())
