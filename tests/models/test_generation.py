from __future__ import annotations

import numpy as np
import pytest
import torch

from afmrl_ray.config.models import ImageConfig
from afmrl_ray.models.backbones import load_backbone
from afmrl_ray.models.generation import generate
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.logprobs import completion_batch, completion_logprobs, token_logprobs
from afmrl_ray.models.shared_prefix import Decoding, use_shared_prefix
from tests.models.test_item_processor import noise


@pytest.fixture(scope="module", params=["prompt repeated", "prompt shared"])
def generator(request, tiny_checkpoints):
    path = tiny_checkpoints["generator"]
    processor = ItemProcessor.from_pretrained(path, ImageConfig(min_pixels=28 * 28, max_pixels=84 * 84))
    model = load_backbone(path, "generator").eval()
    if request.param == "prompt shared":
        use_shared_prefix(model)
    return model, processor


@pytest.fixture(scope="module")
def prompts(generator):
    _, processor = generator
    sizes = [(60, 60), (90, 60), (84, 140)]
    return [processor.model_input(noise(*size, seed), "new mug " * (seed + 1)) for seed, size in enumerate(sizes)]


def test_sampled_logprobs_are_those_of_a_forward_pass(generator, prompts):
    model, processor = generator
    out = generate(model, processor, prompts, max_new_tokens=12, group_size=3, seeds=[1, 2, 3], temperature=0.8)
    completions = [ids[keep].numpy() for ids, keep in zip(out.ids, out.mask, strict=True)]
    repeated = [prompt for prompt in prompts for _ in range(3)]
    batch, mask = completion_batch(repeated, completions, processor.pad_id)
    with torch.no_grad():
        logp = completion_logprobs(model, batch, mask, forbidden_ids=processor.forbidden_ids, temperature=0.8)
    assert torch.equal(mask, out.mask[:, : mask.shape[1]])
    torch.testing.assert_close(logp, out.logp[:, : logp.shape[1]], atol=2e-5, rtol=1e-4)


def test_a_group_is_a_function_of_its_prompt_and_seed(generator, prompts):
    model, processor = generator
    together = generate(model, processor, prompts, max_new_tokens=10, group_size=2, seeds=[5, 6, 7])
    alone = generate(model, processor, prompts[1:2], max_new_tokens=10, group_size=2, seeds=[6])
    width = min(together.ids.shape[1], alone.ids.shape[1])
    assert torch.equal(together.ids[2:4, :width], alone.ids[:, :width])
    other = generate(model, processor, prompts[1:2], max_new_tokens=10, group_size=2, seeds=[8])
    assert not torch.equal(other.ids, alone.ids)


def test_greedy_decoding_takes_the_likeliest_token_of_every_step(generator, prompts):
    model, processor = generator
    out = generate(model, processor, prompts[:1], max_new_tokens=6)
    tokens: list[int] = []
    for expected in out.ids[0][out.mask[0]].tolist():
        batch, _ = completion_batch(prompts[:1], [np.array([*tokens, 0])], processor.pad_id)
        hidden = model.model(**batch).last_hidden_state[:, -2]
        logp = token_logprobs(model.lm_head(hidden), temperature=1.0, forbidden_ids=processor.forbidden_ids)
        assert int(logp.argmax()) == expected
        tokens.append(expected)


def test_special_tokens_are_never_sampled(generator, prompts):
    model, processor = generator
    out = generate(model, processor, prompts, max_new_tokens=16, group_size=8, seeds=[1, 2, 3], temperature=5.0)
    sampled = set(out.ids[out.mask].tolist())
    assert not sampled & set(processor.forbidden_ids)


def test_sampling_follows_the_distribution(generator, prompts):
    model, processor = generator
    out = generate(model, processor, prompts[:1], max_new_tokens=1, group_size=4000, seeds=[3])
    with torch.no_grad():
        batch, _ = completion_batch(prompts[:1], [np.array([0])], processor.pad_id)
        hidden = model.model(**batch).last_hidden_state[:, -2]
        expected = token_logprobs(model.lm_head(hidden), temperature=1.0, forbidden_ids=processor.forbidden_ids).exp()[
            0
        ]
    counts = torch.bincount(out.ids[:, 0], minlength=len(expected)) / 4000
    assert (counts - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_groups_without_seeds_are_refused(generator, prompts):
    model, processor = generator
    with pytest.raises(ValueError, match="pass seeds"):
        generate(model, processor, prompts, max_new_tokens=2, group_size=2)


def test_a_shared_prompt_draws_the_same_tokens_without_a_copy_for_each(tiny_checkpoints, prompts, monkeypatch):
    path = tiny_checkpoints["generator"]
    processor = ItemProcessor.from_pretrained(path, ImageConfig(min_pixels=28 * 28, max_pixels=84 * 84))
    model = load_backbone(path, "generator").eval()
    arguments = {"max_new_tokens": 14, "group_size": 5, "seeds": [4, 5, 6]}
    repeated = generate(model, processor, prompts, **arguments)
    held = []

    class Watched(Decoding):
        def __init__(self, cache, prompt_mask, **sizes):
            super().__init__(cache, prompt_mask, **sizes)
            held.append(cache.layers[0].keys.shape[0])

    monkeypatch.setattr("afmrl_ray.models.generation.Decoding", Watched)
    use_shared_prefix(model)
    shared = generate(model, processor, prompts, **arguments)
    assert held == [len(prompts)]
    assert torch.equal(shared.ids, repeated.ids)
    torch.testing.assert_close(shared.logp, repeated.logp, atol=2e-5, rtol=1e-4)


def test_generation_stops_at_max_separators_and_is_the_same_until_then(generator, prompts, monkeypatch):
    model, processor = generator
    settings = {"max_new_tokens": 24, "group_size": 4, "seeds": [1, 2, 3]}
    whole = generate(model, processor, prompts, **settings)
    # A random model rarely generates semicolons, so an eighth of the vocabulary takes their place.
    separators = list(range(0, len(processor.tokenizer), 8))
    assert ";" in processor.tokenizer.convert_ids_to_tokens(processor.separator_ids)
    monkeypatch.setitem(vars(processor), "separator_ids", separators)
    cut = generate(model, processor, prompts, **settings, max_separators=2)
    ended = 0
    for ids, keep, all_ids, all_keep in zip(cut.ids, cut.mask, whole.ids, whole.mask, strict=True):
        written, expected = ids[keep].tolist(), all_ids[all_keep].tolist()
        places = [place for place, token in enumerate(expected) if token in separators]
        ended += len(places) >= 2
        assert written == (expected[: places[1] + 1] if len(places) >= 2 else expected)
    assert 0 < ended < len(whole.ids)
