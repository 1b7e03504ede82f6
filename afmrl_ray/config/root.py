"""The root of the config tree, and the checks between sections."""

from __future__ import annotations

import math

from pydantic import model_validator

from afmrl_ray.config.base import Section
from afmrl_ray.config.catalogue import CatalogueConfig, SyntheticConfig
from afmrl_ray.config.cit import AnnotateConfig, CITConfig
from afmrl_ray.config.cluster import RayConfig, RunConfig
from afmrl_ray.config.evaluation import EvaluationConfig
from afmrl_ray.config.index import IndexConfig
from afmrl_ray.config.models import EncoderConfig, GeneratorConfig, TinyConfig
from afmrl_ray.config.teacher import ColumnTeacherConfig, TeacherConfig
from afmrl_ray.config.tracking import TrackingConfig
from afmrl_ray.config.train import AGCLConfig, DistillConfig, RARConfig


class Config(Section):
    """All settings. Every job accepts the whole tree and reads the sections that it needs."""

    run: RunConfig = RunConfig()
    """Run: name, location and seed."""
    ray: RayConfig = RayConfig()
    """Connection to Ray."""
    catalogue: CatalogueConfig = CatalogueConfig()
    """Catalogue that is read."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """Synthetic catalogue, generated if `catalogue.path` is none."""
    tiny: TinyConfig = TinyConfig()
    """Tiny checkpoints, created for models whose path is none."""
    encoder: EncoderConfig = EncoderConfig()
    """Embedding encoder."""
    generator: GeneratorConfig = GeneratorConfig()
    """Attribute generator."""
    teacher: TeacherConfig = ColumnTeacherConfig()
    """Source of the distillation labels."""
    distill: DistillConfig = DistillConfig()
    """Distillation: SFT of the generator on the teacher's attributes."""
    annotate: AnnotateConfig = AnnotateConfig()
    """Annotation: attributes of the catalogue's items."""
    agcl: AGCLConfig = AGCLConfig()
    """Stage 1: attribute-guided contrastive learning of the encoder."""
    rar: RARConfig = RARConfig()
    """Stage 2: retrieval-aware attribute reinforcement of the generator."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation protocols."""
    cit: CITConfig = CITConfig()
    """Cyclic iterative training: rounds, promotion, stopping."""
    index: IndexConfig = IndexConfig()
    """Search index for serving."""
    tracking: TrackingConfig = TrackingConfig()
    """Experiment tracking."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Config:
        for name in ("distill", "agcl"):
            section = getattr(self, name)
            workers = section.workers
            if section.batch_size % workers.num_workers:
                raise ValueError(
                    f"{name}.batch_size {section.batch_size} does not divide among "
                    f"{name}.workers.num_workers {workers.num_workers}; use a multiple"
                )
            uneven = [count for count in range(workers.least, workers.num_workers) if section.batch_size % count]
            if uneven:
                raise ValueError(
                    f"{name}.batch_size {section.batch_size} does not divide among {uneven[-1]} workers, which "
                    f"{name}.workers.min_workers {workers.least} allows; use a multiple of "
                    f"{math.lcm(*range(workers.least, workers.num_workers + 1))}, or leave min_workers out"
                )
        return self

    @model_validator(mode="after")
    def _gate_protocols_exist(self) -> Config:
        measured = [protocol.name for protocol in self.evaluation.protocols]
        unknown = [name for name in self.cit.gate.protocols if name not in measured]
        if unknown:
            raise ValueError(
                f"cit.gate.protocols: {unknown[0]!r} is not a protocol of evaluation.protocols, which has: "
                f"{', '.join(measured)}"
            )
        return self

    @model_validator(mode="after")
    def _deciding_protocols_have_hit_at_1(self) -> Config:
        retrieval = {each.name: each for each in self.evaluation.protocols if each.kind == "retrieval"}
        selection_protocol = self.cit.selection_protocol
        if selection_protocol and selection_protocol not in retrieval:
            raise ValueError(
                f"cit.selection_protocol {selection_protocol!r} is not a retrieval protocol; "
                f"retrieval protocols: {', '.join(retrieval)}"
            )
        named = [
            ("evaluation.primary_protocol", self.evaluation.primary_protocol),
            ("cit.selection_protocol", selection_protocol),
        ]
        named += [("cit.gate.protocols", name) for name in self.cit.gate.protocols]
        for field, name in named:
            if name in retrieval and 1 not in retrieval[name].ks:
                raise ValueError(
                    f"evaluation.protocols: ks of {name!r} lacks 1, but {field} names it and uses its hit@1; add 1"
                )
        return self

    @model_validator(mode="after")
    def _rar_continues_the_adapter_of_distillation(self) -> Config:
        if self.distill.adapter.kind == "lora" and self.rar.adapter.kind == "full":
            raise ValueError(
                "rar.adapter.kind is full, but distill.adapter.kind lora produces an adapter; set both to the same kind"
            )
        return self

    @model_validator(mode="after")
    def _vllm_supports_the_adapter(self) -> Config:
        adapter = self.rar.adapter
        if self.rar.rollout.engine != "vllm" or adapter.kind != "lora":
            return self
        if adapter.dora:
            raise ValueError(
                "rar.adapter.dora: rar.rollout.engine vllm does not support DoRA; set one of them to its default"
            )
        if self.generator.dtype == "float32":
            raise ValueError(
                "rar.rollout.engine vllm supports adapters in 16 bits only; set generator.dtype=bfloat16, or "
                "rar.rollout.engine=transformers"
            )
        return self

    @model_validator(mode="after")
    def _vision_cache_needs_a_frozen_tower(self) -> Config:
        if not self.encoder.vision_cache.enabled:
            return self
        if self.agcl.adapter.kind == "full" and self.agcl.adapter.train_vision:
            raise ValueError(
                "encoder.vision_cache.enabled caches outputs of a frozen vision tower, but agcl.adapter.train_vision "
                "trains it; set one of them to false"
            )
        if self.agcl.workers.zero_stage == 3:
            raise ValueError(
                "encoder.vision_cache.enabled: agcl.workers.zero_stage 3 shards the vision tower, so no worker can run "
                "it alone; use zero_stage 2 or less"
            )
        return self

    @model_validator(mode="after")
    def _dual_encoder_supports_the_settings(self) -> Config:
        if self.encoder.kind != "dual_encoder":
            return self
        agcl = self.agcl
        unsupported = {
            "encoder.vision_cache.enabled=false": self.encoder.vision_cache.enabled,
            "agcl.lexical.enabled=false": agcl.lexical.enabled,
            "agcl.mask.enabled=false": agcl.mask.enabled,
            "agcl.learn_temperature=false": agcl.learn_temperature,
            "agcl.tokens_per_microbatch=null": agcl.tokens_per_microbatch is not None,
            "agcl.positives_per_query=1": agcl.positives_per_query != 1,
            "agcl.hard_negatives=0": agcl.hard_negatives != 0,
        }
        wrong = [setting for setting, is_set in unsupported.items() if is_set]
        if wrong:
            raise ValueError(
                f"encoder.kind dual_encoder has its own objectives (encoder.dual_encoder); set {' '.join(wrong)}"
            )
        return self
