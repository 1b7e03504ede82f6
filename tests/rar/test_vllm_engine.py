"""The vLLM engine against a stand-in for vLLM: what it asks, what it makes of answers, how weights reach it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from afmrl_ray.config import load_config
from afmrl_ray.config.models import AdapterConfig
from afmrl_ray.config.rar import RolloutConfig
from afmrl_ray.errors import CheckpointError, ConfigError, WeightSyncError
from afmrl_ray.models.prompts import generator_input
from afmrl_ray.rar.engine import TransformersEngine, engine_class
from afmrl_ray.rar.messages import Weights
from afmrl_ray.rar.rollout import RolloutPool
from afmrl_ray.rar.vllm_requests import completion_seeds, prompt_of, sampling_options
from afmrl_ray.rar.vllm_weights import Trained
from afmrl_ray.rar.weights import trained_tensors, weights_fingerprint
from tests.rar import fake_vllm

ROWS, SEEDS, GROUP = [0, 3, 5], [11, 12, 13], 6
CONFIG = RolloutConfig(engine="vllm", pool={"gpus_per_worker": 1}, temperature=0.8)
LORA = AdapterConfig(kind="lora", r=4, alpha=16, rslora=True)


@pytest.fixture
def vllm_engine(monkeypatch):
    """The class, over the stand-in."""
    for name, module in fake_vllm.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "afmrl_ray.rar.vllm_engine", raising=False)
    monkeypatch.setattr(fake_vllm, "SCRIPT", {})
    yield engine_class(CONFIG)
    sys.modules.pop("afmrl_ray.rar.vllm_engine")


@pytest.fixture(params=["full", "lora"])
def spec(request, policy_spec):
    adapter = LORA if request.param == "lora" else policy_spec.adapter
    # Long enough for some to end by themselves.
    generator = policy_spec.generator.model_copy(update={"max_new_tokens": 64})
    return replace(policy_spec, adapter=adapter, generator=generator, temperature=0.8)


def moved(spec, version: int, seed: int = 0, size: float = 0.02) -> Weights:
    """Weights some way from the start."""
    torch.manual_seed(seed)
    start = trained_tensors(spec.load_policy())
    tensors = {name: tensor + size * torch.randn_like(tensor) for name, tensor in start.items()}
    return Weights(version, weights_fingerprint(tensors), [ray.put(tensors)])


def script(groups) -> None:
    """Let the stand-in draw what was drawn here."""
    for group, seed in zip(groups, SEEDS, strict=True):
        for one, ids, keep in zip(completion_seeds(seed, GROUP), group.ids, group.mask, strict=True):
            # What follows the end must not be sampled any more.
            fake_vllm.SCRIPT[one] = [*ids[keep].tolist(), 7]


@pytest.mark.ray
def test_groups_are_those_of_the_transformers_engine(ray_local, spec, vllm_engine):
    plain, engine = TransformersEngine(spec, CONFIG, 1), vllm_engine(spec, CONFIG, 1)
    for version in (0, 1):
        weights = moved(spec, version, seed=version)
        assert plain.set_weights(weights) == engine.set_weights(weights) == (version, weights.fingerprint)
        expected = plain.sample(ROWS, SEEDS, group_size=GROUP, version=version)
        script(expected)
        groups = engine.sample(ROWS, SEEDS, group_size=GROUP, version=version)
        assert {complete for group in groups for _, complete in group.texts} == {True, False}
        for group, other in zip(groups, expected, strict=True):
            assert (group.row, group.version, group.texts) == (other.row, other.version, other.texts)
            for name in ("ids", "mask", "logp"):
                ours, theirs = getattr(group, name), getattr(other, name)
                assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            np.testing.assert_array_equal(group.ids, other.ids)
            np.testing.assert_array_equal(group.mask, other.mask)
            np.testing.assert_allclose(group.logp, other.logp, atol=5e-5, rtol=1e-4)


@pytest.mark.ray
def test_greedy_completions_are_those_of_the_transformers_engine(ray_local, policy_spec, vllm_engine):
    generator = policy_spec.generator.model_copy(update={"max_new_tokens": 12})
    spec = replace(policy_spec, generator=generator, temperature=0.8)
    plain, engine = TransformersEngine(spec, CONFIG, 1), vllm_engine(spec, CONFIG, 1)
    weights = moved(spec, 0, size=0.3)
    for one in (plain, engine):
        one.set_weights(weights)
    expected = plain.sample(ROWS, None, group_size=1, version=0)
    groups = engine.sample(ROWS, None, group_size=1, version=0)
    assert [group.texts for group in groups] == [group.texts for group in expected]
    assert len({text for group in groups for text, _ in group.texts}) > 1


@pytest.mark.ray
def test_other_versions_and_weights_that_do_not_fit_are_refused(ray_local, spec, vllm_engine):
    engine = vllm_engine(spec, CONFIG, 1)
    with pytest.raises(WeightSyncError, match="asked for rollouts of version 0, the worker holds -1"):
        engine.sample(ROWS, SEEDS, group_size=GROUP, version=0)
    weights = moved(spec, 3)
    engine.set_weights(weights)
    with pytest.raises(WeightSyncError, match="asked for rollouts of version 4, the worker holds 3"):
        engine.sample(ROWS, SEEDS, group_size=GROUP, version=4)
    partial = dict(list(ray.get(weights.reference[0]).items())[1:])
    with pytest.raises(CheckpointError, match="1 names differ"):
        engine.set_weights(Weights(4, "", [ray.put(partial)]))
    engine._llm.resets = False
    with pytest.raises(WeightSyncError, match="did not reset its prefix cache"):
        engine.set_weights(moved(spec, 5))
    with pytest.raises(WeightSyncError, match="asked for rollouts of version 3, the worker holds -1"):
        engine.sample(ROWS, SEEDS, group_size=GROUP, version=3)


@pytest.mark.ray
def test_engine_options_follow_policy_and_config(ray_local, spec, vllm_engine):
    engine = vllm_engine(spec, CONFIG, 1)
    engine.set_weights(moved(spec, 0))
    first = engine._adapter
    engine.set_weights(moved(spec, 0, seed=1))
    options = engine._llm.options
    assert engine._llm.prefix_resets == 2
    assert options["max_model_len"] == spec.generator.max_prompt_tokens + spec.generator.max_new_tokens
    assert options["mm_processor_kwargs"] == {"min_pixels": 784, "max_pixels": 3136}
    assert options["logprobs_mode"] == "processed_logprobs"
    if spec.adapter.kind == "full":
        assert "enable_lora" not in options
        assert engine._adapter is None
        assert engine._llm.llm_engine.encoder_resets == 2
    else:
        assert options["max_lora_rank"] == 8
        assert engine._adapter.lora_int_id != first.lora_int_id
        assert not Path(first.lora_path).exists()


def test_the_image_of_a_prompt_is_the_one_that_the_tower_gets(policy_spec):
    processor, catalogue = policy_spec.load_processor(), policy_spec.catalogue.open()
    row = generator_input(processor, catalogue, 0, config=policy_spec.generator)
    prompt = prompt_of(row, processor.merge_size)
    (image,) = prompt["multi_modal_data"]["image"]
    again = processor.visual(image)
    assert again.grid == row.visuals[0].grid
    np.testing.assert_array_equal(again.patches, row.visuals[0].patches)
    dropped = int(row.token_types.sum()) - 1
    assert dropped > 0
    assert len(prompt["prompt_token_ids"]) == len(row) - dropped
    two = processor.model_input([image, image], "mug")
    placeholders = prompt_of(two, processor.merge_size)["prompt_token_ids"]
    assert placeholders.count(int(row.input_ids[row.token_types == 1][0])) == 2
    assert prompt_of(processor.model_input(None, "mug"), processor.merge_size).keys() == {"prompt_token_ids"}


def test_completion_seeds_of_nearby_groups_are_disjoint():
    seeds = [one for seed in range(50) for one in completion_seeds(seed, 8)]
    assert len(set(seeds)) == 400
    assert all(0 <= one < 2**63 for one in seeds)
    assert completion_seeds(9, 8)[:3] == completion_seeds(9, 3)


def test_forbidden_tokens_have_no_probability(policy_spec):
    processor = policy_spec.load_processor()
    options = sampling_options(processor, seed=1, max_new_tokens=5, temperature=0.5)
    assert sorted(options["logit_bias"]) == processor.forbidden_ids
    assert set(options["logit_bias"].values()) == {float("-inf")}
    assert options["stop_token_ids"] == [processor.end_id]


@pytest.mark.ray
def test_an_output_with_other_prompt_tokens_is_an_error(ray_local, policy_spec, vllm_engine):
    engine = vllm_engine(policy_spec, CONFIG, 1)
    engine.set_weights(moved(policy_spec, 0))
    fake_vllm.SCRIPT[completion_seeds(1, 1)[0]] = [7]
    engine._llm.options["mm_processor_kwargs"] = {"min_pixels": 6272, "max_pixels": 12544}
    with pytest.raises(RuntimeError, match="its processor makes other visual tokens of the image"):
        engine.sample([0], [1], group_size=1, version=0)


def test_unsupported_adapters_are_refused(policy_spec):
    vision = AdapterConfig(kind="lora", r=4, targets=r".*visual.*\.(q|k|v|gate|up|down)_proj")
    with pytest.raises(ConfigError, match="the vision tower is adapted"):
        Trained.of(replace(policy_spec, adapter=vision))
    with pytest.raises(ConfigError, match="DoRA"):
        Trained.of(replace(policy_spec, adapter=AdapterConfig(kind="lora", r=4, dora=True)))


def test_a_missing_vllm_gives_a_one_line_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install \.\[vllm\]") as caught:
        engine_class(CONFIG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "does not run on 0 GPUs"),
        (["rar.rollout.pool.gpus_per_worker=1", "rar.rollout.vllm.tensor_parallel_size=2"], "gpus_per_worker=2"),
        (["rar.rollout.pool.gpus_per_worker=0.5", "rar.rollout.temperature=3"], "samples at 0.01 to 2"),
        (["rar.rollout.pool.gpus_per_worker=1", "rar.adapter.kind=lora"], "set generator.dtype=bfloat16"),
        (["rar.rollout.pool.gpus_per_worker=1", "rar.adapter.kind=lora", "rar.adapter.dora=true"], "DoRA"),
    ],
)
def test_unsupported_settings_are_refused_when_the_config_is_read(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["rar.rollout.engine=vllm", *overrides])


class Broken(TransformersEngine):
    def __init__(self, *_):
        raise ConfigError("the engine is broken")


@pytest.mark.ray
@pytest.mark.timeout(60)
def test_an_engine_whose_constructor_raises_is_not_retried(ray_local, policy_spec):
    pool = RolloutPool(policy_spec, RolloutConfig(pool={"cpus_per_worker": 0.5}), engine=Broken)
    with pytest.raises(RuntimeError, match=r"cannot be made: .*the engine is broken"):
        pool.push(Weights(0, "", [ray.put({})]))
    assert pool.restarts == 0
    pool.close()
