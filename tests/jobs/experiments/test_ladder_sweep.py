"""The sweep over settings: its runs and its table."""

from __future__ import annotations

from afmrl_ray.config import load_config, with_values
from jobs.experiments import ladder_sweep
from tests.jobs.experiments.programs import ROOT


def test_every_setting_of_the_sweep_is_a_run_with_a_config_of_its_own() -> None:
    base = load_config(str(ROOT / "jobs/configs/ladder.yaml"))
    cells = ladder_sweep.cells(base)
    assert len({config.run.name for _, _, config in cells}) == len(cells)
    configs = [config.model_dump(exclude={"run"}) for _, _, config in cells]
    primary = {"evaluation.protocols": list(base.evaluation.protocols[:1]), "cit.gate.protocols": []}
    assert configs[0] == with_values(base, primary).model_dump(exclude={"run"})
    assert {len(config.evaluation.protocols) for _, _, config in cells} == {1}
    assert all(configs.count(config) == 1 for config in configs), "two settings are the same"


def test_the_table_has_a_level_and_gains_with_intervals() -> None:
    gain = {"mean": 0.021, "low": -0.003, "high": 0.045}
    rows = [
        {"property": "p", "setting": "s", "hit@1": {"low": 0.25, "mid": 0.3, "high": 0.3}, "gain": {"high": gain}},
        {"property": "q", "setting": "", "hit@1": {"low": 0.5, "mid": 0.6, "high": 0.6}, "gain": {}},
    ]
    table = ladder_sweep.table(rows)
    assert table.columns[1:] == ["low", "mid", "high"]
    assert table.rows == [["p: s", "25.0 %", "", "+2.1 [-0.3, +4.5]"], ["q", "50.0 %", "", ""]]
