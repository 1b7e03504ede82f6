from __future__ import annotations

from afmrl_ray.training.metrics_log import MetricsLog, read_metrics


def test_a_resume_does_not_log_a_step_twice(tmp_path):
    folder = str(tmp_path)
    first = MetricsLog(folder)
    for step in range(5):
        first.log(step, {"loss": float(step), "bad": float("nan")})
    first.close()
    second = MetricsLog(folder, resume_step=3)
    for step in range(3, 6):
        second.log(step, {"loss": 10.0 + step})
    second.close()
    records = read_metrics(folder)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5]
    assert [record["loss"] for record in records] == [0, 1, 2, 13, 14, 15]
    assert records[0]["bad"] is None
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_no_log_reads_as_nothing(tmp_path):
    assert read_metrics(str(tmp_path)) == []
