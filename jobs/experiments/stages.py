"""Stages of the experiments; no other experiment file uses a run's pipeline or its stage functions."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import ray

from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.cit.driver import open_run, own_command, record_whole
from afmrl_ray.cit.pipeline import Pipeline
from afmrl_ray.cit.spec import StageContext
from afmrl_ray.cit.stages.attributes import distillation_items, pair_items
from afmrl_ray.cit.stages.evaluation import evaluation_spec
from afmrl_ray.cit.stages.training import PLAIN_INFONCE, encoder_spec, rar_stage
from afmrl_ray.config import Config, with_values
from afmrl_ray.errors import ConfigError
from afmrl_ray.report import write_report
from afmrl_ray.runs import Stage, StageName, StageOutcome
from afmrl_ray.training.metrics_log import read_metrics
from jobs.experiments.pieces import PIECES, WITH_TRUE_ATTRIBUTES, piece_settings
from jobs.experiments.rejection_sampling import best_samples_spec, fine_tuning_spec
from jobs.experiments.variants import check_comparable, needs_dual_encoder

log = logging.getLogger("afmrl_ray.ablation_study")

# Dual encoders have objectives of their own; weights and masks belong to AGCL.
_DUAL_ENCODER = {"encoder.kind": "dual_encoder", **PLAIN_INFONCE}
_SETTINGS: dict[str, dict[str, Any]] = {
    "dual-encoder": _DUAL_ENCODER,
    # Weights of FG-CLIP (Xie et al. 2025, equation 4): 0.1 for regions, 0.5 for hard texts.
    "dual-encoder-regions": {
        **_DUAL_ENCODER,
        "encoder.dual_encoder.region_weight": 0.1,
        "encoder.dual_encoder.hard_text_weight": 0.5,
    },
}
"""Settings of the variants with a dual encoder, over those of the study."""


@dataclass(frozen=True)
class SharedStart:
    """What all runs of a study share, whatever their seed: there is one published checkpoint of each model.

    Attributes:
        values: dotted settings: paths of the checkpoints and address of the Ray to join.
        dual_encoder: checkpoint of the dual encoders; None if no variant has one.
        catalogue_path: path or URI of the catalogue.
        items: the catalogue, opened.
    """

    values: dict[str, Any]
    dual_encoder: str | None
    catalogue_path: str
    items: StagedCatalogue


@contextmanager
def shared_start(config: Config, keys: Sequence[str]) -> Iterator[SharedStart]:
    """Make catalogue and checkpoints in a run of their own, and keep its Ray running meanwhile.

    Args:
        config: config of the study.
        keys: keys of the variants.
    """
    with open_run(config) as pipeline:
        values = {f"{role}.path": pipeline.base_checkpoint(role) for role in ("encoder", "generator")}
        path, dual_encoder = pipeline.catalogue_ref.path, None
        if needs_dual_encoder(keys):
            name = f"{config.run.name}-dual-encoder"
            changes = {**_DUAL_ENCODER, **values, "encoder.path": None, "catalogue.path": path, "run.name": name}
            with open_run(with_values(config, changes)) as other:
                dual_encoder = other.base_checkpoint("encoder")
        values["ray.address"] = ray.get_runtime_context().gcs_address
        yield SharedStart(values, dual_encoder, path, pipeline.catalogue)


class AblationStudy:
    """The variants of one seed, as stages added to its run.

    Args:
        pipeline: pipeline of the seed's run.
        dual_encoder: checkpoint that the dual encoders start from; None = variants that need it are refused.
        train_fraction: fraction of the products in the variant with fewer products.

    Raises:
        ConfigError: see `check_comparable`.
    """

    def __init__(self, pipeline: Pipeline, *, dual_encoder: str | None, train_fraction: float = 0.3) -> None:
        check_comparable(pipeline.config)
        self._pipeline, self._checkpoint, self._train_fraction = pipeline, dual_encoder, train_fraction
        first, oracle = StageName("agcl", 0), StageName("oracle")
        self._declare: dict[str, Callable[[], StageName]] = {
            "dual-encoder": lambda: self._dual_encoder("dual-encoder", None),
            "dual-encoder-regions": lambda: self._dual_encoder("dual-encoder-regions", StageName("labels")),
            "info-nce": lambda: StageName("evaluate-baseline"),
            "agcl": self._agcl_by_labels,
            "distilled": lambda: self._evaluation("evaluate-distilled", first, StageName("attributes", 0)),
            "more-distillation": lambda: self._fine_tuned("more-distillation", StageName("labels")),
            "rejection-sampling": self._rejection_sampling,
            "rl": lambda: self._round(0),
            "rl-queries": lambda: self._evaluation("evaluate-rl-queries", first, StageName("query-attributes", 0)),
            "cit-2": lambda: self._round(1),
            "cit-3": lambda: self._round(2),
            "cit-2-fewer-products": self._fewer_products,
            "oracle-input": lambda: self._evaluation("evaluate-oracle-input", first, oracle),
            "oracle": lambda: self._evaluation("evaluate-oracle", self._encoder("agcl-oracle", oracle), oracle),
            **{key: partial(self._piece, key) for key in PIECES},
        }

    def run(self, key: str) -> Stage:
        """The evaluation stage of a variant; its upstream stages are run first.

        Raises:
            ConfigError: the variant needs a dual encoder's checkpoint and there is none.
        """
        return self._pipeline.stage(self._declare[key]())

    def _encoder(self, name: str, attributes: StageName | None, changes: Mapping[str, Any] | None = None) -> StageName:
        config = self._pipeline.config
        return self._pipeline.add(encoder_spec(config, StageName(name), attributes=attributes, changes=changes))

    def _evaluation(
        self,
        name: str,
        encoder: StageName,
        attributes: StageName | None,
        changes: Mapping[str, Any] | None = None,
    ) -> StageName:
        spec = evaluation_spec(
            self._pipeline.config, StageName(name), encoder=encoder, attributes=attributes, changes=changes
        )
        return self._pipeline.add(spec)

    def _dual_encoder(self, key: str, attributes: StageName | None) -> StageName:
        if self._checkpoint is None:
            raise ConfigError(f"ablation study: variant {key} needs the checkpoint of a dual encoder")
        changes = {**_SETTINGS[key], "encoder.path": self._checkpoint}
        if self._pipeline.config.encoder.dual_encoder.boxes_column not in self._pipeline.catalogue.table.column_names:
            changes["encoder.dual_encoder.region_weight"] = 0.0
        return self._evaluation(f"evaluate-{key}", self._encoder(key, attributes, changes), None, changes)

    def _piece(self, key: str) -> StageName:
        attributes = StageName("oracle") if key in WITH_TRUE_ATTRIBUTES else pair_labels(self._pipeline)
        encoder = self._encoder(key, attributes, piece_settings(self._pipeline.config, key))
        return self._evaluation(f"evaluate-{key}", encoder, None)

    def _agcl_by_labels(self) -> StageName:
        """The loss alone: attributes determine weights and mask, and are in no input."""
        changes = {"agcl.attribute_dropout.query": 1.0, "agcl.attribute_dropout.positive": 1.0}
        encoder = self._encoder("agcl-labels", pair_labels(self._pipeline), changes)
        return self._evaluation("evaluate-agcl-labels", encoder, None)

    def _rejection_sampling(self) -> StageName:
        samples = best_samples_spec(self._pipeline.config, StageName("best-samples"))
        return self._fine_tuned("rejection-sampling", self._pipeline.add(samples))

    def _fine_tuned(self, key: str, labels: StageName) -> StageName:
        """The encoder as it is, with all items annotated by a generator that was fine-tuned instead of reinforced."""
        generator = self._pipeline.add(fine_tuning_spec(self._pipeline.config, StageName(key), labels))
        spec = self._pipeline.spec(StageName("attributes", 0))
        upstream = {**spec.upstream, "generator": generator}
        attributes = self._pipeline.add(replace(spec, name=StageName(f"{key}-attributes"), upstream=upstream))
        return self._evaluation(f"evaluate-{key}", StageName("agcl", 0), attributes)

    def _fewer_products(self) -> StageName:
        changes = {"agcl.train_fraction": self._train_fraction}
        encoder = self._encoder("agcl-r1-fewer-products", StageName("attributes", 1), changes)
        return self._evaluation("evaluate-r1-fewer-products", encoder, StageName("attributes", 2))

    def _round(self, number: int) -> StageName:
        """The round's evaluation. Its promotion is committed too; the study continues whatever it decides."""
        self._pipeline.stage(StageName("promotion", number))
        return StageName("evaluate", number)


def pair_labels(pipeline: Pipeline) -> StageName:
    """The stage with the teacher's attributes of all items of `agcl.pairs`: `labels` where it covers them."""
    config, catalogue = pipeline.config, pipeline.catalogue
    labelled = catalogue.rows_of_any(distillation_items(config))
    covered = np.isin(catalogue.rows_of_any(pair_items(config)), labelled).all()
    return StageName("labels" if covered else "labels-pairs")


def run_variants(
    config: Config, keys: Sequence[str], *, dual_encoder: str | None, train_fraction: float, command: str | None
) -> None:
    """Run variants in one run, in this process, and write the run's report.

    Args:
        command: command that makes all runs of the study, for the report; None = this process's own.
    """
    with open_run(config) as pipeline:
        record_whole(pipeline.run, command or own_command())
        pipeline.stage(StageName("baselines"))
        study = AblationStudy(pipeline, dual_encoder=dual_encoder, train_fraction=train_fraction)
        for key in keys:
            began = time.monotonic()
            stage = study.run(key)
            hit = stage.metrics["protocols"][config.evaluation.primary_protocol]["metrics"]["hit@1"]["mean"]
            log.info("variant %s: hit@1 %.1f %%, after %.0f s", key, 100 * hit, time.monotonic() - began)
        write_report(pipeline.run, items=pipeline.catalogue)


class RewardDepths:
    """RAR with recall@k as its reward, for several k and seeds, each from the start of the run's first round.

    Args:
        pipeline: pipeline of the run.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, config = pipeline, pipeline.config
        primary = next(p for p in config.evaluation.protocols if p.name == config.evaluation.primary_protocol)
        self._name = primary.name
        self._primary_alone = {
            "evaluation.protocols": [primary.model_dump(mode="json")],
            "cit.gate.protocols": [],
            "cit.selection_protocol": "",
        }

    def rar(self, k: int, seed: int) -> Stage:
        """The generator trained with recall@k; metric `zero_variance` is the mean fraction of such groups."""
        changes = {"run.seed": seed, "rar.reward.k": k, "rar.reward.kind": "recall"}
        name = StageName(f"depth-k{k}-s{seed}")
        spec = replace(
            self._pipeline.spec(StageName("rar", 0)), name=name, function=_rar_with_variance, changes=changes
        )
        return self._pipeline.stage(self._pipeline.add(spec))

    def attributes(self, rar: Stage) -> Stage:
        """Attributes of all items by the generator after a RAR."""
        spec = self._pipeline.spec(StageName("attributes", 0))
        upstream = {**spec.upstream, "generator": StageName(rar.name)}
        name = StageName(f"{rar.name}-attributes")
        return self._pipeline.stage(self._pipeline.add(replace(spec, name=name, upstream=upstream)))

    def query_attributes(self, rar: Stage, attributes: Stage) -> Stage:
        """Attributes after a RAR for the queries, those from before it for all other items."""
        spec = self._pipeline.spec(StageName("query-attributes", 0))
        upstream = {**spec.upstream, "queries": StageName(attributes.name)}
        name = StageName(f"{rar.name}-queries")
        spec = replace(spec, name=name, upstream=upstream, changes=self._primary_alone)
        return self._pipeline.stage(self._pipeline.add(spec))

    def hit_before(self) -> float:
        """hit@1 of the primary protocol with the attributes before RAR."""
        return self._hit("depth-before", StageName("attributes", 0))

    def hit(self, name: str, attributes: Stage) -> float:
        """hit@1 of the primary protocol with some attributes; `name` is that of the evaluation stage."""
        return self._hit(name, StageName(attributes.name))

    def _hit(self, name: str, attributes: StageName) -> float:
        spec = evaluation_spec(
            self._pipeline.config,
            StageName(name),
            encoder=StageName("agcl", 0),
            attributes=attributes,
            changes=self._primary_alone,
        )
        stage = self._pipeline.stage(self._pipeline.add(spec))
        return float(stage.metrics["protocols"][self._name]["metrics"]["hit@1"]["mean"])


def _rar_with_variance(context: StageContext) -> StageOutcome:
    """Trains the generator by GRPO, and counts the groups without variance."""
    outcome = rar_stage(context)
    steps = read_metrics(context.path("log"))
    outcome.metrics["zero_variance"] = statistics.fmean(step["reward/zero_variance_fraction"] for step in steps)
    return outcome


@contextmanager
def reward_depths(config: Config) -> Iterator[RewardDepths]:
    """Open the run and run its first round up to RAR."""
    with open_run(config) as pipeline:
        yield RewardDepths(pipeline)
