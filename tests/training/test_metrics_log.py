from __future__ import annotations

from afmrl_ray.training.metrics_log import MetricsLog, read_metrics, results_of


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


def test_what_depends_on_the_machine_is_no_result():
    values = {"loss": 0.5, "tflop": 1.0, "seconds_step": 2.0, "mfu": 0.4, "vision_cache_hit_share": 1.0, "text": "x"}
    assert results_of({**values, "tflops_per_second": 0.5, "peak_memory_mb": 9.0}) == {"loss": 0.5, "tflop": 1.0}
