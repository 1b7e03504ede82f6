"""The job that writes reports: its arguments, and runs with missing parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from afmrl_ray.commands.report import directory, main
from afmrl_ray.runs import RunDirectory
from tests.report.fake_run import FakeRun
from tests.report.test_compare import HITS, measured


@pytest.mark.parametrize("path", ["s3://b/runs/demo", "s3://b/runs/demo/", "s3://b/runs/demo//"])
def test_trailing_slashes_of_a_run_are_ignored(path: str) -> None:
    assert directory(path).path == "s3://b/runs/demo"


def test_folders_are_runs_with_and_without_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert directory("demo/").path == directory("demo").path == str(tmp_path / "demo")
    assert directory("/demo/").path == "/demo"


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_without_run_json_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(str(tmp_path), "fake")
    fake = FakeRun(str(tmp_path))
    fake.stage("catalogue", {"fingerprint": "f" * 64})
    Path(run.path, "run.json").unlink()
    assert main(["--run", run.path]) == 2
    assert last_line(capsys).startswith(f"error: {run.path}: no run.json")


def test_a_run_with_an_unknown_setting_is_reported_without_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeRun(str(tmp_path))
    fake.stage("catalogue", {"fingerprint": "f" * 64})
    fake.run.write_run({**fake.run.read_run(), "config": {"gone": {"by": "now"}}})
    assert main(["--run", fake.run.path]) == 0
    assert "no images in the report: unknown config key 'gone" in capsys.readouterr().err
    assert Path(fake.run.path, "report", "index.html").exists()


def test_run_and_compare_exclude_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left, right = measured(tmp_path, HITS), measured(tmp_path, HITS, name="right")
    assert main(["--run", left.path, "--compare", left.path, right.path]) == 2
    assert last_line(capsys).startswith("error: --run: ")
    assert not Path(right.path, "report").exists()
