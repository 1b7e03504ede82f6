"""What `run.json` says of how a run was made, and what becomes of it when jobs follow each other."""

from __future__ import annotations

import shlex
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from afmrl_ray.cit import driver
from afmrl_ray.config import validate
from afmrl_ray.errors import ConfigError
from afmrl_ray.runs import RunDirectory
from tests.cit.fake_stages import FakePipeline

GIVEN = SimpleNamespace(fingerprint="f" * 64)
"""A catalogue of `catalogue.path`, which `open_run` has checked before it opens the run."""


class Stubbed(FakePipeline):
    """Stages that do nothing, and no catalogue to look at."""

    catalogue = None


@contextmanager
def opened(config, run, given=GIVEN):
    """A run as `open_run` opens it once Ray is there."""
    yield from driver._opened(config, run, given)


@pytest.fixture
def run(tmp_path, monkeypatch) -> RunDirectory:
    monkeypatch.setattr(driver, "Pipeline", Stubbed)
    found = RunDirectory(str(tmp_path), "t")
    found.create()
    return found


def job(monkeypatch, run, *argv, whole=False, config=None):
    """Run a job of these words and return what `run.json` says after it."""
    monkeypatch.setattr(sys, "argv", list(argv))
    with opened(config or validate({}), run) as pipeline:
        if whole:
            driver.run_cit(pipeline)
    return run.read_run()


def test_the_record_says_what_the_run_was_made_of(run):
    config = validate({"run": {"name": "mugs"}, "rar": {"group_size": 16}})
    record = driver.run_record(config, Stubbed(config, run))
    assert validate(record["config"]) == config
    assert record["name"] == "mugs"
    assert record["catalogue"] == {"fingerprint": "f" * 64, "rows": 12, "kept": 10}
    assert {"afmrl_ray", "python", *driver.PACKAGES} == set(record["versions"])


def test_a_command_can_be_pasted_into_a_shell(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my shop.yaml").write_text("")
    words = ["evaluation.protocols=[{kind: retrieval, name: fine}]", "generator.instruction=What's it?; $HOME"]
    monkeypatch.setattr(sys, "argv", ["jobs/run_cit.py", "--config", str(tmp_path / "my shop.yaml"), *words])
    command = shlex.split(driver.own_command())
    assert command == ["python", "jobs/run_cit.py", "--config", "my shop.yaml", *words]


def test_jobs_that_make_a_part_leave_the_whole_runs_command(run, monkeypatch):
    assert job(monkeypatch, run, "jobs/distill.py")["command"] == "python jobs/distill.py"
    # For want of a whole run's, the last one.
    assert job(monkeypatch, run, "jobs/annotate.py", "--round=0")["command"] == "python jobs/annotate.py --round=0"
    whole = "python jobs/run_cit.py cit.rounds=1"
    assert job(monkeypatch, run, *shlex.split(whole)[1:], whole=True)["command"] == whole
    other = validate({"rar": {"group_size": 16}})
    for words in (["jobs/build_index.py"], ["jobs/build_index.py", "--round", "1"], ["jobs/evaluate.py"]):
        record = job(monkeypatch, run, *words, config=other)
    assert record["command"] == whole
    assert record["config"]["rar"]["group_size"] == 16
    assert record["jobs"] == {
        "distill.py": "python jobs/distill.py",
        "annotate.py": "python jobs/annotate.py --round=0",
        "build_index.py": "python jobs/build_index.py --round 1",
        "evaluate.py": "python jobs/evaluate.py",
    }
    again = job(monkeypatch, run, "jobs/run_cit.py", "cit.rounds=2", whole=True)
    assert again["command"] == "python jobs/run_cit.py cit.rounds=2"
    assert again["jobs"] == record["jobs"]


def test_the_command_of_a_run_from_before_is_kept(run, monkeypatch):
    run.write_run({"name": "t", "command": "python jobs/run_cit.py"})
    assert job(monkeypatch, run, "jobs/build_index.py")["command"] == "python jobs/run_cit.py"


def test_a_module_is_run_by_its_name(monkeypatch):
    module = SimpleNamespace(__spec__=SimpleNamespace(name="jobs.experiments.ladder", origin="/code/jobs/ladder.py"))
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(sys, "argv", ["/code/jobs/ladder.py", "--seeds", "0", "run.name=my mugs"])
    assert driver.own_command() == "python -m jobs.experiments.ladder --seeds 0 'run.name=my mugs'"
    monkeypatch.setattr(sys, "argv", ["jobs/run_cit.py"])
    assert driver.own_command() == "python jobs/run_cit.py"


def test_the_installed_command_is_recorded_by_its_subcommand(run, monkeypatch):
    record = job(monkeypatch, run, "/env/bin/afmrl", "train", "encoder", "--round", "0", "run.name=t")
    assert record["command"] == "afmrl train encoder --round 0 run.name=t"
    assert record["jobs"] == {"afmrl train encoder": "afmrl train encoder --round 0 run.name=t"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agcl": {"batch_size": 4096}}, r"agcl\.batch_size 4096 exceeds the \d+ products that have pairs"),
        ({"distill": {"batch_size": 4096}}, r"distill\.batch_size 4096 exceeds the \d+ rows of distill\.items"),
    ],
)
def test_batches_that_the_catalogue_cannot_fill_are_found_before_the_first_stage(tiny_catalogue_ref, change, message):
    catalogue = tiny_catalogue_ref.open()
    small = {"agcl": {"batch_size": 6}, "distill": {"batch_size": 8}}
    driver.check_selectors(validate(small), catalogue)
    with pytest.raises(ConfigError, match=message):
        driver.check_selectors(validate({**small, **change}), catalogue)
