"""Write the synthetic catalogue of section `synthetic` as one Parquet file, and optionally a contact sheet."""

from __future__ import annotations

import sys

from afmrl_ray.commands.make_catalogue import main

if __name__ == "__main__":
    sys.exit(main())
