"""Pages that are written from the code are current, and pages name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from afmrl_ray.cit.stage_docs import stage_table
from afmrl_ray.config import Config, known_keys

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_of_stages_is_current() -> None:
    assert (DOCS / "stages.md").read_text() == stage_table(), "run python -m afmrl_ray.cit.stage_docs > docs/stages.md"


def test_every_stage_is_on_its_page_with_what_it_reads() -> None:
    lines = stage_table().splitlines()
    (rar,) = (line for line in lines if line.startswith("| `rar-rN`"))
    for part in ("`rar`", "`generator`", "`rar-r(N-1)`", "`agcl-rN`", "`gallery-rN`", "yes"):
        assert part in rar


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_config_keys_on_a_page_exist(page: str) -> None:
    sections = "|".join(Config.model_fields)
    keys = set(known_keys(Config)) | set(Config.model_fields)
    keys |= {key.rsplit(".", count)[0] for key in keys for count in (1, 2, 3) if key.count(".") >= count}
    named = re.findall(rf"`((?:{sections})(?:\.\w+)+)`", (DOCS / page).read_text())
    assert [key for key in named if key not in keys] == []
