"""The ladder: from a dual encoder to three rounds of CIT, every rung a set of committed stages of one seed's run.

Every rung's encoder is trained from the same checkpoint for the same number of steps (`agcl.steps`), so that a rung can
only gain by what it is trained with. Stages are shared where rungs share them: the encoder that the distilled generator
helps is the one that RAR searches with, and what RAR gains is measured with it before it is trained anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from afmrl_ray.cit.pipeline import PLAIN_INFONCE, Pipeline
from afmrl_ray.config import Config
from afmrl_ray.errors import ConfigError
from afmrl_ray.runs import Stage


@dataclass(frozen=True)
class Rung:
    """One rung.

    Attributes:
        key: short name, for the command line.
        title: name in tables.
        evaluation: stage that measures it.
        training: stage that trains its encoder.
        below: key of the rung that it is held against; none = it is the lowest.
        note: what it is.
        ladder: whether it is a rung proper; else a branch or a ceiling beside the ladder.
    """

    key: str
    title: str
    evaluation: str
    training: str
    below: str | None
    note: str
    ladder: bool = True


RUNGS = (
    Rung("clip", "CLIP", "evaluate-clip", "clip", None, "dual encoder, image-text and pair InfoNCE"),
    Rung(
        "fg-clip",
        "FG-CLIP's recipe",
        "evaluate-fg-clip",
        "fg-clip",
        "clip",
        "the same tower, and regions against phrases, and texts with one attribute changed",
    ),
    Rung("vlm2vec", "VLM2Vec", "evaluate-baseline", "baseline", "fg-clip", "plain InfoNCE, no attributes"),
    Rung(
        "agcl",
        "+ AGCL",
        "evaluate-agcl-labels",
        "agcl-labels",
        "vlm2vec",
        "weights and mask by the teacher's attributes, which the encoder never reads",
    ),
    Rung(
        "distilled",
        "+ distilled generator",
        "evaluate-distilled",
        "agcl-r0",
        "agcl",
        "trained and searched with the attributes of the distilled generator",
    ),
    Rung(
        "rl",
        "+ RL (RAR)",
        "evaluate-r0",
        "agcl-r0",
        "distilled",
        "the same encoder, all items with the attributes after RAR, before it is trained with them",
    ),
    Rung("cit-2", "+ CIT, second round", "evaluate-r1", "agcl-r1", "rl", "encoder and generator trained once more"),
    Rung("cit-3", "+ CIT, third round", "evaluate-r2", "agcl-r2", "cit-2", "and once more"),
    Rung(
        "rl-queries",
        "RL, queries alone",
        "evaluate-rl-queries",
        "agcl-r0",
        "distilled",
        "the same encoder and gallery, queries with the attributes after RAR: what RAR was rewarded for",
        ladder=False,
    ),
    Rung(
        "cit-2-share",
        "CIT, second round, fewer products",
        "evaluate-r1-share",
        "agcl-r1-share",
        "cit-2",
        "the encoder of the second round trained on a share of the products",
        ladder=False,
    ),
    Rung(
        "oracle-input",
        "true attributes, encoder as distilled",
        "evaluate-oracle-input",
        "agcl-r0",
        "distilled",
        "ceiling of any generator with this encoder",
        ladder=False,
    ),
    Rung(
        "oracle",
        "true attributes throughout",
        "evaluate-oracle",
        "agcl-oracle",
        "distilled",
        "ceiling: trained and searched with the truth",
        ladder=False,
    ),
)

# Objectives of its own; weights and masks belong to AGCL.
_CLIP = {"encoder.kind": "dual_encoder", **PLAIN_INFONCE}
DUAL_ENCODERS: dict[str, dict[str, Any]] = {
    "clip": _CLIP,
    # The weights of FG-CLIP (Xie et al. 2025, equation 4): 0.1 of regions, 0.5 of hard texts.
    "fg-clip": {**_CLIP, "encoder.dual_encoder.region_weight": 0.1, "encoder.dual_encoder.hard_text_weight": 0.5},
}
"""Settings of the rungs that are no Qwen2-VL, over the ladder's config."""


class Ladder:
    """The rungs of one seed.

    Args:
        pipeline: the seed's run; its config trains every round's encoder from the backbone.
        clip_path: checkpoint that the dual encoders begin with.
        share: share of the products in the branch with fewer.

    Raises:
        ConfigError: the config does not give every rung the same number of encoder steps, or too few rounds.
    """

    def __init__(self, pipeline: Pipeline, *, clip_path: str | None, share: float = 0.3) -> None:
        check_ladder(pipeline.config)
        self._pipeline, self._clip_path, self._share = pipeline, clip_path, share
        self._build: dict[str, Callable[[], Stage]] = {
            "clip": lambda: self._dual_encoder("clip", None),
            "fg-clip": lambda: self._dual_encoder("fg-clip", self._pipeline.labels),
            "vlm2vec": pipeline.evaluate_baseline,
            "agcl": self._agcl_by_labels,
            "distilled": lambda: pipeline.evaluation("evaluate-distilled", pipeline.agcl(0), pipeline.attributes(0)),
            "rl": lambda: self._round(0),
            "rl-queries": self._queries_anew,
            "cit-2": lambda: self._round(1),
            "cit-3": lambda: self._round(2),
            "cit-2-share": self._fewer_products,
            "oracle-input": lambda: pipeline.evaluation("evaluate-oracle-input", pipeline.agcl(0), pipeline.oracle),
            "oracle": self._oracle_throughout,
        }

    def climb(self, key: str) -> Stage:
        """The evaluation of a rung; whatever it stands on is run first."""
        return self._build[key]()

    def _dual_encoder(self, key: str, attributes: Stage | None) -> Stage:
        if self._clip_path is None:
            raise ConfigError(f"ladder: rung {key} needs the checkpoint of a dual encoder")
        changes = {**DUAL_ENCODERS[key], "encoder.path": self._clip_path}
        if self._pipeline.config.encoder.dual_encoder.boxes_column not in self._pipeline.catalogue.table.column_names:
            changes["encoder.dual_encoder.region_weight"] = 0.0
        variant = self._pipeline.variant(changes)
        return variant.evaluation(f"evaluate-{key}", variant.encoder(key, attributes), None)

    def _agcl_by_labels(self) -> Stage:
        """The loss alone: attributes decide weights and mask, and no input shows them."""
        variant = self._pipeline.variant({"agcl.attribute_dropout.query": 1.0, "agcl.attribute_dropout.positive": 1.0})
        encoder = variant.encoder("agcl-labels", self._pipeline.pair_labels)
        return variant.evaluation("evaluate-agcl-labels", encoder, None)

    def _queries_anew(self) -> Stage:
        pipeline = self._pipeline
        return pipeline.evaluation("evaluate-rl-queries", pipeline.agcl(0), pipeline.attributes_of_queries(0))

    def _fewer_products(self) -> Stage:
        pipeline = self._pipeline
        encoder = pipeline.encoder("agcl-r1-share", pipeline.attributes(1), train_fraction=self._share)
        return pipeline.evaluation("evaluate-r1-share", encoder, pipeline.attributes(2))

    def _round(self, number: int) -> Stage:
        """The round's evaluation; the gate's word on it is committed beside, and the ladder goes on either way."""
        self._pipeline.promotion(number)
        return self._pipeline.evaluate(number)

    def _oracle_throughout(self) -> Stage:
        pipeline = self._pipeline
        encoder = pipeline.encoder("agcl-oracle", pipeline.oracle)
        return pipeline.evaluation("evaluate-oracle", encoder, pipeline.oracle)


def check_ladder(config: Config) -> None:
    """Make sure that rungs can be compared.

    Raises:
        ConfigError: a round's encoder would go on from the last one's, or there are too few rounds.
    """
    if config.cit.init_from != "base":
        raise ConfigError(
            "ladder: cit.init_from previous gives later rounds more encoder steps; set cit.init_from=base"
        )
    if config.cit.rounds < 3:
        raise ConfigError(f"ladder: it has three rounds, cit.rounds is {config.cit.rounds}; set cit.rounds=3")
