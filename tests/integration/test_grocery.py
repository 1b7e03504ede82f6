"""The published baselines of the grocery photographs, through our own protocols."""

from __future__ import annotations

from pathlib import Path

import pytest

from afmrl_ray.catalogue import open_catalogue
from afmrl_ray.cit.pipeline import Pipeline
from afmrl_ray.config import load_config
from afmrl_ray.runs import RunDirectory, StageName

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared/data/grocery/products.parquet"


@pytest.mark.skipif(not DATA.exists(), reason=f"REAL PHOTOGRAPHS NOT TESTED: no {DATA}")
def test_pixel_baseline_and_chance_are_those_of_the_datas_readme(tmp_path):
    config = load_config(
        str(ROOT / "jobs/configs/grocery.yaml"), [f"catalogue.path={DATA}", f"catalogue.cache_dir={tmp_path}"]
    )
    catalogue = open_catalogue(str(DATA), config=config.catalogue)
    assert catalogue.counts == {"rows": 5502, "kept": 5502, "quarantined": {}}
    pipeline = Pipeline(config, RunDirectory(str(tmp_path), "grocery"), catalogue)
    found = pipeline.stage(StageName("baselines")).metrics
    published = {"G1": ((7.0, 26.3, 40.6), (1.2, 6.2, 12.3)), "G2": ((13.9, 30.1, 41.9), (1.4, 6.7, 13.0))}
    for name, (pixels, chance) in published.items():
        for k, by_pixels, by_chance in zip((1, 5, 10), pixels, chance, strict=True):
            assert 100 * found["pixels"][name]["metrics"][f"hit@{k}"]["mean"] == pytest.approx(by_pixels, abs=0.15)
            assert 100 * found["chance"][name]["metrics"][f"hit@{k}"]["mean"] == pytest.approx(by_chance, abs=0.1)
    assert found["pixels"]["G1 packages"]["queries"] == 781
