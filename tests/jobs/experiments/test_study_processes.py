"""Runs of a study in processes: their commands, and the command that their reports name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from afmrl_ray.config import load_config, validate
from afmrl_ray.runs import RunDirectory
from jobs.experiments import stages, study_processes, study_run

COMMAND = "python -m jobs.experiments.ladder --seeds 0 'run.name=my mugs'"


def run_studies(monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str], codes: dict[str, int]) -> list[Any]:
    """Run studies of some names whose processes end with some codes; returns the commands of the processes."""
    started = []

    def start(command: list[str], **_: Any) -> Any:
        started.append(command)
        name = Path(command[command.index("--config") + 1]).stem
        return SimpleNamespace(poll=lambda: codes[name], returncode=codes[name])

    monkeypatch.setattr(study_processes, "subprocess", SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT))
    monkeypatch.setattr(study_processes, "own_command", lambda: COMMAND)
    shared = stages.SharedStart({"ray.address": "10.0.0.1:6379"}, "checkpoint", "catalogue", None)  # type: ignore[arg-type]
    configs = [validate({"run": {"name": name}}) for name in names]
    study_processes.run_in_processes(configs, ["agcl"], shared, train_fraction=0.5, processes=1, logs=folder)
    return started


def test_every_run_has_a_process_with_its_config_and_a_namespace_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = run_studies(monkeypatch, tmp_path, ["a", "b"], {"a": 0, "b": 0})
    assert first[:3] == [sys.executable, "-m", "jobs.experiments.study_run"]
    for command, name in ((first, "a"), (second, "b")):
        config = load_config(command[command.index("--config") + 1])
        assert (config.run.name, config.ray.namespace, config.ray.address) == (name, name, "10.0.0.1:6379")
        assert command[command.index("--dual-encoder") + 1] == "checkpoint"


def test_a_failed_run_is_named_after_the_others_are_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^failed: a \(see .*a\.log\)$"):
        run_studies(monkeypatch, tmp_path, ["a", "b"], {"a": 1, "b": 0})
    assert (tmp_path / "b.log").exists()


def test_the_report_of_a_run_names_the_command_of_the_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (child,) = run_studies(monkeypatch, tmp_path, ["a"], {"a": 0})
    run = RunDirectory(str(tmp_path), "a")
    run.create()
    run.write_run({"name": "a"})

    @contextmanager
    def opened(config: Any) -> Iterator[Any]:
        yield SimpleNamespace(run=run, config=config, stage=str, catalogue=None)

    evaluated = SimpleNamespace(metrics={"protocols": {"fine": {"metrics": {"hit@1": {"mean": 0.5}}}}})
    made: list[Any] = []
    monkeypatch.setattr(stages, "open_run", opened)
    monkeypatch.setattr(
        stages,
        "AblationStudy",
        lambda pipeline, **how: made.append(how) or SimpleNamespace(run=lambda key: evaluated),
    )
    reported: list[Any] = []
    monkeypatch.setattr(stages, "write_report", lambda run, **_: reported.append(run.read_run()))
    assert study_run.main(child[3:]) == 0
    assert made == [{"dual_encoder": "checkpoint", "train_fraction": 0.5}]
    assert reported[0]["command"] == COMMAND
