"""The run directory: what is skipped, what is run again, and what an interruption leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from afmrl_ray import storage
from afmrl_ray.errors import StorageError
from afmrl_ray.runs import STAGE_RECORD, RunDirectory, Stage, StageOutcome, memory
from afmrl_ray.runs.directory import digest_path


class Counting:
    """A body that writes `text` to one file and counts its calls."""

    def __init__(self, text: str = "x") -> None:
        self.calls, self.text = 0, text

    def __call__(self, directory: str) -> StageOutcome:
        self.calls += 1
        storage.write_bytes(storage.join(directory, "out.txt"), self.text.encode())
        return StageOutcome({"out": "out.txt"}, {"value": 0.25})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    found = RunDirectory(str(tmp_path), "run")
    found.create()
    return found


def record_of(run: RunDirectory, name: str) -> dict[str, Any]:
    return json.loads((Path(run.path) / "stages" / name / STAGE_RECORD).read_text())


def test_a_committed_stage_is_skipped_by_another_process_too(run: RunDirectory, tmp_path: Path) -> None:
    body = Counting()
    first = run.run_stage("a", {"x": 1}, body)
    again = RunDirectory(str(tmp_path), "run").run_stage("a", {"x": 1}, body)
    assert body.calls == 1
    assert again == first == run.committed("a")
    assert storage.read_bytes(again.output("out")) == b"x"
    assert again.metrics == {"value": 0.25}
    assert again.peak_memory_mb > 1


def test_the_order_of_input_keys_does_not_matter(run: RunDirectory) -> None:
    body = Counting()
    run.run_stage("a", {"x": 1, "y": {"p": 1, "q": 2}}, body)
    run.run_stage("a", {"y": {"q": 2, "p": 1}, "x": 1}, body)
    assert body.calls == 1


def run_chain(run: RunDirectory, functions: dict[str, Counting], settings: dict[str, int]) -> dict[str, Stage]:
    """a -> b -> d, and c on its own."""
    stages: dict[str, Stage] = {}
    for name, above in (("a", ()), ("b", ("a",)), ("c", ()), ("d", ("b",))):
        inputs = {"setting": settings[name], "upstream": {up: stages[up].fingerprint for up in above}}
        stages[name] = run.run_stage(name, inputs, functions[name])
    return stages


@pytest.mark.parametrize(
    ("changed", "rerun"), [("a", {"a", "b", "d"}), ("b", {"b", "d"}), ("c", {"c"}), ("d", {"d"}), (None, set())]
)
def test_a_changed_input_reruns_exactly_what_depends_on_it(
    run: RunDirectory, changed: str | None, rerun: set[str]
) -> None:
    functions = {name: Counting() for name in "abcd"}
    settings = dict.fromkeys("abcd", 0)
    run_chain(run, functions, settings)
    run_chain(run, functions, {**settings, **({changed: 1} if changed else {})})
    assert {name for name, body in functions.items() if body.calls == 2} == rerun
    assert {name for name, body in functions.items() if body.calls == 1} == set("abcd") - rerun


def interrupted(after: Callable[[str], None]) -> Callable[[str], StageOutcome]:
    def body(directory: str) -> StageOutcome:
        after(directory)
        raise ValueError("out of luck")

    return body


@pytest.mark.parametrize("resumable", [True, False])
def test_an_interrupted_stage_leaves_no_commit_and_resumes_only_if_it_can(run: RunDirectory, resumable: bool) -> None:
    seen: list[tuple[str, bool]] = []

    def look(directory: str) -> None:
        seen.append((directory, storage.exists(storage.join(directory, "checkpoint"))))
        storage.write_bytes(storage.join(directory, "checkpoint"), b"half")

    with pytest.raises(ValueError, match="out of luck") as caught:
        run.run_stage("a", {"x": 1}, interrupted(look), resumable=resumable)
    assert caught.value.__notes__ == ["in stage a"]
    assert run.committed("a") is None
    assert run.stages() == []

    def finish(directory: str) -> StageOutcome:
        look(directory)
        return StageOutcome({}, {})

    run.run_stage("a", {"x": 1}, finish, resumable=resumable)
    assert seen == [(seen[0][0], False), (seen[0][0], resumable)]


def test_an_interrupted_attempt_with_other_inputs_is_not_resumed(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="luck"):
        run.run_stage(
            "a", {"x": 1}, interrupted(lambda at: storage.write_bytes(f"{at}/checkpoint", b"")), resumable=True
        )
    left: list[str] = []

    def look(directory: str) -> StageOutcome:
        left.extend(storage.list_files(directory))
        return StageOutcome({}, {})

    run.run_stage("a", {"x": 2}, look, resumable=True)
    assert left == []


def test_an_interrupted_change_keeps_the_old_commit_whole(run: RunDirectory) -> None:
    first = run.run_stage("a", {"x": 1}, Counting("one"))
    with pytest.raises(ValueError, match="luck"):
        run.run_stage("a", {"x": 2}, interrupted(lambda at: storage.write_bytes(f"{at}/out.txt", b"half")))
    assert run.committed("a") == first
    assert storage.read_bytes(first.output("out")) == b"one"


def test_a_deleted_output_reruns_the_stage(run: RunDirectory) -> None:
    body = Counting()
    stage = run.run_stage("a", {"x": 1}, body)
    storage.remove(stage.output("out"))
    assert storage.exists(run.run_stage("a", {"x": 1}, body).output("out"))
    assert body.calls == 2


def test_a_flipped_byte_in_a_committed_output_ends_the_job_with_what_to_do(run: RunDirectory, tmp_path: Path) -> None:
    body = Counting("content")
    output = Path(run.run_stage("a", {}, body).output("out"))
    output.write_bytes(b"cOntent")
    again = RunDirectory(str(tmp_path), "run")
    with pytest.raises(StorageError, match=r"stage a: .*out.txt is not what was committed .* remove .*stage.json"):
        again.run_stage("a", {}, body)
    (Path(run.path) / "stages" / "a" / STAGE_RECORD).unlink()
    assert storage.read_bytes(again.run_stage("a", {}, body).output("out")) == b"content"
    assert body.calls == 2


def test_a_process_that_may_not_write_any_more_commits_nothing(run: RunDirectory) -> None:
    def guard() -> None:
        if body.calls:
            raise StorageError("another driver took the run over")

    body = Counting()
    run.guard = guard
    with pytest.raises(StorageError, match="took the run over"):
        run.run_stage("a", {}, body)
    assert run.committed("a") is None


def test_an_interrupted_repair_is_not_taken_for_a_commit(run: RunDirectory) -> None:
    """The old record must not vouch for half of the output that is being written again."""
    body = Counting("whole")
    storage.remove(run.run_stage("a", {"x": 1}, body).output("out"))
    with pytest.raises(ValueError, match="luck"):
        run.run_stage("a", {"x": 1}, interrupted(lambda at: storage.write_bytes(f"{at}/out.txt", b"half")))
    repaired = run.run_stage("a", {"x": 1}, body)
    assert storage.read_bytes(repaired.output("out")) == b"whole"
    assert body.calls == 2


def test_digests_follow_content_and_names(run: RunDirectory, tmp_path: Path) -> None:
    run.run_stage("a", {"x": 1}, Counting("one"))
    first = record_of(run, "a")["digests"]
    run.run_stage("a", {"x": 2}, Counting("one"))
    same = record_of(run, "a")["digests"]
    run.run_stage("a", {"x": 3}, Counting("two"))
    assert first == same != record_of(run, "a")["digests"]

    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "x").write_bytes(b"1")
    digests = [digest_path(str(folder))]
    (folder / "deep" / "x").write_bytes(b"2")
    digests.append(digest_path(str(folder)))
    (folder / "deep" / "x").rename(folder / "deep" / "y")
    digests.append(digest_path(str(folder)))
    assert len(set(digests)) == 3


def test_stages_come_in_the_order_of_their_commits_and_ignore_debris(run: RunDirectory) -> None:
    for name in ("b", "a", "c"):
        run.run_stage(name, {}, Counting())
    # A driver that was killed while it wrote leaves the first; the other is a cache beside the attempts.
    storage.write_bytes(storage.join(run.path, "stages", "d", f"{STAGE_RECORD}.123.partial"), b"{")
    storage.write_bytes(storage.join(run.path, "stages", "d", "answers", STAGE_RECORD), b"{}")
    run.run_stage("b", {"changed": True}, Counting())
    assert [stage.name for stage in run.stages()] == ["a", "c", "b"]


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"run\.storage_path"):
        RunDirectory(str(tmp_path / "file"), "run").create()


def test_peak_memory_keeps_the_largest_sample_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, enough = iter([100.0, 900.0, 50.0]), threading.Event()

    def sample(processes: object) -> float:
        value = next(samples, None)
        if value is None:
            enough.set()
        return value or 50.0

    monkeypatch.setattr(memory, "_PERIOD_S", 0.001)
    monkeypatch.setattr(memory, "memory_mb", sample)
    before = threading.active_count()
    with memory.PeakMemory() as peak:
        assert enough.wait(10)
    assert peak.peak_mb == 900.0
    assert threading.active_count() == before


def test_tree_memory_counts_descendants() -> None:
    before = memory.memory_mb(memory.process_tree())
    code = "block = bytearray(80 * 2**20); print(len(block), flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert memory.memory_mb(memory.process_tree()) > before + 70
    finally:
        child.communicate(b"\n")


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_memory_is_not_measured_where_somebody_elses_ray_does_the_work(ray_local: None) -> None:
    import ray

    with memory.PeakMemory() as own:
        pass
    assert own.peak_mb is not None
    assert own.peak_mb > 1
    code = f"""
import ray
from afmrl_ray.runs.memory import PeakMemory
with PeakMemory() as before:
    pass
ray.init(address={ray.get_runtime_context().gcs_address!r}, namespace="other", logging_level="ERROR")
with PeakMemory() as joined:
    pass
print(before.peak_mb > 1, joined.peak_mb)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "None"]
