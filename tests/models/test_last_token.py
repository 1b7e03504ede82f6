"""The last token's hidden state, and every gradient, are those of stock transformers' whole forward pass."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from afmrl_ray.config.models import AdapterConfig, ImageConfig
from afmrl_ray.models.adapters import make_trainable
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import collate
from tests.models.test_item_processor import noise


@pytest.fixture(scope="module")
def processor(tiny_checkpoints) -> ItemProcessor:
    return ItemProcessor.from_pretrained(tiny_checkpoints["encoder"], ImageConfig(min_pixels=784, max_pixels=6000))


def stock(path: str, kind: str):
    model = Qwen2VLForConditionalGeneration.from_pretrained(path, attn_implementation="sdpa")
    torch.manual_seed(0)
    model = make_trainable(model, AdapterConfig(kind=kind, train_vision=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradient of the other factor
            parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("padded", [True, False])
def test_embeddings_and_gradients_equal_those_of_the_whole_layer(tiny_checkpoints, processor, kind, padded):
    rows = [processor.model_input(noise(60, 60, seed), "mug " * (1 + 5 * seed * padded)) for seed in range(4)]
    batch = collate(rows, processor.pad_id)
    assert bool((batch["attention_mask"] == 0).any()) == padded
    found = []
    for ours in (True, False):
        model = stock(tiny_checkpoints["encoder"], kind)
        if ours:
            embeddings = EmbeddingModel(model)(**batch)
        else:
            inner = model.get_base_model() if kind == "lora" else model
            hidden = inner.model(**batch, use_cache=False).last_hidden_state[:, -1]
            embeddings = torch.nn.functional.normalize(hidden, dim=-1)
        weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1))
        (embeddings * weights).sum().backward()
        found.append((embeddings.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert found[0][1].keys() == found[1][1].keys() != set()
    for name, theirs in found[1][1].items():
        assert (found[0][1][name] - theirs).norm() <= 1e-5 * theirs.norm() + 1e-7, name


def test_fewer_flops_are_computed_and_the_model_is_restored(tiny_checkpoints, processor):
    model = stock(tiny_checkpoints["encoder"], "full")
    layers, seen = model.model.language_model.layers, []
    for layer in (layers[0], layers[-1]):
        layer.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    batch = collate([processor.model_input(noise(60, 60), "mug")], processor.pad_id)
    length = batch["input_ids"].shape[1]
    EmbeddingModel(model)(**batch)
    assert seen == [length, 1]
    hidden = model.model(**batch, use_cache=False).last_hidden_state
    assert hidden.shape[1] == length
    assert seen[2:] == [length, length]


def test_the_model_is_restored_after_a_failing_pass(tiny_checkpoints, processor):
    model = stock(tiny_checkpoints["encoder"], "full")
    layer = model.model.language_model.layers[-1]
    batch = collate([processor.model_input(noise(60, 60), "mug")], processor.pad_id)
    broken = {**batch, "input_ids": batch["input_ids"] + 10**6}
    with pytest.raises(IndexError):
        EmbeddingModel(model)(**broken)
    assert "forward" not in vars(layer)
