"""Settings of distillation and of stage 1, AGCL."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from afmrl_ray.config.base import Section
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.cluster import WorkersConfig
from afmrl_ray.config.models import AdapterConfig, OptimizerConfig


class DistillConfig(Section):
    """Distillation: supervised fine-tuning of the generator on the teacher's attributes."""

    items: ItemSelector = ItemSelector(split=("train",))
    """Items that the teacher annotates."""
    steps: int = Field(500, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(32, gt=0)
    """Items per step, over all workers."""
    adapter: AdapterConfig = AdapterConfig(kind="full")
    """Trained parameters; the paper fine-tunes the whole generator."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5)
    """Optimizer and learning-rate schedule."""
    workers: WorkersConfig = WorkersConfig()
    """Ray Train worker group."""


class LexicalConfig(Section):
    """BM25 weights of negatives, `w_ij = exp(beta * (1 + tanh(B_ij)))`."""

    enabled: bool = True
    """Whether negatives are weighted; false = all weights are one (InfoNCE)."""
    positive_weight: Literal["bm25", "one"] = "bm25"
    """Weight of the positive: `bm25` = w_ii, as printed in the paper; `one` = 1, which up-weights hard negatives."""
    scale: Literal["raw", "self", "temperature"] = "raw"
    """Argument of tanh: `raw` = B_ij, `self` = B_ij / B_ii, `temperature` = B_ij / `temperature`."""
    temperature: float = Field(1.0, gt=0)
    """Divisor of B_ij for scale `temperature`."""
    idf: Literal["corpus", "batch"] = "corpus"
    """Texts that document frequencies are counted over: all items of `agcl.pairs`, or the candidates of the step."""
    idf_formula: Literal["rank_bm25", "lucene"] = "rank_bm25"
    """Weight of a term that n of N texts contain: `rank_bm25` = log((N - n + 0.5) / (n + 0.5)), a negative one replaced
    by a quarter of the mean; `lucene` = log(1 + (N - n + 0.5) / (n + 0.5)), which is never negative."""
    terms: Literal["words", "values", "pairs"] = "words"
    """Terms of an attribute text that BM25 counts: `words` of names and values, words of `values` only, or `pairs`,
    each of which, `name: value`, is one term."""
    beta: float = Field(1.0, ge=0)
    """Strength of the weights: exponent of w_ij; 1 = as printed in the paper, 0 = all weights are one."""


class MaskConfig(Section):
    """Mask of probable false negatives."""

    enabled: bool = False
    """Whether probable false negatives are masked; false = only items of the positive's product are, which retrieved
    best wherever it was measured."""
    kind: Literal["candidate", "margin", "attributes", "both", "column"] = "candidate"
    """What a candidate is masked by: its similarity to the positive, its similarity to the query, its attributes, or
    `both` its similarity to the positive and its attributes, each above its threshold; `column` = an equal value in
    `column`, where the catalogue knows better than `product_id` what is the same product."""
    column: str = "true_product_id"
    """Column with the true product: kind `column` masks by it, and the precision and recall of the other kinds are
    measured against it where the catalogue has it."""
    threshold: float = Field(0.9, ge=-1, le=1)
    """For kinds `candidate` (delta in the paper) and `both`: cosine to the positive above which a candidate is
    masked."""
    margin: float = 0.1
    """For kind `margin`: a candidate is masked if its cosine to the query exceeds the positive's by more than this."""
    attribute_threshold: float = Field(0.9, gt=0)
    """For kinds `attributes` and `both`: a candidate is masked if its BM25 score exceeds this fraction of the
    positive's own."""
    min_negatives: int = Field(8, ge=0)
    """Negatives that every query keeps; the least similar candidates are unmasked first."""
    warmup_steps: int = Field(0, ge=0)
    """Steps before the mask starts, since embeddings are not informative at first."""


class PairConfig(Section):
    """A source of positive pairs: two different items of one product."""

    query: ItemSelector = ItemSelector(split=("train",))
    """Items that are queries."""
    positive: ItemSelector = ItemSelector(split=("train",))
    """Items that are positives."""
    weight: float = Field(1.0, gt=0)
    """Weight of the source, relative to the other sources of a product's pairs."""


class BatchGroupingConfig(Section):
    """Batches with whole groups of similar products, whose items are hard negatives of one another."""

    fraction: float = Field(0.0, ge=0, le=1)
    """Fraction of a batch made of whole groups; 0 = batches are uniform."""
    by: Literal["column", "attributes"] = "column"
    """What makes products similar: an equal value of `column`, or attribute pairs in common, by BM25 of what most items
    of a product are described by. Groups by attributes are formed again in every epoch."""
    column: str = "category"
    """For `column`: column whose equal values put products into one group."""
    group_size: int = Field(8, gt=1)
    """For `attributes`: products in a group, a random one and those most similar to it."""
    max_similarity: float = Field(0.95, gt=0, le=1)
    """For `attributes`: a product is not grouped with the group's first one if their common pairs score above this
    fraction of the first one's own, since it is probably the same product under another id; 1 = no limit."""
    warmup_steps: int = Field(0, ge=0)
    """Steps with uniform batches before grouping starts, since uniform negatives teach enough at first."""


class MinedNegativesConfig(Section):
    """Hard negatives of a round from the gallery of the round before, with a margin against false negatives."""

    enabled: bool = False
    """Whether rounds after the first mine negatives, which take the place of the catalogue's column `negatives`;
    `agcl.hard_negatives` of them are used for each query. Scores every item of the gallery against every other."""
    count: int = Field(16, gt=0)
    """Negatives that are kept for an item, the most similar ones."""
    margin: float = Field(0.95, gt=0, le=1)
    """A negative's cosine is below this fraction of that of the item's least similar positive; items above it are
    probable false negatives."""


class AttributeDropoutConfig(Section):
    """Probability that a training item's attributes are left out of the encoder's input."""

    query: float = Field(0.3, ge=0, le=1)
    """Probability for a query."""
    positive: float = Field(0.3, ge=0, le=1)
    """Probability for a positive or a hard negative."""


class AGCLConfig(Section):
    """Stage 1: attribute-guided contrastive learning of the encoder."""

    pairs: tuple[PairConfig, ...] = (PairConfig(),)
    """Sources of positive pairs."""
    train_fraction: float = Field(1.0, gt=0, le=1)
    """Fraction of the products that are trained on, drawn by `run.seed`; the number of steps does not change."""
    steps: int = Field(1000, gt=0)
    """Optimizer steps of a round."""
    batch_size: int = Field(64, gt=1)
    """Pairs per step, over all workers; negatives come from all of them."""
    tokens_per_microbatch: int | None = Field(None, gt=0)
    """Visual and text tokens per forward pass of a worker, padding included; none = its whole batch at once. A limit
    saves memory and costs a second forward pass (GradCache); the result changes only by dropout's random numbers."""
    positives_per_query: int = Field(1, ge=1)
    """Positives of each query; the loss is the mean over them, and none is a negative of another."""
    hard_negatives: int = Field(0, ge=0)
    """Items named in the query's column `negatives` (item ids) that are added to the candidates, at most; the mask of
    false negatives does not apply to them."""
    mined_negatives: MinedNegativesConfig = MinedNegativesConfig()
    """Hard negatives that later rounds mine."""
    batch_grouping: BatchGroupingConfig = BatchGroupingConfig()
    """Groups of similar products in a batch."""
    temperature: float = Field(0.05, gt=0)
    """Divisor of the cosines; the initial value if `learn_temperature`."""
    learn_temperature: bool = False
    """Whether the temperature is learned; it stays at or above 0.01."""
    bidirectional: bool = True
    """Whether positives also retrieve their queries; the loss is then the mean of both directions."""
    lexical: LexicalConfig = LexicalConfig()
    """BM25 weights of negatives."""
    mask: MaskConfig = MaskConfig()
    """Mask of probable false negatives."""
    attribute_dropout: AttributeDropoutConfig = AttributeDropoutConfig()
    """Dropout of attributes from the encoder's input."""
    adapter: AdapterConfig = AdapterConfig()
    """Trained parameters; the paper uses LoRA."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-5)
    """Optimizer and learning-rate schedule."""
    workers: WorkersConfig = WorkersConfig()
    """Ray Train worker group."""

    @model_validator(mode="after")
    def _mined_negatives_are_used(self) -> AGCLConfig:
        if self.mined_negatives.enabled and not self.hard_negatives:
            raise ValueError("mined_negatives.enabled has no effect while hard_negatives is 0; set hard_negatives")
        return self

    @property
    def selectors(self) -> list[ItemSelector]:
        """The selectors of all queries and positives."""
        return [selector for pair in self.pairs for selector in (pair.query, pair.positive)]
