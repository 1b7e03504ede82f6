"""Stages of the experiments; no other experiment file uses a run's pipeline or its stage functions."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from afmrl_ray import storage
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.cit import stage_functions
from afmrl_ray.cit.driver import open_run, own_command, record_whole
from afmrl_ray.cit.evaluation import EvaluationInputs, evaluate_stage
from afmrl_ray.cit.pipeline import PLAIN_INFONCE, Pipeline
from afmrl_ray.cit.stages import Stage, StageOutcome
from afmrl_ray.config import Config, with_values
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.annotate import GeneratorRef
from afmrl_ray.report import write_report
from afmrl_ray.retrieval.embed import EncoderRef
from afmrl_ray.training.metrics_log import read_metrics
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
        values = {"encoder.path": pipeline.encoder_base, "generator.path": pipeline.generator_base}
        path, dual_encoder = pipeline.catalogue_ref.path, None
        if needs_dual_encoder(keys):
            name = f"{config.run.name}-dual-encoder"
            changes = {**_DUAL_ENCODER, **values, "encoder.path": None, "catalogue.path": path, "run.name": name}
            with open_run(with_values(config, changes)) as other:
                dual_encoder = other.encoder_base
        values["ray.address"] = ray.get_runtime_context().gcs_address
        yield SharedStart(values, dual_encoder, path, pipeline.catalogue)


class AblationStudy:
    """The variants of one seed.

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
        self._build: dict[str, Callable[[], Stage]] = {
            "dual-encoder": lambda: self._dual_encoder("dual-encoder", None),
            "dual-encoder-regions": lambda: self._dual_encoder("dual-encoder-regions", self._pipeline.labels),
            "info-nce": pipeline.evaluate_baseline,
            "agcl": self._agcl_by_labels,
            "distilled": lambda: pipeline.evaluation("evaluate-distilled", pipeline.agcl(0), pipeline.attributes(0)),
            "rl": lambda: self._round(0),
            "rl-queries": self._attributes_of_queries,
            "cit-2": lambda: self._round(1),
            "cit-3": lambda: self._round(2),
            "cit-2-fewer-products": self._fewer_products,
            "oracle-input": lambda: pipeline.evaluation("evaluate-oracle-input", pipeline.agcl(0), pipeline.oracle),
            "oracle": self._oracle_throughout,
        }

    def run(self, key: str) -> Stage:
        """The evaluation stage of a variant; its upstream stages are run first.

        Raises:
            ConfigError: the variant needs a dual encoder's checkpoint and there is none.
        """
        return self._build[key]()

    def _dual_encoder(self, key: str, attributes: Stage | None) -> Stage:
        if self._checkpoint is None:
            raise ConfigError(f"ablation study: variant {key} needs the checkpoint of a dual encoder")
        changes = {**_SETTINGS[key], "encoder.path": self._checkpoint}
        if self._pipeline.config.encoder.dual_encoder.boxes_column not in self._pipeline.catalogue.table.column_names:
            changes["encoder.dual_encoder.region_weight"] = 0.0
        variant = self._pipeline.variant(changes)
        return variant.evaluation(f"evaluate-{key}", variant.encoder(key, attributes), None)

    def _agcl_by_labels(self) -> Stage:
        """The loss alone: attributes determine weights and mask, and are in no input."""
        variant = self._pipeline.variant({"agcl.attribute_dropout.query": 1.0, "agcl.attribute_dropout.positive": 1.0})
        encoder = variant.encoder("agcl-labels", self._pipeline.pair_labels)
        return variant.evaluation("evaluate-agcl-labels", encoder, None)

    def _attributes_of_queries(self) -> Stage:
        pipeline = self._pipeline
        return pipeline.evaluation("evaluate-rl-queries", pipeline.agcl(0), pipeline.attributes_of_queries(0))

    def _fewer_products(self) -> Stage:
        pipeline = self._pipeline
        encoder = pipeline.encoder(
            "agcl-r1-fewer-products", pipeline.attributes(1), train_fraction=self._train_fraction
        )
        return pipeline.evaluation("evaluate-r1-fewer-products", encoder, pipeline.attributes(2))

    def _round(self, number: int) -> Stage:
        """The round's evaluation. Its promotion is committed too; the study continues whatever it decides."""
        self._pipeline.promotion(number)
        return self._pipeline.evaluate(number)

    def _oracle_throughout(self) -> Stage:
        pipeline = self._pipeline
        encoder = pipeline.encoder("agcl-oracle", pipeline.oracle)
        return pipeline.evaluation("evaluate-oracle", encoder, pipeline.oracle)


def run_variants(
    config: Config, keys: Sequence[str], *, dual_encoder: str | None, train_fraction: float, command: str | None
) -> None:
    """Run variants in one run, in this process, and write the run's report.

    Args:
        command: command that makes all runs of the study, for the report; None = this process's own.
    """
    with open_run(config) as pipeline:
        record_whole(pipeline.run, command or own_command())
        _ = pipeline.floor
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
        pipeline: pipeline of the run; its first round is run up to RAR.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        config = self._config = pipeline.config
        primary = [p for p in config.evaluation.protocols if p.name == config.evaluation.primary_protocol]
        self._evaluation = config.evaluation.model_copy(update={"protocols": tuple(primary)})
        self._measured = config.model_copy(update={"evaluation": self._evaluation})
        self._pipeline = pipeline
        agcl = pipeline.agcl(0)
        self._encoder = EncoderRef(agcl.output("model"), config.encoder)
        self._upstream = _fingerprints(agcl, pipeline.gallery(0))
        annotate = config.annotate
        self._annotated = {"items": annotate.items.fingerprinted(), "truth": annotate.ground_truth_column}

    def rar(self, k: int, seed: int) -> Stage:
        """The generator trained with recall@k; metric `zero_variance` is the mean fraction of such groups."""
        changes = {"run.seed": seed, "rar.reward.k": k, "rar.reward.kind": "recall"}
        config = with_values(self._config, changes)

        def function(directory: str) -> StageOutcome:
            outcome = stage_functions.rar_stage_fn(config, self._pipeline.rar_job(0, directory))
            steps = read_metrics(storage.join(directory, "log"))
            outcome.metrics["zero_variance"] = statistics.fmean(step["zero_variance_fraction"] for step in steps)
            return outcome

        inputs = {"upstream": self._upstream, "config": {"rar": config.rar.fingerprinted()}, "seed": seed}
        return self._pipeline.run.run_stage(
            f"depth-k{k}-s{seed}", {**inputs, "changes": changes}, function, resumable=True
        )

    def attributes(self, rar: Stage) -> Stage:
        """Attributes of all items by the generator after a RAR."""
        generator, reference = GeneratorRef(rar.output("model"), self._config.generator), self._pipeline.catalogue_ref
        return self._pipeline.run.run_stage(
            f"{rar.name}-attributes",
            {"upstream": _fingerprints(rar), **self._annotated},
            lambda at: stage_functions.attributes_stage_fn(self._config, reference, generator, rar.fingerprint, at),
        )

    def query_attributes(self, rar: Stage, attributes: Stage) -> Stage:
        """The same for queries, with the gallery as RAR searched it: with the attributes from before."""
        return self._pipeline.run.run_stage(
            f"{rar.name}-queries",
            {
                "upstream": _fingerprints(attributes),
                "evaluation": self._evaluation.fingerprinted(),
                **self._annotated,
            },
            lambda at: stage_functions.query_attributes_stage_fn(
                self._measured, self._pipeline.catalogue_ref, self._pipeline.attributes(0), attributes, at
            ),
        )

    def hit_before(self) -> float:
        """hit@1 of the primary protocol with the attributes from before RAR."""
        return self.hit("depth-before", self._pipeline.attributes(0))

    def hit(self, name: str, attributes: Stage) -> float:
        """hit@1 of the primary protocol with some attributes; `name` is that of the evaluation stage."""
        evaluation = EvaluationInputs(
            self._measured, self._pipeline.catalogue_ref, self._encoder, attributes.output("attributes")
        )
        upstream = {**self._upstream, **_fingerprints(attributes)}
        inputs = {"upstream": upstream, "evaluation": self._evaluation.fingerprinted()}
        stage = self._pipeline.run.run_stage(name, inputs, lambda at: evaluate_stage(evaluation, at))
        return float(stage.metrics["protocols"][self._evaluation.primary_protocol]["metrics"]["hit@1"]["mean"])


@contextmanager
def reward_depths(config: Config) -> Iterator[RewardDepths]:
    """Open the run and run its first round up to RAR."""
    with open_run(config) as pipeline:
        yield RewardDepths(pipeline)


def _fingerprints(*stages: Stage) -> dict[str, str]:
    """Fingerprints by name, as stages record their upstream stages."""
    return {stage.name: stage.fingerprint for stage in stages}
