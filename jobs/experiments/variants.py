"""The variants of the ablation study: from a dual encoder to three rounds of CIT, as in the paper's table.

Every variant's encoder is trained from the same checkpoint for the same number of steps (`agcl.steps`), so that the
variants differ only in their training signal. Stages are shared where variants have them in common: the encoder trained
with the attributes of the distilled generator is the one that RAR searches with, and that RAR's gain is measured with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from afmrl_ray.config import Config
from afmrl_ray.errors import ConfigError
from jobs.experiments.pieces import PIECES


@dataclass(frozen=True)
class Variant:
    """One variant.

    Attributes:
        key: short name, for the command line.
        title: name in tables.
        evaluation: stage that measures it.
        training: stage that trains its encoder.
        reference: key of the variant that its gain is relative to; None = it has no gain.
        note: what distinguishes it.
        in_table: whether it is a row of the paper's table; otherwise it is a branch or an upper bound beside the table.
    """

    key: str
    title: str
    evaluation: str
    training: str
    reference: str | None
    note: str
    in_table: bool = True


_PAPER = (
    Variant(
        "dual-encoder",
        "dual encoder",
        "evaluate-dual-encoder",
        "dual-encoder",
        None,
        "image-text and pair InfoNCE",
    ),
    Variant(
        "dual-encoder-regions",
        "dual encoder + regions + hard texts",
        "evaluate-dual-encoder-regions",
        "dual-encoder-regions",
        "dual-encoder",
        "the same encoder, with regions against phrases and texts with one attribute changed",
    ),
    Variant(
        "info-nce",
        "Qwen2-VL, InfoNCE",
        "evaluate-baseline",
        "baseline",
        None,
        "plain InfoNCE, no attributes",
    ),
    Variant(
        "agcl",
        "+ AGCL",
        "evaluate-agcl-labels",
        "agcl-labels",
        "info-nce",
        "weights and mask by the teacher's attributes, which are not part of the encoder's input",
    ),
    Variant(
        "distilled",
        "+ distilled generator",
        "evaluate-distilled",
        "agcl-r0",
        "agcl",
        "trained and searched with the attributes of the distilled generator",
    ),
    Variant(
        "more-distillation",
        "more distillation instead of RL",
        "evaluate-more-distillation",
        "agcl-r0",
        "distilled",
        "the same encoder, attributes after as many further steps on the teacher's labels as RAR has",
        in_table=False,
    ),
    Variant(
        "rejection-sampling",
        "rejection sampling instead of RL",
        "evaluate-rejection-sampling",
        "agcl-r0",
        "distilled",
        "the same encoder, attributes after fine-tuning on the best of each group of samples, as many as RAR has",
        in_table=False,
    ),
    Variant(
        "rl",
        "+ RL (RAR)",
        "evaluate-r0",
        "agcl-r0",
        "distilled",
        "the same encoder, all items with the attributes after RAR, before the encoder is trained with them",
    ),
    Variant(
        "cit-2",
        "+ CIT, second round",
        "evaluate-r1",
        "agcl-r1",
        "rl",
        "encoder and generator trained a second time",
    ),
    Variant(
        "cit-3",
        "+ CIT, third round",
        "evaluate-r2",
        "agcl-r2",
        "cit-2",
        "encoder and generator trained a third time",
    ),
    Variant(
        "rl-queries",
        "RL, queries alone",
        "evaluate-rl-queries",
        "agcl-r0",
        "distilled",
        "the same encoder and gallery, queries with the attributes after RAR, as in RAR's reward",
        in_table=False,
    ),
    Variant(
        "cit-2-fewer-products",
        "CIT, second round, fewer products",
        "evaluate-r1-fewer-products",
        "agcl-r1-fewer-products",
        "cit-2",
        "the encoder of the second round trained on a fraction of the products",
        in_table=False,
    ),
    Variant(
        "oracle-input",
        "true attributes, encoder as distilled",
        "evaluate-oracle-input",
        "agcl-r0",
        "distilled",
        "upper bound of any generator with this encoder",
        in_table=False,
    ),
    Variant(
        "oracle",
        "true attributes throughout",
        "evaluate-oracle",
        "agcl-oracle",
        "distilled",
        "upper bound: trained and searched with the true attributes",
        in_table=False,
    ),
)

_PIECES = tuple(
    Variant(key, note, f"evaluate-{key}", key, "info-nce", note, in_table=False) for key, note in PIECES.items()
)
VARIANTS = (*_PAPER, *_PIECES)
"""Rows of the paper's table with their branches and bounds, then the pieces of AGCL."""

KEYS = tuple(variant.key for variant in VARIANTS)
LADDER = ("info-nce", "agcl", "distilled", "rl", "cit-2", "cit-3")
"""The rows of the paper's table that begin with the pretrained encoder."""
DUAL_ENCODERS = ("dual-encoder", "dual-encoder-regions")
"""Keys of the variants that need a dual encoder's checkpoint."""


def check_comparable(config: Config) -> None:
    """Make sure that all variants can be trained, and for the same number of encoder steps.

    Raises:
        ConfigError: later rounds would continue from the encoder before, or there are fewer than three rounds.
    """
    if config.cit.init_from != "base":
        raise ConfigError(
            "ablation study: cit.init_from previous gives later rounds more encoder steps; set cit.init_from=base"
        )
    if config.cit.rounds < 3:
        raise ConfigError(f"ablation study: it has three rounds, cit.rounds is {config.cit.rounds}; set cit.rounds=3")


def needs_dual_encoder(keys: Sequence[str]) -> bool:
    """Whether one of the variants has a dual encoder."""
    return bool(set(keys) & set(DUAL_ENCODERS))
