from __future__ import annotations

import time
from pathlib import Path

import pytest

from afmrl_ray.errors import StorageError
from afmrl_ray.training.metrics_log import MetricsLog, read_metrics, results_of


def test_a_resume_does_not_log_a_step_twice(tmp_path):
    folder = str(tmp_path)
    first = MetricsLog(folder)
    for step in range(5):
        first.log(step, {"train/loss": float(step), "train/bad": float("nan")})
    first.close()
    second = MetricsLog(folder, resume_step=3)
    for step in range(3, 6):
        second.log(step, {"train/loss": 10.0 + step})
    second.close()
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5]
    assert [record["train/loss"] for record in records] == [0, 1, 2, 13, 14, 15]
    assert records[0]["train/bad"] is None


def test_tensorboard_shows_every_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = MetricsLog(str(tmp_path))
    for step in range(4):
        first.log(step, {"train/loss": float(step), "train/bad": float("nan")})
    first.close()
    # TensorBoard reads event files in the order of their names: the second of the start, then a count without zeros.
    time.sleep(1.1)
    second = MetricsLog(str(tmp_path), resume_step=2)
    for step in range(2, 5):
        second.log(step, {"train/loss": 10.0 + step})
    second.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert shown.Tags()["scalars"] == ["train/loss"]
    assert [(each.step, each.value) for each in shown.Scalars("train/loss")] == [
        (0, 0),
        (1, 1),
        (2, 12),
        (3, 13),
        (4, 14),
    ]


def test_reading_without_a_log_gives_no_records(tmp_path):
    assert read_metrics(str(tmp_path)) == []


def test_results_do_not_depend_on_the_machine():
    results = {"train/loss": 0.5, "data/tflop": 1.0}
    measured = {"time/step": 2.0, "time/mfu": 0.4, "time/peak_memory_mb": 9.0, "data/vision_cache_hit_fraction": 1.0}
    assert results_of({**results, **measured, "text": "x"}) == results


def test_a_line_that_a_full_disk_cut_off_is_dropped(tmp_path):
    log = MetricsLog(str(tmp_path))
    for step in range(3):
        log.log(step, {"train/loss": 1.0})
    log.close()
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-9])
    assert [record["step"] for record in read_metrics(str(tmp_path))] == [0, 1]
    log = MetricsLog(str(tmp_path), resume_step=2)
    log.log(2, {"train/loss": 2.0})
    log.close()
    assert [(record["step"], record["train/loss"]) for record in read_metrics(str(tmp_path))] == [
        (0, 1),
        (1, 1),
        (2, 2),
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
def test_a_full_disk_is_an_error_that_names_the_directory(tmp_path):
    log = MetricsLog(str(tmp_path))
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=rf"{tmp_path}: cannot be written .*No space left on device"):
        log.log(0, {"train/loss": 1.0})
