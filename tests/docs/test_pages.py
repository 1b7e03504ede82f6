"""Pages that are written from the code are current, and pages name what exists."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from afmrl_ray.cit.stage_docs import stage_table
from afmrl_ray.config import Config, known_keys

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "cluster/README.md",
    *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md"))),
)
FOLDERS = ("afmrl_ray", "cluster", "docs", "jobs", "tests")
every_page = pytest.mark.parametrize("page", PAGES)


def code(page: str) -> list[str]:
    """The code spans and the lines of code blocks of a page."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [*spans, *(line for block in blocks for line in block.splitlines())]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_of_stages_is_current() -> None:
    expected = stage_table()
    assert (ROOT / "docs/stages.md").read_text() == expected, "run python -m afmrl_ray.cit.stage_docs > docs/stages.md"


def test_every_stage_is_on_its_page_with_what_it_reads() -> None:
    lines = stage_table().splitlines()
    (rar,) = (line for line in lines if line.startswith("| `rar-rN`"))
    for part in ("`rar`", "`generator`", "`rar-r(N-1)`", "`agcl-rN`", "`gallery-rN`", "yes"):
        assert part in rar


@every_page
def test_config_keys_on_a_page_exist(page: str) -> None:
    sections = "|".join(Config.model_fields)
    keys = set(known_keys(Config)) | set(Config.model_fields)
    key = rf"(?:{sections})(?:\.\w+)+"
    named = [found for part in code(page) for found in re.findall(rf"^{key}$|(?<![\w./-]){key}(?==)", part)]
    assert [name for name in named if name not in keys and not name.endswith((".json", ".html"))] == []


@every_page
def test_files_on_a_page_exist(page: str) -> None:
    path = rf"(?:{'|'.join(FOLDERS)})/[\w./-]*"
    named = [ROOT / found for part in code(page) for found in re.findall(rf"(?<![\w./:-]){path}", part)]
    if page == "cluster/README.md":
        folder = ROOT / "cluster"
        children = "|".join(child.name for child in folder.iterdir() if child.is_dir())
        named += [folder / part for part in code(page) if re.fullmatch(rf"(?:{children})/[\w./-]*", part)]
    assert [str(file) for file in named if not file.exists()] == []


@every_page
def test_python_files_named_without_a_folder_exist(page: str) -> None:
    files = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert [part for part in code(page) if re.fullmatch(r"\w+\.py", part) and part not in files] == []


@every_page
def test_modules_on_a_page_exist(page: str) -> None:
    named = [name for part in code(page) for name in re.findall(r"python -m ([\w.]*\w)", part)]
    assert [name for name in named if find_spec(name) is None] == []


@every_page
def test_make_targets_on_a_page_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [name for part in code(page) for name in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)", part)]
    assert [name for name in named if name not in targets] == []


@every_page
def test_links_of_a_page_lead_to_a_file_and_a_heading(page: str) -> None:
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"
