from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from afmrl_ray.catalogue import CatalogueRef, open_catalogue
from afmrl_ray.config.catalogue import CatalogueConfig


@pytest.fixture(scope="session")
def hard_negatives_catalogue_ref(tiny_catalogue_path, tmp_path_factory) -> CatalogueRef:
    """Two of three train items name as negatives: one of their own product, an unknown item, three of others."""
    table = pq.read_table(tiny_catalogue_path)
    rows = table.select(["item_id", "product_id", "split"]).to_pylist()
    train = [row for row in rows if row["split"] == "train"]
    negatives = []
    for place, row in enumerate(rows):
        own = next(other["item_id"] for other in rows if other["product_id"] == row["product_id"])
        others = [other["item_id"] for other in train if other["product_id"] != row["product_id"]][place % 7 :][:3]
        negatives.append([own, "nowhere", *others] if row["split"] == "train" and place % 3 else None)
    path = str(tmp_path_factory.mktemp("hard-negatives") / "c.parquet")
    pq.write_table(table.append_column("negatives", pa.array(negatives, pa.list_(pa.string()))), path)
    config = CatalogueConfig(cache_dir=str(tmp_path_factory.mktemp("staging")))
    return CatalogueRef(path, config, open_catalogue(path, config=config).fingerprint)
