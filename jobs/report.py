"""Write the report of a run again, or compare two runs: report.py --compare runs/demo runs/other."""

from __future__ import annotations

import sys

from afmrl_ray.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
