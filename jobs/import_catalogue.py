"""Import CSV, JSONL or M5Product as a catalogue, check it, and quarantine its unusable rows."""

from __future__ import annotations

import sys

from afmrl_ray.commands.import_catalogue import main

if __name__ == "__main__":
    sys.exit(main())
