"""How tests run the programs of `jobs/bench`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bench(folder: Path, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs/bench" / program), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


def commits(folder: Path) -> dict[str, str]:
    records = sorted(folder.glob("t*/stages/*/stage.json"))
    return {str(path): json.loads(path.read_text())["committed_at"] for path in records}
