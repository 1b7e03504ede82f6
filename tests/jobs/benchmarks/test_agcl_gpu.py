"""The benchmark for GPU machines runs where only torch, transformers and peft are installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ABSENT = ("ray", "deepspeed", "pyarrow", "pydantic", "omegaconf", "PIL", "scipy", "sklearn", "rank_bm25")
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
runpy.run_module("jobs.benchmarks.agcl_gpu", run_name="__main__", alter_sys=True)
"""
SMALL = ["--device", "cpu", "--dtype", "float32", "--tiny", "--pairs", "4", "6", "--plain-pairs", "4"]
SMALL += ["--part-tokens", "200", "--pixels", "56", "112", "--repeats", "1"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("cached", [False, True])
def test_both_steps_are_measured_and_have_equal_gradients(tmp_path, cached):
    out = tmp_path / "out" / "agcl_gpu.json"
    done = subprocess.run(
        [sys.executable, "-c", RUN, *SMALL, "--out", str(out), *(["--cached-features"] if cached else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps = json.loads(out.read_text())["steps"]
    assert [(step["step"], step["pairs"]) for step in steps] == [("GradCache", 4), ("plain", 4), ("GradCache", 6)]
    assert all(step["gradient_gap"] < 1e-5 for step in steps[:2])
    assert all(step["items_per_second"] > 0 for step in steps)
