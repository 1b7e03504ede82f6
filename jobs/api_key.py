"""Make an API key: its digest is appended to a file of keys, and the key is printed once and stored nowhere."""

from __future__ import annotations

import sys

from afmrl_ray.commands.keys import main

if __name__ == "__main__":
    sys.exit(main())
