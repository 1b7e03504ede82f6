"""The script for GPU machines runs where nothing but torch, transformers and peft is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "jobs/bench/agcl_gpu.py"
ABSENT = ("ray", "deepspeed", "pyarrow", "pydantic", "omegaconf", "PIL", "scipy", "sklearn", "rank_bm25")
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
sys.path.insert(0, {str(SCRIPT.parent)!r})
sys.argv = ["agcl_gpu.py", *sys.argv[1:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
SMALL = ["--device", "cpu", "--dtype", "float32", "--tiny", "--pairs", "4", "6", "--plain-pairs", "4"]
SMALL += ["--part-tokens", "200", "--pixels", "56", "112", "--repeats", "1"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kept", [False, True])
def test_it_measures_both_steps_with_equal_gradients(tmp_path, kept):
    out = subprocess.run(
        [sys.executable, "-c", RUN, *SMALL, *(["--kept"] if kept else [])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    steps = json.loads((tmp_path / "runs/bench/agcl_gpu.json").read_text())["steps"]
    assert [(step["step"], step["pairs"]) for step in steps] == [("GradCache", 4), ("plain", 4), ("GradCache", 6)]
    assert all(step["gradient_gap"] < 1e-5 for step in steps[:2])
    assert all(step["items_per_second"] > 0 for step in steps)
