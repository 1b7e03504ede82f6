"""Settings of stage 2: GRPO of the generator, its rollouts and its reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from afmrl_ray.config.base import Section, merged
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.cluster import PoolConfig
from afmrl_ray.config.models import AdapterConfig, OptimizerConfig
from afmrl_ray.config.rar_presets import PRESETS, Preset


class RetrievalTask(Section):
    """The retrieval task that RAR is rewarded for."""

    query: ItemSelector = ItemSelector(split=("train",))
    """Query items, for which attributes are generated."""
    gallery: ItemSelector = ItemSelector(split=("train",))
    """Gallery items; the query item itself is excluded from its results."""
    heldout_query: ItemSelector = ItemSelector(split=("val",), role="query")
    """Query items that are never trained on, for the reward before and after."""
    heldout_gallery: ItemSelector = ItemSelector(split=("val", "train"))
    """Gallery items of the held-out queries."""
    gallery_with_attributes: bool = True
    """Embed gallery items with their attributes of this round."""


class RewardConfig(Section):
    """The reward service: frozen encoder and gallery behind Ray actors.

    Batching changes embeddings by rounding errors. With `batch_wait_ms` 0 and `cached_scores` 0 a score depends on its
    request alone.
    """

    runtime_only = frozenset(
        {
            "gallery_placement", "shared_prefix", "tokens_per_batch", "batch_wait_ms", "cached_scores", "max_in_flight",
            "start_timeout_s", "timeout_s", "max_retries", "backoff_s", "max_failed_fraction",
        }
    )  # fmt: skip

    kind: Literal["hit", "recall", "reciprocal_rank", "ndcg", "log_softmax"] = "recall"
    """Retrieval metric of the query with its attributes that is the reward: hit@k, recall@k, reciprocal rank of the
    first positive (at any depth), nDCG@k, or the log-probability of the positives under a softmax over the gallery
    (nats), which distinguishes completions of equal ranks."""
    k: int = Field(50, gt=0)
    """Rank up to which `hit`, `recall` and `ndcg` count, items."""
    temperature: float = Field(0.05, gt=0)
    """For kind `log_softmax`: divisor of the cosines in the softmax; the encoder's, see `agcl.temperature`."""
    duplicate_threshold: float | None = Field(None, ge=-1, le=1)
    """Cosine to a positive of the query above which a gallery item of another product, whose attributes in the
    catalogue equal the query's, is left out of the query's gallery as a known duplicate; null = none is."""
    invalid: float = -0.1
    """Reward of a completion that the parser rejects. For kind `log_softmax`, which has no smallest value, it is added
    to the lowest reward of the group's valid completions, or to that of chance, -log(gallery items), if there are
    none."""
    pool: PoolConfig = PoolConfig()
    """Reward actors; `batch_size` is the largest number of queries per request, an item's queries in one request."""
    gallery_placement: Literal["shared", "sharded"] = "shared"
    """`shared`: every actor maps the whole gallery, one copy per node; `sharded`: each actor holds a part of its rows,
    and counts are added up to the same ranks."""
    shared_prefix: bool = True
    """Encode the common prefix of an item's queries (image and title) once."""
    tokens_per_batch: int = Field(16384, gt=0)
    """Largest encoder batch, tokens including visual ones; requests are collected up to it."""
    batch_wait_ms: float = Field(3.0, ge=0)
    """Longest time that a request waits for others to share a batch, ms; 0 = no batching across requests."""
    cached_scores: int = Field(65536, ge=0)
    """Size of an actor's cache of scores, queries (least recently used are dropped); 0 = no cache."""
    max_in_flight: int = Field(8, gt=0)
    """Most requests that an actor handles at once, and that a client sends to it before replies; others wait."""
    start_timeout_s: float = Field(600, gt=0)
    """Time limit for all actors to start and load the encoder, seconds."""
    timeout_s: float = Field(120, gt=0)
    """Time limit of one request, seconds."""
    max_retries: int = Field(3, ge=0)
    """Retries of a failed request, each at another actor if there is one."""
    backoff_s: float = Field(0.2, ge=0)
    """Pause before the first retry, seconds; doubles with each retry up to 10 s, with a jitter of half to one and a
    half times."""
    max_failed_fraction: float = Field(0.1, ge=0, le=1)
    """Fraction of a step's rewards that may fail for reasons of infrastructure; above it the job fails."""

    @model_validator(mode="after")
    def _invalid_is_worse(self) -> RewardConfig:
        if self.kind == "log_softmax" and self.invalid >= 0:
            raise ValueError(
                f"invalid {self.invalid:g} is added to the lowest reward of a group's valid completions for kind "
                "log_softmax; use a negative one"
            )
        return self


class VLLMConfig(Section):
    """vLLM inside a rollout actor; its other arguments follow from the policy."""

    runtime_only = frozenset({"gpu_memory_utilization", "tensor_parallel_size", "enforce_eager"})

    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """Fraction of each GPU's memory that an actor uses; for actors that share a GPU the fractions must add up to at
    most 1."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs of a node that an actor splits the model over; if above 1, `rollout.pool.gpus_per_worker` must equal it."""
    enforce_eager: bool = False
    """Run without CUDA graphs: faster start, less memory, slower sampling."""


class RolloutConfig(Section):
    """Sampling of completions by Ray actors."""

    runtime_only = frozenset({"timeout_s", "max_restarts"})

    engine: Literal["transformers", "vllm"] = "transformers"
    """Sampling engine: `transformers`, on CPUs or GPUs; or `vllm`, on GPUs (`pip install .[vllm]`), for large models;
    its rollouts are a function of weights, prompt and seed only up to rounding."""
    vllm: VLLMConfig = VLLMConfig()
    """Settings of engine `vllm`."""
    pool: PoolConfig = PoolConfig(batch_size=8)
    """Rollout actors; `batch_size` is the number of prompts (groups) per call, of which vLLM needs many."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; log-probabilities are computed at this temperature."""
    timeout_s: float = Field(600, gt=0)
    """Time limit of one rollout call and of one push of weights, seconds."""
    max_restarts: int = Field(5, ge=0)
    """Dead actors that are replaced, in all; one more and the job fails."""

    @model_validator(mode="after")
    def _supported_by_vllm(self) -> RolloutConfig:
        if self.engine != "vllm":
            return self
        gpus, parallel = self.pool.gpus_per_worker, self.vllm.tensor_parallel_size
        if not 0 < gpus <= 1 if parallel == 1 else gpus != parallel:
            raise ValueError(
                f"rollout.engine vllm with vllm.tensor_parallel_size {parallel} does not run on {gpus:g} GPUs; set "
                f"rollout.pool.gpus_per_worker={parallel}{', or a fraction of one' if parallel == 1 else ''}"
            )
        if not 0.01 <= self.temperature <= 2:
            raise ValueError(
                f"rollout.temperature {self.temperature:g}: rollout.engine vllm samples at 0.01 to 2; use such a one"
            )
        return self


class GRPOConfig(Section):
    """Variants of GRPO's loss; the defaults are those of most trainers.

    Ratios of new to old policy differ from 1 with `updates_per_batch` above 1, or with stale rollouts and
    `old_logprobs` `sampler`; otherwise the settings that act on ratios have no effect beyond rounding.
    """

    runtime_only = frozenset({"entropy_every"})

    policy_loss: Literal["clip", "cispo"] = "clip"
    """`clip` = clipped surrogate; `cispo` = log-probabilities weighted by ratios that are bounded at 1 + epsilon_high,
    which keeps the gradient of every token (MiniMax-M1)."""
    loss_aggregation: Literal["token", "sequence", "constant"] = "token"
    """Loss of a step: `token` = mean over its tokens; `sequence` = mean over completions of the mean over their tokens;
    `constant` = sum over tokens / (completions * `generator.max_new_tokens`) (Dr. GRPO)."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """One ratio per token, or one per completion, the geometric mean of its tokens' ratios (GSPO)."""
    delta: float | None = Field(None, gt=1)
    """Upper bound of the ratio where the clip does not apply; none = no bound."""
    dual_clip: float | None = Field(None, gt=1)
    """Upper bound of the loss for negative advantages, as a multiple of minus the advantage; none = no bound."""
    old_logprobs: Literal["auto", "sampler", "learner"] = "auto"
    """Old log-probabilities, which ratios are relative to: the `sampler`'s, or those of the `learner` before the first
    update of a batch, and then tokens get truncated importance weights, learner over sampler (`tis_cap`). `auto` =
    `sampler`, for `max_staleness` above 0 `learner`."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL (Schulman 2020); in the loss, the gradient of k1 is zero on average."""
    kl_times_ratio: bool = False
    """Multiply the KL by the ratio, with its gradient."""
    kl_clamp: float | None = Field(10.0, gt=0)
    """Bound of the log-ratio of reference to policy in the estimator of the KL, nats, so that one token cannot make the
    loss explode; null = no bound."""
    kl_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of `kl_coef` over the steps: constant, or a decay to `kl_final_fraction` of it at the last step."""
    kl_final_fraction: float = Field(0.0, ge=0)
    """For `kl_schedule` `linear` and `cosine`: fraction of `kl_coef` at the last step; above 1 it rises."""
    entropy_coef: float = Field(0.0, ge=0)
    """Coefficient of the policy's entropy per token, which is subtracted from the loss; 0 = no bonus."""
    entropy_every: int = Field(10, ge=0)
    """Steps between measurements of the entropy (`actor/entropy`, nats per token); with a bonus every step has it;
    0 = never."""
    exclude_zero_variance: bool = False
    """Leave completions of groups whose rewards are all equal out of the loss and its denominators, KL included.
    Otherwise the more such groups there are, the smaller is the policy's gradient beside the KL's."""
    kl_in_reward: bool = False
    """Subtract the KL, summed over tokens, from a completion's reward instead of adding it to the loss."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """Baseline that is subtracted from a reward: mean of its group, or mean of the other rewards of its group."""
    mask_truncated_completions: bool = False
    """Exclude completions that did not end within `generator.max_new_tokens` from the loss; their rewards still count
    in their group's statistics."""


class RARConfig(Section):
    """Stage 2: GRPO of the generator, rewarded with the retrieval of the frozen encoder."""

    runtime_only = frozenset(
        {
            "tokens_per_microbatch", "shared_prompt", "rollout_logprob_diff_limit", "num_learners", "cpus_per_learner",
            "gpus_per_learner", "max_learner_restarts", "checkpoint_every", "gradient_cosine_every", "samples_every",
        }
    )  # fmt: skip

    preset: Preset | None = None
    """Published variant whose settings apply where the config does not set them: `grpo`, `dapo`, `dr_grpo`, `gspo` or
    `cispo`; null = the defaults below."""
    task: RetrievalTask = RetrievalTask()
    """The retrieval task."""
    steps: int = Field(200, gt=0)
    """Steps of a round, one batch of rollouts each."""
    updates_per_batch: int = Field(1, gt=0)
    """Optimizer updates per batch of rollouts. Each is made on one of `updates_per_batch / passes_per_batch`
    mini-batches of whole groups; the old log-probabilities are kept, so that ratios and clips act."""
    passes_per_batch: int = Field(1, gt=0)
    """Times that every mini-batch is trained on (TRL's `num_iterations`, verl's `ppo_epochs`)."""
    prompts_per_step: int = Field(32, gt=0)
    """Prompts (groups) per step."""
    group_size: int = Field(8, ge=2)
    """Completions per prompt."""
    tokens_per_microbatch: int = Field(16384, gt=0)
    """Prompt and completion tokens per forward pass of a learner; affects memory, not the result."""
    shared_prompt: Literal["auto", "on", "off"] = "auto"
    """Compute the prompt of a group once in the learners: `auto` = yes, unless a check of the first batch finds other
    log-probabilities; `on` = yes, and such a difference is an error; `off` = one row per completion."""
    epsilon: float = Field(0.2, gt=0, lt=1)
    """The ratio of new to old policy is clipped from below at 1 - epsilon; see `updates_per_batch`."""
    epsilon_high: float = Field(0.2, gt=0)
    """The ratio of new to old policy is clipped from above at 1 + epsilon_high; see
    `updates_per_batch`."""
    kl_coef: float = Field(0.001, ge=0)
    """Coefficient of the KL to the policy at the round's start; at 0 the reference model is not loaded."""
    scale_rewards: Literal["group", "batch", "none"] | None = None
    """Divisor of centred rewards: standard deviation of the group, of the batch, or 1 (`none`); null = `batch` for
    reward.kind `log_softmax`, whose small differences `group` would amplify, and `group` for the others."""
    advantage_eps: float = Field(1e-4, gt=0)
    """Added to that standard deviation."""
    grpo: GRPOConfig = GRPOConfig()
    """Variants of the loss."""
    rollout_logprob_diff_limit: float = Field(0.05, gt=0)
    """Largest mean difference of the sampler's and the learner's log-probabilities on fresh rollouts, nats per token;
    above it the job fails."""
    adapter: AdapterConfig = AdapterConfig(kind="full")
    """Which weights are trained; the default is all of the generator but its vision tower, see `train_vision`."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, schedule="constant")
    """Optimizer."""
    num_learners: int = Field(1, ge=0)
    """RLlib learners; 0 = one inside the driver's process. May be changed before a RAR is resumed."""
    cpus_per_learner: float = Field(1, gt=0)
    """CPUs of a learner, and its number of torch threads."""
    gpus_per_learner: float = Field(0, ge=0)
    """GPUs of a learner."""
    max_learner_restarts: int = Field(3, ge=0)
    """Deaths of learners in a RAR that are survived, by rebuilding all learners from the last checkpoint; one more and
    the job fails."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage of the learners."""
    rollout: RolloutConfig = RolloutConfig()
    """Rollout actors."""
    reward: RewardConfig = RewardConfig()
    """Reward service."""
    max_staleness: int = Field(0, ge=0, le=1)
    """Updates by which rollouts may be older than the policy that trains on them: 0 = none; 1 = the next step is
    sampled and scored during the update, and its tokens get truncated importance weights (`tis_cap`), see
    `grpo.old_logprobs`."""
    tis_cap: float = Field(2.0, ge=1)
    """Upper bound of the importance weight (learner over sampler) of a token, see `grpo.old_logprobs`."""
    dynamic_sampling_rounds: int = Field(0, ge=0)
    """Times per step that prompts whose completions all have the same reward are replaced by others; 0 = never."""
    checkpoint_every: int = Field(20, gt=0)
    """Steps between checkpoints."""
    gradient_cosine_every: int = Field(0, ge=0)
    """Steps between measurements of the cosine of the policy loss' gradients of the two halves of a batch's prompts
    (`actor/gradient_cosine`): near 0 the batch is too small for its noise. One costs as much as an update, and memory
    for two float32 copies of the gradient; 0 = never. Needs `zero_stage` below 3."""
    samples_every: int = Field(10, ge=0)
    """Steps between tables of rollouts with their rewards (Parquet, `samples/` of the stage); 0 = none."""
    heldout_samples: int = Field(4, gt=0)
    """Completions per held-out prompt for the reward before and after."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between evaluations of greedy completions of the held-out prompts; 0 = only before and after."""
    keep_best: bool = True
    """Whether the policy with the highest mean reward of those evaluations is the result, which may be the initial one;
    false = the last policy is."""
    patience: int | None = Field(None, gt=0)
    """Evaluations in a row without a higher reward after which training ends; null = it never ends early."""

    @property
    def reward_scaling(self) -> Literal["group", "batch", "none"]:
        """`scale_rewards`, or its default for the kind of reward."""
        return self.scale_rewards or ("batch" if self.reward.kind == "log_softmax" else "group")

    @property
    def minibatches(self) -> int:
        """Mini-batches that a batch of rollouts is split into."""
        return self.updates_per_batch // self.passes_per_batch

    @property
    def old_is_learner(self) -> bool:
        """Whether old log-probabilities are the learner's, see `grpo.old_logprobs`."""
        wanted = self.grpo.old_logprobs
        return wanted == "learner" or (wanted == "auto" and self.max_staleness > 0)

    @model_validator(mode="before")
    @classmethod
    def _preset_below_given(cls, values: Any) -> Any:
        """Settings of the preset where none are given; an unknown preset is left to the field's own check."""
        preset = values.get("preset") if isinstance(values, Mapping) else None
        if not isinstance(preset, str) or preset not in PRESETS:
            return values
        grpo = values.get("grpo")
        if isinstance(grpo, Section):
            values = {**values, "grpo": grpo.model_dump(exclude_unset=True)}
        return merged(PRESETS[preset], values)

    @model_validator(mode="after")
    def _whole_minibatches(self) -> RARConfig:
        if self.updates_per_batch % self.passes_per_batch:
            raise ValueError(
                f"updates_per_batch {self.updates_per_batch} does not divide by passes_per_batch "
                f"{self.passes_per_batch}; use a multiple, since every pass trains on every mini-batch"
            )
        if self.prompts_per_step % self.minibatches:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} does not divide by the {self.minibatches} mini-batches of "
                "updates_per_batch / passes_per_batch; use a multiple, so that no group is split"
            )
        return self

    @model_validator(mode="after")
    def _supported_together(self) -> RARConfig:
        if self.grpo.exclude_zero_variance and self.grpo.kl_in_reward:
            raise ValueError(
                "grpo.exclude_zero_variance leaves out groups of equal rewards, to which grpo.kl_in_reward would give "
                "different ones; use one of the two"
            )
        if self.gradient_cosine_every and self.zero_stage == 3:
            raise ValueError("gradient_cosine_every needs whole parameters, which zero_stage 3 shards; set it to 0")
        if self.gradient_cosine_every and self.prompts_per_step < 2:
            raise ValueError("gradient_cosine_every halves the prompts of a step; set prompts_per_step to 2 or more")
        return self

    @model_validator(mode="after")
    def _delta_above_the_clip(self) -> RARConfig:
        delta = self.grpo.delta
        if delta is not None and delta <= 1 + self.epsilon_high:
            raise ValueError(
                f"grpo.delta {delta:g} is not above 1 + epsilon_high; use more than {1 + self.epsilon_high:g}"
            )
        return self

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> RARConfig:
        if self.patience is not None and not self.evaluate_every:
            raise ValueError(f"patience {self.patience} counts evaluations; set evaluate_every to a number of steps")
        return self

    @model_validator(mode="after")
    def _even_shards(self) -> RARConfig:
        learners = max(1, self.num_learners)
        if self.prompts_per_step % learners:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} does not divide by num_learners {learners}; "
                "use a multiple, so that no group is split and no learner idles"
            )
        return self
