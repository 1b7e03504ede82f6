"""The stages as a Markdown table, from their declarations; `python -m afmrl_ray.cit.stage_docs > docs/stages.md`."""

from __future__ import annotations

import sys

from afmrl_ray.cit.spec import StageSpec
from afmrl_ray.cit.stages import BY_ROUND, ONCE, declare
from afmrl_ray.config import Config
from afmrl_ray.runs import StageName

_HEAD = """# Stages

A run is a graph of stages. Each is declared once, in `afmrl_ray/cit/stages/`: the config fields that its function
reads, its upstream stages, and the resources it holds. Its fingerprint is a digest of those fields and of the upstream
fingerprints; a stage that is committed with the same fingerprint is skipped. Reading an undeclared field is an error.

This page is written by `python -m afmrl_ray.cit.stage_docs`; a test checks that it is current. `rN` stands for a round.

| stage | what it does | reads | upstream | resumes within |
| --- | --- | --- | --- | --- |
"""


def stage_table() -> str:
    """The page `docs/stages.md`."""
    config = Config()
    names = [StageName("catalogue"), *map(StageName, ONCE), *(StageName(kind, 1) for kind in BY_ROUND)]
    return _HEAD + "".join(_line(declare(name, config)) for name in names)


def _line(spec: StageSpec) -> str:
    reads = ", ".join(f"`{read}`" for read in spec.reads) or "-"
    upstream = ", ".join(f"`{_round(name, spec)}`" for name in spec.upstream.values()) or "-"
    resumes = "yes" if spec.resumable else "no"
    return f"| `{_round(spec.name, spec)}` | {spec.summary} | {reads} | {upstream} | {resumes} |\n"


def _round(name: StageName, spec: StageSpec) -> str:
    """A name with its round relative to the round of the table's line."""
    if name.round is None or spec.name.round is None:
        return str(name)
    offset = name.round - spec.name.round
    return f"{name.kind}-r" + (f"(N{offset:+d})" if offset else "N")


if __name__ == "__main__":
    sys.stdout.write(stage_table())
