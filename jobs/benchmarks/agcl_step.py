"""One training step of the encoder against sentence-transformers, and GradCache against the plain step.

Both sides have the same weights, token IDs and pixels; forward pass, loss, backward pass and optimizer are timed.
sentence-transformers' own losses and pooling run on `AutoModel`. Neither side's processor is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from afmrl_ray.agcl.batches import PairSampler
from afmrl_ray.agcl.directions import local_items
from afmrl_ray.agcl.gradcache import backward_in_parts
from afmrl_ray.agcl.loss import weighted_info_nce
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.microbatches import cut_by_tokens
from afmrl_ray.models.model_input import ModelInput, collate
from afmrl_ray.models.prompts import encoder_input
from jobs.benchmarks.harness import Comparison, compare, seconds
from jobs.benchmarks.tiny import Bench, make_bench

PAIRS, TEMPERATURE, PART = 64, 0.05, 16


class Side:
    """A model with its optimizer; `step` is one training step."""

    def __init__(self, model: nn.Module, backward: Callable[[nn.Module], None]) -> None:
        self._model, self._backward = model.train(), backward
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step(self) -> None:
        self._optimizer.zero_grad()
        self._backward(self._model)
        self._optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of a step by parameter name inside the backbone."""
        self.step()
        found = {}
        for name, parameter in self._model.named_parameters():
            for part in ("visual.", "language_model."):
                if part in name and parameter.grad is not None:
                    found[name[name.index(part) :]] = parameter.grad.clone()
        return found


def gap(ours: Side, theirs: Side) -> float:
    """Largest absolute difference of the gradients, relative to the largest gradient."""
    a, b = ours.gradients(), theirs.gradients()
    assert a.keys() == b.keys(), "the models have other parameters"
    largest = max(float(value.abs().max()) for value in b.values())
    return max(float((a[name] - b[name]).abs().max()) for name in b) / largest


def ours(bench: Bench, rows: list[ModelInput], pad: int, part_tokens: int | None) -> Side:
    parts = cut_by_tokens([len(row) for row in rows], part_tokens) if part_tokens else [list(range(len(rows)))]
    index = torch.arange(len(rows) // 2)

    def loss(embeddings: Tensor) -> tuple[Tensor, None]:
        queries, positives = embeddings.chunk(2)
        return weighted_info_nce(queries @ positives.T, index, temperature=TEMPERATURE)[0], None

    def backward(model: nn.Module) -> None:
        backward_in_parts(
            lambda wanted: model(**collate([rows[row] for row in wanted], pad)),
            parts,
            loss,
            lambda value, last: value.backward(),
        )

    return Side(EmbeddingModel(bench.model()), backward)


def sentence_transformers(bench: Bench, rows: list[ModelInput], pad: int, part: int | None) -> Side:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from transformers import AutoModel

    class Backbone(nn.Module):
        """`AutoModel` in place of sentence-transformers' wrapper of it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(bench.checkpoint, attn_implementation="sdpa")

        def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
            features["token_embeddings"] = self.model(**features, use_cache=False).last_hidden_state
            return features

    model = SentenceTransformer(
        modules=[Backbone(), Pooling(bench.config.tiny.hidden_size, "lasttoken"), Normalize()], device="cpu"
    )
    scale = 1 / TEMPERATURE
    loss = (
        losses.MultipleNegativesRankingLoss(model, scale=scale)
        if part is None
        else losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=part)
    )
    half = len(rows) // 2

    def features(own: list[ModelInput]) -> dict[str, Tensor]:
        # Without positions: the model computes them, as it does from the output of their processor.
        return {name: value for name, value in collate(own, pad).items() if name != "position_ids"}

    def backward(model: nn.Module) -> None:
        loss([features(rows[:half]), features(rows[half:])], torch.zeros(0)).backward()

    return Side(model, backward)


def comparisons() -> list[Comparison]:
    """Time the plain and the GradCache step.

    Raises:
        AssertionError: gradients of two implementations differ.
    """
    torch.manual_seed(0)
    bench = make_bench(PAIRS, 4 * PAIRS)
    catalogue, processor = bench.catalogue, bench.processor()
    sampler = PairSampler(catalogue, bench.config.agcl, seed=0)
    items, _ = local_items(sampler.batch(0))
    rows = [encoder_input(processor, catalogue, item.row, config=bench.config.encoder, inputs="both") for item in items]
    pad, longest = processor.pad_id, max(len(row) for row in rows)
    plain, cached = ours(bench, rows, pad, None), ours(bench, rows, pad, PART * longest)
    sizes = f"{PAIRS} pairs, {sum(map(len, rows))} tokens"
    difference = gap(cached, plain)
    assert difference < 1e-4, f"GradCache is not exact: {difference:g}"
    found = [
        compare(
            f"GradCache step, {sizes}, parts of {PART}",
            "our plain step",
            seconds(cached.step),
            seconds(plain.step),
            target=1.45,
            equality=f"gradients equal within {difference:.0e}",
        )
    ]
    if importlib.util.find_spec("sentence_transformers"):
        for what, mine, part, target in (("plain", plain, None, 1.0), ("cached", cached, PART, 0.8)):
            theirs = sentence_transformers(bench, rows, pad, part)
            difference = gap(mine, theirs)
            assert difference < 1e-4, f"gradients differ from those of sentence-transformers: {difference:g}"
            found.append(
                compare(
                    f"training step, {what}, {sizes}",
                    f"sentence-transformers {what}",
                    seconds(mine.step),
                    seconds(theirs.step),
                    target=target,
                    equality=f"gradients equal within {difference:.0e}",
                )
            )
    return found
