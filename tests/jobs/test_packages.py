"""`jobs` is a package of scripts and two packages of modules, all run from the repository's root without PYTHONPATH."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
from importlib import import_module, util
from pathlib import Path

import pytest

from jobs import benchmarks, experiments

ROOT = Path(__file__).resolve().parents[2]
NEEDS = {"jobs.benchmarks.record_trl_golden": "trl"}
MODULES = sorted(
    each.name
    for package in (benchmarks, experiments)
    for each in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
)


def run(*arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run Python from the repository's root, without some environment variables."""
    environment = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_imported_without_a_change_of_the_path(module: str) -> None:
    if module in NEEDS and util.find_spec(NEEDS[module]) is None:
        pytest.skip(f"{NEEDS[module]} is not installed")
    before = list(sys.path)
    import_module(module)
    assert sys.path == before


@pytest.mark.parametrize("module", ["jobs.benchmarks.agcl", "jobs.experiments.ladder"])
def test_modules_are_run_by_name(module: str) -> None:
    done = run("-m", module, "--help", without=("PYTHONPATH",))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage:" in done.stdout


def test_jobs_are_run_by_path() -> None:
    done = run("jobs/run_cit.py", "--print-config", "rar.group_size=16")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "group_size: 16" in done.stdout
