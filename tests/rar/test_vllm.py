"""The vLLM engine over vLLM itself, on a GPU; see test_vllm_engine.py for what needs neither."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ray
import torch

from afmrl_ray.config.models import AdapterConfig, TinyConfig
from afmrl_ray.config.rar import RolloutConfig
from afmrl_ray.models.logprobs import completion_batch
from afmrl_ray.models.prompts import generator_input
from afmrl_ray.models.tiny import build_generator, save_checkpoint, train_tokenizer
from afmrl_ray.rar.engine import engine_class
from afmrl_ray.rar.messages import Weights
from afmrl_ray.rar.weights import load_tensors, trained_tensors, weights_fingerprint

pytest.importorskip("vllm", reason="vLLM is not installed (pip install .[vllm]): ITS ENGINE IS NOT TESTED OVER IT")

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: THE vLLM ENGINE IS NOT TESTED OVER vLLM"),
]
ROWS, SEEDS, GROUP = [0, 3, 5], [11, 12, 13], 4
CONFIG = RolloutConfig(engine="vllm", pool={"gpus_per_worker": 1}, vllm={"gpu_memory_utilization": 0.3})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A generator whose heads are of a size that GPU kernels take."""
    config = TinyConfig(hidden_size=256, num_layers=2, num_heads=4, vision_width=256, vision_depth=2, patch_px=14)
    tokenizer = train_tokenizer(["color: red; pattern: striped", "new hot sale mug with handle"] * 30, 420)
    folder = str(tmp_path_factory.mktemp("generator"))
    save_checkpoint(build_generator(config, tokenizer, 0).to(torch.bfloat16), tokenizer, config, folder)
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_logprobs_are_those_of_the_policy_whose_weights_were_pushed(ray_local, policy_spec, checkpoint, kind):
    spec = replace(
        policy_spec,
        start=checkpoint,
        adapter=AdapterConfig(kind=kind, r=8),
        generator=policy_spec.generator.model_copy(update={"dtype": "bfloat16", "max_new_tokens": 32}),
        temperature=0.8,
    )
    policy = spec.load_policy().eval()
    torch.manual_seed(0)
    start = trained_tensors(policy)
    tensors = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in start.items()}
    weights = Weights(1, weights_fingerprint(tensors), [ray.put(tensors)])
    load_tensors(policy, tensors)

    engine = engine_class(CONFIG)(spec, CONFIG, 1)
    assert engine.set_weights(weights) == (1, weights.fingerprint)
    groups = engine.sample(ROWS, SEEDS, group_size=GROUP, version=1)
    again = engine.sample(ROWS, SEEDS, group_size=GROUP, version=1)
    assert [group.texts for group in groups] == [group.texts for group in again]

    processor, catalogue = spec.load_processor(), spec.catalogue.open()
    for group in groups:
        assert len({ids.tobytes() for ids in group.ids}) > 1
        assert not set(group.ids[group.mask].tolist()) & set(processor.forbidden_ids)
        prompt = generator_input(processor, catalogue, group.row, config=spec.generator)
        completions = [ids[keep] for ids, keep in zip(group.ids, group.mask, strict=True)]
        batch, mask = completion_batch([prompt] * GROUP, completions, processor.pad_id)
        with torch.no_grad():
            expected = policy(batch, mask, forbidden_ids=processor.forbidden_ids, temperature=spec.temperature)
        gap = (torch.from_numpy(group.logp)[:, : mask.shape[1]] - expected).abs()[mask]
        assert gap.mean() < 0.02
        assert gap.max() < 0.2
