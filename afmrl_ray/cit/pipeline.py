"""The stages of a run and what each stands on; asking for one runs whatever it needs first.

Round r: attributes(r) -> agcl(r) -> gallery(r) -> rar(r) -> evaluate(r). The attributes of round r + 1 are what the
generator writes after the RAR of round r; evaluation of round r is done with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from afmrl_ray.catalogue import Catalogue, CatalogueRef, StagedCatalogue
from afmrl_ray.cit import stage_functions
from afmrl_ray.cit.evaluation import EvaluationInputs, baselines_stage, evaluate_stage, promotion_stage
from afmrl_ray.cit.index_stage import build_index_stage, index_gallery
from afmrl_ray.cit.mlflow_tracker import MLflowTracker
from afmrl_ray.cit.stages import Body, RunDirectory, Stage
from afmrl_ray.config import Config, with_values
from afmrl_ray.models.annotate import GeneratorRef
from afmrl_ray.rar.trainer import RARJob
from afmrl_ray.retrieval.embed import EncoderRef
from afmrl_ray.storage import absolute, is_dir

PLAIN_INFONCE: dict[str, Any] = {
    "agcl.lexical": {"enabled": False},
    "agcl.mask": {"enabled": False},
    "agcl.attribute_dropout.query": 1.0,
    "agcl.attribute_dropout.positive": 1.0,
}
"""Settings of a training without attributes, weights and mask; whole sections, as none of their fields counts then."""


class Pipeline:
    """All stages of one run.

    Args:
        config: the whole config.
        run: the run's directory, which must exist.
        given: the catalogue of `catalogue.path`, opened; none for the synthetic one.
        tracker: is told of every stage.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        given: Catalogue | None = None,
        tracker: MLflowTracker | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.tracker = tracker
        self._changes: dict[str, Any] = {}
        self.given = given
        self._done: dict[str, Stage] = {}

    def variant(self, changes: Mapping[str, Any]) -> Pipeline:
        """Stages of the same run with values at dotted keys changed.

        A stage tells those of its sections among its inputs; one that reads none of them is shared.

        Raises:
            ConfigError: see `config.with_values`.
        """
        found = Pipeline(with_values(self.config, changes), self.run, self.given, self.tracker)
        found._changes = {**self._changes, **changes}
        return found

    def _stage(self, name: str, inputs: dict[str, Any], body: Body, *, resumable: bool = False) -> Stage:
        """The stage, run or skipped once; what stands on it asks again and again."""
        if name not in self._done:
            self._done[name] = self.run.run_stage(name, inputs, body, resumable=resumable)
            if self.tracker is not None:
                self.tracker.stage(self._done[name])
        return self._done[name]

    def _inputs(self, sections: tuple[str, ...], *upstream: Stage | None, **more: Any) -> dict[str, Any]:
        dumped = {name: getattr(self.config, name).fingerprinted() for name in sections}
        changes = {key: value for key, value in self._changes.items() if key.split(".")[0] in sections}
        return {
            "config": dumped,
            "seed": self.config.run.seed,
            "upstream": {stage.name: stage.fingerprint for stage in upstream if stage is not None},
            **({"changes": changes} if changes else {}),
            **more,
        }

    @cached_property
    def catalogue_stage(self) -> Stage:
        """The catalogue as a file: the synthetic one made, or the given one checked."""
        config = self.config
        inputs: dict[str, Any]
        if self.given is None:
            inputs = {"synthetic": config.synthetic.fingerprinted()}
        else:
            inputs = {"fingerprint": self.given.fingerprint}
        return self._stage("catalogue", inputs, lambda at: stage_functions.catalogue_stage_fn(config, self.given, at))

    @cached_property
    def catalogue_ref(self) -> CatalogueRef:
        """The catalogue as workers open it."""
        path = absolute(self.config.catalogue.path or self.catalogue_stage.output("catalogue"))
        return CatalogueRef(path, self.config.catalogue, self.catalogue_stage.metrics["fingerprint"])

    @cached_property
    def catalogue(self) -> StagedCatalogue:
        return self.catalogue_ref.open()

    @cached_property
    def models_stage(self) -> Stage | None:
        """Tiny checkpoints, where a model has no path."""
        config = self.config
        if config.encoder.path is not None and config.generator.path is not None:
            return None
        inputs = self._inputs(
            ("tiny", "synthetic"),
            self.catalogue_stage,
            roles=[
                role
                for section, role in (("encoder", config.encoder.role), ("generator", "generator"))
                if getattr(config, section).path is None
            ],
            images=[config.encoder.image.model_dump(), config.generator.image.model_dump()],
            instructions=[config.encoder.instruction, config.generator.instruction],
        )
        return self._stage("models", inputs, lambda at: stage_functions.models_stage_fn(config, self.catalogue_ref, at))

    def _base(self, role: str) -> str:
        path = getattr(self.config, role).path
        if path is not None:
            # A folder's name is written into adapters, which are read from anywhere; a hub name stays as it is.
            return absolute(path) if is_dir(path) else path
        assert self.models_stage is not None
        return self.models_stage.output(role)

    @property
    def encoder_base(self) -> str:
        """Checkpoint of the encoder's backbone."""
        return self._base("encoder")

    @property
    def generator_base(self) -> str:
        """Checkpoint that the generator begins with."""
        return self._base("generator")

    @cached_property
    def labels(self) -> Stage:
        """The teacher's attributes of `distill.items`."""
        items = self.config.distill.items
        inputs = self._inputs(
            self._teacher_sections,
            self.catalogue_stage,
            items=items.fingerprinted(),
            max_attributes=self.config.generator.max_attributes,
        )
        return self._stage(
            "labels",
            inputs,
            lambda at: stage_functions.labels_stage_fn(self.config, self.catalogue_ref, [items], at),
            resumable=True,
        )

    @cached_property
    def pair_labels(self) -> Stage:
        """The teacher's attributes of all items of `agcl.pairs`: `labels` itself where it has them all."""
        sides = self.config.agcl.selectors
        labelled = self.catalogue.rows(self.config.distill.items)
        if np.isin(self.catalogue.rows_of_any(sides), labelled).all():
            return self.labels
        inputs = self._inputs(
            self._teacher_sections,
            self.catalogue_stage,
            sides=[side.fingerprinted() for side in sides],
            max_attributes=self.config.generator.max_attributes,
        )
        return self._stage(
            "labels-pairs",
            inputs,
            lambda at: stage_functions.labels_stage_fn(self.config, self.catalogue_ref, sides, at),
            resumable=True,
        )

    @property
    def _teacher_sections(self) -> tuple[str, ...]:
        return ("teacher", "generator") if self.config.teacher.kind == "model" else ("teacher",)

    @cached_property
    def distill(self) -> Stage:
        """The generator fine-tuned on the teacher's attributes."""
        inputs = self._inputs(("generator", "distill"), self.catalogue_stage, self.models_stage, self.labels)
        return self._stage(
            "distill",
            inputs,
            lambda at: stage_functions.distill_stage_fn(
                self.config, self.catalogue_ref, self.generator_base, self.labels.output("attributes"), at
            ),
            resumable=True,
        )

    @cached_property
    def oracle(self) -> Stage:
        """The true attributes (`annotate.ground_truth_column`) of the items that the generator would annotate."""
        annotate = self.config.annotate
        inputs = self._inputs(
            (), self.catalogue_stage, items=annotate.items.fingerprinted(), column=annotate.ground_truth_column
        )
        inputs["names"] = stage_functions.taught_names(self.config)
        return self._stage(
            "oracle", inputs, lambda at: stage_functions.oracle_stage_fn(self.config, self.catalogue_ref, at)
        )

    def _generator(self, path: str) -> GeneratorRef:
        return GeneratorRef(path, self.config.generator)

    def _encoder(self, stage: Stage) -> EncoderRef:
        return EncoderRef(stage.output("model"), self.config.encoder)

    def attributes(self, number: int) -> Stage:
        """Attributes by the generator as it is before round `number`."""
        before = self.rar(number - 1) if number else self.distill
        annotate = self.config.annotate
        inputs = self._inputs(("generator",), self.catalogue_stage, before, items=annotate.items.fingerprinted())
        inputs["truth"] = annotate.ground_truth_column
        return self._stage(
            f"attributes-r{number}",
            inputs,
            lambda at: stage_functions.attributes_stage_fn(
                self.config, self.catalogue_ref, self._generator(before.output("model")), before.fingerprint, at
            ),
        )

    @cached_property
    def baseline(self) -> Stage:
        """Plain InfoNCE on the backbone, without attributes."""
        return self.variant(PLAIN_INFONCE).encoder("baseline", None)

    def agcl(self, number: int) -> Stage:
        """The encoder trained with the attributes of round `number`."""
        previous = self.agcl(number - 1) if number and self.config.cit.init_from == "previous" else None
        share = self.config.cit.train_fraction if number else None
        return self.encoder(f"agcl-r{number}", self.attributes(number), previous=previous, train_fraction=share)

    def encoder(
        self,
        name: str,
        attributes: Stage | None,
        *,
        previous: Stage | None = None,
        train_fraction: float | None = None,
    ) -> Stage:
        """A training of the encoder.

        Args:
            name: of the stage.
            attributes: stage that wrote them, or none for training without attributes.
            previous: the encoder to go on from; none = the backbone.
            train_fraction: over `agcl.train_fraction`.
        """
        config = self.config
        inputs = self._inputs(("encoder", "agcl"), self.catalogue_stage, self.models_stage, attributes, previous)
        if train_fraction is not None:
            config = with_values(config, {"agcl.train_fraction": train_fraction})
            inputs["train_fraction"] = train_fraction
        return self._stage(
            name,
            inputs,
            lambda at: stage_functions.agcl_stage_fn(
                config,
                self.catalogue_ref,
                previous.output("model") if previous is not None else self.encoder_base,
                attributes.output("attributes") if attributes is not None else None,
                name,
                at,
            ),
            resumable=True,
        )

    def gallery(self, number: int) -> Stage:
        """Embeddings of the galleries that RAR searches."""
        agcl, attributes = self.agcl(number), self.attributes(number)
        task = self.config.rar.task.fingerprinted()
        inputs = self._inputs(("encoder",), self.catalogue_stage, agcl, attributes, task=task)
        return self._stage(
            f"gallery-r{number}",
            inputs,
            lambda at: stage_functions.gallery_stage_fn(
                self.config, self.catalogue_ref, self._encoder(agcl), attributes.output("attributes"), at
            ),
        )

    def rar(self, number: int) -> Stage:
        """The generator reinforced by the retrieval of round `number`'s encoder."""
        before = self.rar(number - 1) if number else self.distill
        agcl, gallery = self.agcl(number), self.gallery(number)
        inputs = self._inputs(("encoder", "generator", "rar"), self.catalogue_stage, before, agcl, gallery)
        return self._stage(
            f"rar-r{number}",
            inputs,
            lambda at: stage_functions.rar_stage_fn(self.config, self.rar_job(number, at)),
            resumable=True,
        )

    def rar_job(self, number: int, directory: str) -> RARJob:
        """What the RAR of a round starts from; stages that it needs are run."""
        before = self.rar(number - 1) if number else self.distill
        agcl, gallery = self.agcl(number), self.gallery(number)
        generator, encoder = self._generator(before.output("model")), self._encoder(agcl)
        return stage_functions.rar_job(self.catalogue_ref, generator, encoder, gallery, f"rar-r{number}", directory)

    def evaluate(self, number: int) -> Stage:
        """All protocols with the encoder of round `number` and the generator after its RAR."""
        agcl, attributes = self.agcl(number), self.attributes(number + 1)
        return self.evaluation(f"evaluate-r{number}", agcl, attributes)

    def attributes_of_queries(self, number: int) -> Stage:
        """Queries by the generator after the RAR of round `number`, the gallery as that RAR searched it."""
        before, after = self.attributes(number), self.attributes(number + 1)
        protocols = [protocol.model_dump(mode="json") for protocol in self.config.evaluation.protocols]
        inputs = self._inputs((), self.catalogue_stage, before, after, protocols=protocols)
        inputs["truth"] = self.config.annotate.ground_truth_column
        return self._stage(
            f"attributes-r{number}-queries",
            inputs,
            lambda at: stage_functions.query_attributes_stage_fn(self.config, self.catalogue_ref, before, after, at),
        )

    def promotion(self, number: int) -> Stage:
        """Whether round `number` is promoted, and what it gained on the round before; see `cit.promotion`."""
        last = self.promoted(number - 1) if number else None
        before = self.evaluate(number - 1) if number else None
        upstream = {stage.name: stage for stage in (last, before, self.evaluate(number)) if stage is not None}
        inputs = self._inputs((), *upstream.values(), gate=self.config.cit.gate.fingerprinted())
        if self.config.cit.selection_protocol:
            inputs["selection_protocol"] = self.config.cit.selection_protocol
        return self._stage(
            f"promotion-r{number}",
            inputs,
            lambda _: promotion_stage(self.config, last=last, before=before, now=self.evaluate(number)),
        )

    def promoted(self, number: int) -> Stage:
        """The evaluation of the last round that was promoted, up to round `number`."""
        while not self.promotion(number).metrics["promoted"]:
            number -= 1
        return self.evaluate(number)

    def evaluate_baseline(self) -> Stage:
        """All protocols with the baseline encoder, without attributes."""
        return self.evaluation("evaluate-baseline", self.baseline, None)

    def evaluation(self, name: str, encoder: Stage, attributes: Stage | None) -> Stage:
        """All protocols with an encoder and, where they ask for attributes and there are some, with attributes."""
        # What it writes is among its inputs, so that runs from before `failures` are measured again.
        outputs = ["examples", "failures", "per_query"]
        inputs = self._inputs(("encoder", "evaluation"), self.catalogue_stage, encoder, attributes, outputs=outputs)
        if attributes is not None:
            inputs["truth"] = self.config.annotate.ground_truth_column
        evaluation = EvaluationInputs(
            self.config,
            self.catalogue_ref,
            self._encoder(encoder),
            attributes.output("attributes") if attributes is not None else None,
        )
        return self._stage(name, inputs, lambda at: evaluate_stage(evaluation, at))

    def index(self, number: int) -> Stage:
        """What is served of round `number`: its encoder's index of the gallery, with the attributes after its RAR."""
        agcl, attributes = self.agcl(number), self.attributes(number + 1)
        gallery = index_gallery(self.config).fingerprinted()
        inputs = self._inputs(("encoder", "index"), self.catalogue_stage, agcl, attributes, gallery=gallery)
        return self._stage(
            f"index-r{number}",
            inputs,
            lambda at: build_index_stage(
                self.config, self.catalogue_ref, self._encoder(agcl), attributes.output("attributes"), at
            ),
        )

    @cached_property
    def floor(self) -> Stage:
        """Pixel baseline and chance."""
        inputs = self._inputs(("evaluation",), self.catalogue_stage)
        return self._stage("floor", inputs, lambda at: baselines_stage(self.config, self.catalogue_ref, at))
