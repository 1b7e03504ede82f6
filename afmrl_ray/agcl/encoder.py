"""The interface of encoders in training: everything that differs between their kinds; loop and step are shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from afmrl_ray.agcl.batches import SampledItem
from afmrl_ray.agcl.directions import RetrievalDirection
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.stopwatch import Stopwatch


class HasLength(Protocol):
    """A model input; its length is its number of tokens."""

    def __len__(self) -> int: ...


Input = TypeVar("Input", bound=HasLength)


@dataclass(frozen=True)
class StepInputs(Generic[Input]):
    """A step's inputs on one worker.

    Attributes:
        items: the items that this worker embeds: queries, positives, hard negatives.
        counts: how many of `items` are queries, positives and hard negatives.
        inputs: model inputs: one for each item, then those of the encoder's auxiliary objectives.
        parts: indices into `inputs` of each forward pass.
        query_to_positive: queries retrieve their positives.
        positive_to_query: positives retrieve their queries; none unless `agcl.bidirectional`.
        metrics: of the preparation, by their full names.
    """

    items: list[SampledItem]
    counts: list[int]
    inputs: list[Input]
    parts: list[list[int]]
    query_to_positive: RetrievalDirection
    positive_to_query: RetrievalDirection | None
    metrics: dict[str, float]


class TrainableEncoder(Protocol[Input]):
    """An encoder in training."""

    @property
    def model(self) -> Any:
        """The Hugging Face model, PEFT-wrapped or not, which is saved."""

    @property
    def module(self) -> nn.Module:
        """The module that the engine trains; its forward pass returns embeddings."""

    def prepare(
        self, step: int, items: Sequence[SampledItem], attributes: Sequence[str], *, queries: int
    ) -> tuple[list[Input], dict[str, float]]:
        """Model inputs of a step, and metrics about them; called in a thread while another step is trained.

        Args:
            step: number of the step.
            items: what this worker embeds, queries first.
            attributes: attribute text of each item, empty for those without attributes.
            queries: how many of the items are queries.

        Returns:
            One input for each item, then those of auxiliary objectives; and `data/...` metrics.
        """

    def embed(self, engine: Engine, inputs: Sequence[Input]) -> Tensor:
        """Forward pass of the engine over B inputs: [B, E] float32, whatever `loss` needs of each."""

    def loss(
        self, step: int, inputs: StepInputs[Input], embeddings: Tensor, watch: Stopwatch
    ) -> tuple[Tensor, dict[str, float]]:
        """This worker's loss, whose mean over the workers is that of the batch, and statistics of it.

        Args:
            step: number of the step.
            inputs: of the step.
            embeddings: [len(inputs.inputs), E] from `embed`, in the order of the inputs.
            watch: measures the time of collective calls as `gather`.
        """
