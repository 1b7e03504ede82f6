"""Settings of the three trainings: distillation, AGCL and RAR."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from afmrl_ray.config.base import Section
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.cluster import PoolConfig, WorkersConfig
from afmrl_ray.config.models import AdapterConfig, OptimizerConfig

Enriched = Literal["none", "query", "both"]


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
    """BM25 weights of negatives, `w_ij = exp(1 + tanh(B_ij))`."""

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


class MaskConfig(Section):
    """Mask of probable false negatives."""

    enabled: bool = False
    """Whether probable false negatives are masked; false = only items of the positive's product are, which retrieved
    best wherever it was measured."""
    kind: Literal["candidate", "margin", "attributes"] = "candidate"
    """What a candidate is masked by: its similarity to the positive, its similarity to the query, or its attributes."""
    threshold: float = Field(0.9, ge=-1, le=1)
    """For kind `candidate` (delta in the paper): cosine to the positive above which a candidate is masked."""
    margin: float = 0.1
    """For kind `margin`: a candidate is masked if its cosine to the query exceeds the positive's by more than this."""
    attribute_threshold: float = Field(0.9, gt=0)
    """For kind `attributes`: a candidate is masked if its BM25 score exceeds this fraction of the positive's own."""
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
    """Fraction of a batch made of whole groups of products that agree in `column`; 0 = batches are uniform."""
    column: str = "category"
    """Column whose equal values put products into one group."""


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

    @property
    def selectors(self) -> list[ItemSelector]:
        """The selectors of all queries and positives."""
        return [selector for pair in self.pairs for selector in (pair.query, pair.positive)]


class RetrievalTask(Section):
    """The retrieval that RAR is rewarded for."""

    query: ItemSelector = ItemSelector(split=("train",))
    """Items for which attributes are generated."""
    gallery: ItemSelector = ItemSelector(split=("train",))
    """Items that are searched; the query's own is excluded."""
    heldout_query: ItemSelector = ItemSelector(split=("val",), role="query")
    """Items never trained on, for the reward before and after."""
    heldout_gallery: ItemSelector = ItemSelector(split=("val", "train"))
    """Items searched by the held-out queries."""
    gallery_with_attributes: bool = True
    """Whether the gallery is embedded with its attributes of this round."""


class RewardConfig(Section):
    """The reward service: frozen encoder and gallery behind Ray actors.

    Which queries go through the encoder together changes their embeddings by rounding. With `batch_wait_ms` and
    `cached_scores` 0 a score is a function of its request alone.
    """

    runtime_only = frozenset(
        {
            "gallery_placement", "shared_prefix", "tokens_per_batch", "batch_wait_ms", "cached_scores", "max_in_flight",
            "start_timeout_s", "timeout_s", "max_retries", "backoff_s", "max_failed_fraction",
        }
    )  # fmt: skip

    kind: Literal["hit", "recall", "reciprocal_rank", "ndcg"] = "recall"
    """Retrieval metric of the query with attributes: hit@k, recall@k, reciprocal rank of the first positive (at any
    depth), or nDCG@k."""
    k: int = Field(50, gt=0)
    """Depth of the retrieval."""
    invalid: float = -0.1
    """Reward of an output that the parser refuses."""
    pool: PoolConfig = PoolConfig()
    """Reward actors; `batch_size` counts the queries of a request, an item's together."""
    gallery_placement: Literal["shared", "sharded"] = "shared"
    """`shared`: every actor maps the whole gallery, one copy per node; `sharded`: each holds a share of its rows, and
    their counts add up to the same ranks."""
    shared_prefix: bool = True
    """Whether the encoder computes what the queries of an item begin with once."""
    tokens_per_batch: int = Field(16384, gt=0)
    """Tokens, visual ones counted, that requests are collected up to, and of one forward pass of the encoder."""
    batch_wait_ms: float = Field(3.0, ge=0)
    """Longest wait of a request for others to be encoded with, ms; 0 = each request by itself."""
    cached_scores: int = Field(65536, ge=0)
    """Latest scores that an actor keeps, so that it scores equal queries once; 0 = none."""
    max_in_flight: int = Field(8, gt=0)
    """Requests that an actor works on at once, and that a client has sent to it; further ones wait."""
    start_timeout_s: float = Field(600, gt=0)
    """Seconds that all actors may take to begin, with reading the encoder."""
    timeout_s: float = Field(120, gt=0)
    """Deadline of one request, from when it is sent."""
    max_retries: int = Field(3, ge=0)
    """Times that a failed request is sent again, to another actor if there is one."""
    backoff_s: float = Field(0.2, ge=0)
    """Pause before the first retry; doubles with each, up to 10 s, and is drawn from half to one and a half of it."""
    max_failed_fraction: float = Field(0.1, ge=0, le=1)
    """Share of a step's rewards that may fail for reasons of infrastructure before the job stops."""


class VLLMConfig(Section):
    """vLLM inside a rollout actor; what else it needs to know follows from the policy."""

    runtime_only = frozenset({"gpu_memory_utilization", "tensor_parallel_size", "enforce_eager"})

    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Share of each GPU's memory that an actor takes; actors that share a GPU must share this too."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of one node that an actor spreads the model over; then `rollout.pool.gpus_per_worker` is the same number."""
    enforce_eager: bool = False
    """Run without CUDA graphs: begins sooner, takes less memory, samples more slowly."""


class RolloutConfig(Section):
    """Sampling of completions by Ray actors."""

    runtime_only = frozenset({"timeout_s", "max_restarts"})

    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples: `transformers`, on CPUs or GPUs; or `vllm`, on GPUs (`pip install .[vllm]`), made for large models,
    whose rollouts are a function of weights, prompt and seed only up to rounding."""
    vllm: VLLMConfig = VLLMConfig()
    """For engine `vllm`."""
    pool: PoolConfig = PoolConfig(batch_size=8)
    """Rollout actors; `batch_size` counts prompts (groups) sampled at once, of which vLLM wants many."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; log-probabilities are those at this temperature."""
    timeout_s: float = Field(600, gt=0)
    """Deadline of one rollout call and of one weight push."""
    max_restarts: int = Field(5, ge=0)
    """Times that a dead actor is replaced before the job stops."""

    @model_validator(mode="after")
    def _within_what_vllm_takes(self) -> RolloutConfig:
        if self.engine != "vllm":
            return self
        gpus, parallel = self.pool.gpus_per_worker, self.vllm.tensor_parallel_size
        if not 0 < gpus <= 1 if parallel == 1 else gpus != parallel:
            raise ValueError(
                f"rollout.engine vllm with vllm.tensor_parallel_size {parallel} does not run on {gpus:g} GPUs; set "
                f"rollout.pool.gpus_per_worker={parallel}{', or a share of one' if parallel == 1 else ''}"
            )
        if not 0.01 <= self.temperature <= 2:
            raise ValueError(
                f"rollout.temperature {self.temperature:g}: rollout.engine vllm samples at 0.01 to 2; use such a one"
            )
        return self


class GRPOConfig(Section):
    """Readings of GRPO's loss; the defaults are what most trainers agree on."""

    loss_aggregation: Literal["token", "sequence", "constant"] = "token"
    """What the loss of a step is: the mean over its tokens, the mean over completions of the mean over their tokens, or
    the sum over tokens by a constant, completions times `generator.max_new_tokens` (Dr. GRPO)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Whether every token has its own ratio, or a completion the geometric mean of its tokens' (GSPO)."""
    delta: float | None = Field(None, gt=1)
    """Largest ratio where the clip does not hold, of either sign of the advantage; none = no cap."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the loss for negative advantages, times the advantage; none = no bound."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL; k1 gives the policy a gradient that is zero in the mean, see Schulman 2020."""
    kl_times_ratio: bool = False
    """Whether the KL is multiplied by the ratio, whose gradient then counts."""
    kl_in_reward: bool = False
    """Whether the KL is taken off a completion's reward, summed over its tokens, instead of being added to the loss."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is taken off a reward: its group's mean, or the mean of the others of its group."""
    mask_truncated_completions: bool = False
    """Whether completions that did not end within `generator.max_new_tokens` are left out of the loss; their rewards
    count in their group all the same."""


class RARConfig(Section):
    """Stage 2: GRPO of the generator, rewarded with the retrieval of the frozen encoder."""

    runtime_only = frozenset(
        {
            "tokens_per_microbatch", "shared_prompt", "rollout_logprob_diff_limit", "num_learners", "cpus_per_learner",
            "gpus_per_learner", "max_learner_restarts", "checkpoint_every",
        }
    )  # fmt: skip

    task: RetrievalTask = RetrievalTask()
    """What is retrieved."""
    steps: int = Field(200, gt=0)
    """Optimizer steps of a round; one per batch of rollouts."""
    prompts_per_step: int = Field(32, gt=0)
    """Groups per step."""
    group_size: int = Field(8, ge=2)
    """Completions per prompt."""
    tokens_per_microbatch: int = Field(16384, gt=0)
    """Prompt and completion tokens per forward pass of a learner; decides memory, never the result."""
    shared_prompt: Literal["auto", "on", "off"] = "auto"
    """Whether learners compute a group's prompt once: `auto` = unless a check of the first batch finds a difference,
    `on` = such a difference is an error, `off` = a row for each completion."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """Lower clip of the ratio: 1 - epsilon."""
    epsilon_high: float = Field(0.2, gt=0)
    """Upper clip of the ratio: 1 + epsilon_high."""
    kl_coef: float = Field(0.001, ge=0)
    """Weight of the KL to the policy at the round's start; 0 frees the reference model."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the group's deviation, the batch's, or nothing."""
    advantage_eps: float = Field(1e-4, gt=0)
    """Added to the deviation."""
    grpo: GRPOConfig = GRPOConfig()
    """Readings of the loss."""
    rollout_logprob_diff_limit: float = Field(0.05, gt=0)
    """Largest mean gap between the sampler's and the learner's log-probabilities of fresh rollouts."""
    adapter: AdapterConfig = AdapterConfig(kind="full")
    """What is trained; the paper fine-tunes the generator fully."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, schedule="constant")
    """Optimizer."""
    num_learners: int = Field(1, ge=0)
    """RLlib learners; 0 = one inside the driver's process. May be changed before a RAR is resumed."""
    cpus_per_learner: float = Field(1, gt=0)
    """CPUs of a learner; also its torch threads."""
    gpus_per_learner: float = Field(0, ge=0)
    """GPUs of a learner."""
    max_learner_restarts: int = Field(3, ge=0)
    """Deaths of learners in a RAR before it fails; each time all of them are made anew from the last checkpoint."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage inside the learners."""
    rollout: RolloutConfig = RolloutConfig()
    """Rollout actors."""
    reward: RewardConfig = RewardConfig()
    """Reward service."""
    max_staleness: int = Field(0, ge=0, le=1)
    """Updates by which rollouts may lag behind the policy that learns from them: 0 = none, 1 = the next step is sampled
    and scored while this one is learned, and its tokens are weighted for it (`tis_cap`)."""
    tis_cap: float = Field(2.0, ge=1)
    """Largest weight of a token whose sampler lags behind: the ratio of policy and sampler is cut off there."""
    dynamic_sampling_rounds: int = Field(0, ge=0)
    """Times per step that prompts whose completions all have the same reward make way for others; 0 = they stay."""
    checkpoint_every: int = Field(20, gt=0)
    """Steps between checkpoints."""
    heldout_samples: int = Field(4, gt=0)
    """Completions per held-out prompt for the reward before and after."""

    @model_validator(mode="after")
    def _a_bound_holds(self) -> RARConfig:
        cap = self.grpo.delta
        if cap is not None and cap <= 1 + self.epsilon_high:
            raise ValueError(f"grpo.delta {cap:g} is below 1 + epsilon_high; use more than {1 + self.epsilon_high:g}")
        return self

    @model_validator(mode="after")
    def _even_shards(self) -> RARConfig:
        learners = max(1, self.num_learners)
        if self.prompts_per_step % learners:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} does not divide among num_learners {learners}; "
                "use a multiple, so that no group is split and no learner idles"
            )
        return self
