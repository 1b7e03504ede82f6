"""How tests run the experiments: as a user does, from the repository's root."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def experiment(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m jobs.experiments.<name>`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    return subprocess.run(
        [sys.executable, "-m", f"jobs.experiments.{name}", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def commits(folder: Path) -> dict[str, str]:
    """Times of commit of all stages of the runs `t*`, by path of the stage's record."""
    records = sorted(folder.glob("t*/stages/*/stage.json"))
    return {str(path): json.loads(path.read_text())["committed_at"] for path in records}
