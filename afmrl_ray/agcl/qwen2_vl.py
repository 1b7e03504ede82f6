"""Training of the Qwen2-VL encoder: the contrastive objective alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from afmrl_ray.agcl.batches import SampledItem
from afmrl_ray.agcl.contrastive import contrastive_loss
from afmrl_ray.agcl.encoder import StepInputs
from afmrl_ray.catalogue import StagedCatalogue
from afmrl_ray.config import Config
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.flops import EncoderFlops
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import ModelInput, collate
from afmrl_ray.models.prompts import encoder_input
from afmrl_ray.models.vision_cache import VisionCache
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.stopwatch import Stopwatch

_MIN_TEMPERATURE = 0.01


class TrainableQwen2VL:
    """A `TrainableEncoder` around a (PEFT-wrapped) `Qwen2VLForConditionalGeneration`.

    Args:
        config: the whole config.
        model: from `models.adapters.load_for_training`; make this before an engine shards its weights.
        processor: of its checkpoint.
        catalogue: where items come from.

    Raises:
        ConfigError: the vision cache is enabled and the vision tower is trained.
    """

    def __init__(self, config: Config, model: Any, processor: ItemProcessor, catalogue: StagedCatalogue) -> None:
        self._config, self._processor, self._catalogue = config, processor, catalogue
        self._learns_temperature = config.agcl.learn_temperature
        self.model = model
        self.module = EmbeddingModel(model, config.agcl.temperature if self._learns_temperature else None).train()
        cache = config.encoder.vision_cache
        self._cache = VisionCache(model, processor, cache) if cache.enabled else None
        self._flops = EncoderFlops(model)

    def prepare(
        self, step: int, items: Sequence[SampledItem], attributes: Sequence[str], *, queries: int
    ) -> tuple[list[ModelInput], dict[str, float]]:
        """See `TrainableEncoder.prepare`."""
        hits, misses = (self._cache.hits, self._cache.misses) if self._cache is not None else (0, 0)
        inputs = [
            encoder_input(
                self._processor,
                self._catalogue,
                item.row,
                config=self._config.encoder,
                inputs=item.selector.inputs,
                title_columns=item.selector.title_columns,
                attributes=text,
                cache=self._cache,
            )
            for item, text in zip(items, attributes, strict=True)
        ]
        metrics = {
            "data/tflop": self._flops.step(inputs) / 1e12,
            "data/visual_tokens": float(sum(int(each.token_types.sum()) for each in inputs)),
        }
        if self._cache is not None:
            hits, misses = self._cache.hits - hits, self._cache.misses - misses
            metrics["data/vision_cache_hit_fraction"] = hits / max(1, hits + misses)
        return inputs, metrics

    def embed(self, engine: Engine, inputs: Sequence[ModelInput]) -> Tensor:
        """[B, D] embeddings; with a learned temperature [B, D + 1], see `EmbeddingModel`."""
        return engine(**collate(inputs, self._processor.pad_id, engine.device))

    def loss(
        self, step: int, inputs: StepInputs[ModelInput], embeddings: Tensor, watch: Stopwatch
    ) -> tuple[Tensor, dict[str, float]]:
        """See `TrainableEncoder.loss`."""
        temperature = None
        if self._learns_temperature:
            temperature = embeddings[:, -1].mean().exp().clamp(min=_MIN_TEMPERATURE)
            embeddings = embeddings[:, :-1]
        return contrastive_loss(self._config.agcl, step, inputs, embeddings, watch, temperature=temperature)
