"""The ablation of stage 1's loss: its cells, and gains over plain InfoNCE from given numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.config.catalogue import CatalogueConfig
from jobs.experiments.loss_ablation import cell_path, finished
from jobs.experiments.loss_ablation_report import METRICS, PLAIN, summary, table, write
from jobs.experiments.loss_variants import BATCHES, HARD_VARIANTS, VARIANTS, Dataset


def dataset(*, families: bool) -> Dataset:
    values = {"agcl": {"batch_size": 8, "temperature": 0.05}}
    return Dataset("d", values, CatalogueRef("c.parquet", CatalogueConfig(), "f"), "a.parquet", 1, 1, families)


def result(hit: float) -> dict[str, Any]:
    """What a cell writes."""
    metrics = {metric: {"mean": hit} for metric in METRICS}
    stats = {"masked_fraction": 0.02, "weight_p10": 0.4, "weight_p50": 0.5, "weight_p90": 0.6}
    return {"stats": stats, "protocols": {"fine": {"metrics": metrics}}}


def test_cells_are_different_and_their_configs_are_valid() -> None:
    cells = dataset(families=True).cells(2, [0.02])
    assert len(cells) == 2 * (len(BATCHES) * len(VARIANTS) + len(HARD_VARIANTS) + 1)
    assert len({(cell.batches, cell.variant, cell.seed) for cell in cells}) == len(cells)
    configs = [dataset(families=True).config(cell.seed, **cell.agcl).model_dump() for cell in cells]
    assert all(configs.count(config) == 1 for config in configs), "two cells have the same config"
    assert len(dataset(families=False).cells(1, [])) == len(BATCHES) * len(VARIANTS)


def test_finished_cells_are_found_by_batches_variant_and_seed(tmp_path: Path) -> None:
    of = dataset(families=False)
    cells = of.cells(2, [])
    assert len({cell_path(tmp_path, of, cell) for cell in cells}) == len(cells)
    assert finished(tmp_path, of, 2, []) == {}
    path = cell_path(tmp_path, of, cells[1])
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(result(0.5)))
    key = (cells[1].batches, cells[1].variant)
    assert finished(tmp_path, of, 2, []) == {key: {cells[1].seed: result(0.5)}}


CELLS = {
    ("uniform", PLAIN): {0: result(0.20), 1: result(0.30)},
    ("uniform", "weights"): {0: result(0.24), 1: result(0.36), 2: result(0.9)},
    ("other", "weights"): {0: result(0.5)},
}


def test_gains_are_paired_with_plain_infonce_of_the_same_seed_and_batches() -> None:
    plain, weights, other = summary(CELLS, ["fine"])
    assert plain["fine hit@1"] == pytest.approx((25.0, 5.0))
    assert plain["fine hit@1 gain"] == pytest.approx((0.0, 0.0))
    # The third seed has no partner; differences of 4 and 6 points have a standard error of 1.
    assert (weights["seeds"], weights["fine hit@1 gain"]) == (3, pytest.approx((5.0, 1.0)))
    assert math.isnan(other["fine hit@1 gain"][0])


def test_the_table_has_a_row_per_batches_and_variant() -> None:
    rows = table("d", summary(CELLS, ["fine"]), ["fine"]).rows
    assert rows[1] == ["uniform", "weights", "50.0 ± 20.3", "+5.0 ± 1.0", "2.0", "0.40 / 0.50 / 0.60"]
    assert rows[2][3] == "-"


def test_tables_json_and_chart_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = {key: value for key, value in CELLS.items() if key[0] == "uniform"}
    rows = {"d": summary(cells, ["fine"])}
    write(rows, {"d": ["fine"]}, tmp_path / "ablation")
    assert table("d", rows["d"], ["fine"]).markdown() in capsys.readouterr().out
    written = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["variant"] for row in written["d"]] == [PLAIN, "weights"]
    assert (tmp_path / "ablation.png").stat().st_size > 5_000
