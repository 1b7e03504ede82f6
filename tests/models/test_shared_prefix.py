"""A packed sequence gives what rows of their own give: states, log-probabilities and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from afmrl_ray.config.models import AdapterConfig, ImageConfig
from afmrl_ray.models.adapters import load_for_training
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.logprobs import CompletionLogprobs, completion_batch
from afmrl_ray.models.model_input import collate, continuation
from afmrl_ray.models.shared_prefix import NAME, pack, use_shared_prefix

PIXELS = ImageConfig(min_pixels=784, max_pixels=20_000)
WORDS = ("red", "steel mug", "new hot sale", "striped")


def image(draw: np.random.Generator) -> Image.Image:
    width, height = draw.integers(28, 140, size=2)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def groups(processor: ItemProcessor, seed: int, sizes: list[tuple[int, list[int]]]):
    """Prompts with 0, 1 or 2 images, and completions of the given lengths."""
    draw = np.random.default_rng(seed)
    prompts, completions = [], []
    for images, lengths in sizes:
        text = " ".join(draw.choice(WORDS, size=draw.integers(0, 6)))
        prompts.append(processor.model_input([image(draw) for _ in range(images)], text))
        completions.append([draw.integers(20, 300, size=length) for length in lengths])
    return prompts, completions


def policies(path: str, role: str, kind: str) -> CompletionLogprobs:
    model = load_for_training(
        path, role, AdapterConfig(kind=kind, r=4, dropout=0.0, train_vision=kind == "full"), seed=3
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    use_shared_prefix(model)
    return CompletionLogprobs(model)


def both_ways(policy: CompletionLogprobs, processor: ItemProcessor, prompts, completions):
    """Log-probabilities and gradients of a weighted sum of them, from rows of their own and packed."""
    repeated = [prompt for prompt, own in zip(prompts, completions, strict=True) for _ in own]
    rows = completion_batch(repeated, [ids for own in completions for ids in own], processor.pad_id)
    packed = pack(prompts, completions, processor.pad_id)
    assert torch.equal(rows[1], packed.mask)
    found = []
    for batch, mask in (rows, (packed, packed.mask)):
        policy.zero_grad()
        logp = policy(batch, mask, forbidden_ids=processor.forbidden_ids, temperature=0.7)
        weights = torch.linspace(-1, 1, logp.numel()).reshape(logp.shape)
        (weights * logp).sum().backward()
        trained = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
        found.append((logp.detach(), trained))
    return found


def assert_equal(found) -> None:
    (plain, plain_gradients), (packed, packed_gradients) = found
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-5)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in plain_gradients.values())
    scale = max(gradient.norm() for gradient in plain_gradients.values() if gradient is not None)
    for name, gradient in plain_gradients.items():
        assert (packed_gradients[name] is None) == (gradient is None), name
        assert gradient is None or (packed_gradients[name] - gradient).norm() <= 1e-5 * scale, name


@pytest.fixture(scope="module")
def loaded(tiny_checkpoints):
    """Processor and policies by role and kind."""
    made = {
        (role, kind): policies(tiny_checkpoints[role], role, kind)
        for role in ("encoder", "generator")
        for kind in ("full", "lora")
    }
    processors = {role: ItemProcessor.from_pretrained(tiny_checkpoints[role], PIXELS) for role in tiny_checkpoints}
    return made, processors


@pytest.mark.timeout(200)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**16),
    sizes=st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(1, 9), min_size=1, max_size=5)), min_size=1, max_size=3
    ),
)
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("role", ["encoder", "generator"])
def test_logprobs_and_gradients_of_random_groups_equal_those_of_padded_rows(loaded, role, kind, seed, sizes):
    made, processors = loaded
    assert_equal(both_ways(made[role, kind].eval(), processors[role], *groups(processors[role], seed, sizes)))


SIZES = [(2, [5, 1, 7]), (0, [3, 3]), (1, [4, 9, 2, 6])]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_gradient_checkpointing_changes_nothing(tiny_checkpoints, kind):
    path = tiny_checkpoints["generator"]
    processor = ItemProcessor.from_pretrained(path, PIXELS)
    policy = policies(path, "generator", kind).train()
    policy.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(both_ways(policy, processor, *groups(processor, 1, SIZES)))


def test_the_head_in_chunks_changes_nothing(loaded, monkeypatch):
    from afmrl_ray.models import logprobs

    made, processors = loaded
    policy, processor = made["generator", "full"].eval(), processors["generator"]
    whole = both_ways(policy, processor, *groups(processor, 2, SIZES))[1]
    monkeypatch.setattr(logprobs, "_CHUNK", 7)
    assert_equal([whole, both_ways(policy, processor, *groups(processor, 2, SIZES))[1]])


def test_continuations_do_not_attend_to_each_other_or_to_other_prompts(loaded):
    made, processors = loaded
    policy, processor = made["generator", "full"].eval(), processors["generator"]
    prompts, completions = groups(processor, 4, SIZES)
    changed = [[ids.copy() for ids in own] for own in completions]
    changed[0][1][:] = 33
    with torch.no_grad():
        first, second = (
            policy(packed, packed.mask)
            for packed in (pack(prompts, own, processor.pad_id) for own in (completions, changed))
        )
    others = [k for k in range(len(first)) if k != 1]
    assert torch.equal(first[others], second[others])
    assert not torch.equal(first[1], second[1])


def test_a_packed_sequence_holds_every_prompt_and_image_once(loaded):
    _, processors = loaded
    prompts, completions = groups(processors["generator"], 5, SIZES)
    packed = pack(prompts, completions, processors["generator"].pad_id)
    assert len(packed) == sum(map(len, prompts)) + sum(len(ids) for own in completions for ids in own)
    assert len(packed.inputs["image_grid_thw"]) == 3
    ids = packed.inputs["input_ids"][0]
    assert torch.equal(ids[packed.places[packed.mask]], packed.tokens[packed.mask])
    ends = [int(packed.before[k, 0]) for k in (0, 3, 5)]
    assert [int(ids[end]) for end in ends] == [int(prompt.input_ids[-1]) for prompt in prompts]


def test_hidden_states_of_an_ordinary_batch_do_not_change(tiny_checkpoints):
    path = tiny_checkpoints["generator"]
    processor = ItemProcessor.from_pretrained(path, PIXELS)
    model = load_for_training(path, "generator", AdapterConfig(kind="full"), seed=0).eval()
    prompts, _ = groups(processor, 6, SIZES)
    batch = collate(prompts, processor.pad_id)
    with torch.no_grad():
        before = model.model(**batch).last_hidden_state
        use_shared_prefix(model)
        assert torch.equal(model.model(**batch).last_hidden_state, before)


def test_positions_of_a_continuation_follow_the_largest_of_the_prompt(loaded):
    _, processors = loaded
    prompt = processors["generator"].model_input([image(np.random.default_rng(0))], "")
    following = continuation(prompt, np.array([5, 6]))
    assert following.positions.tolist() == [[prompt.positions.max() + 1, prompt.positions.max() + 2]] * 3


def test_sliding_windows_are_refused(tiny_checkpoints):
    model = load_for_training(tiny_checkpoints["generator"], "generator", AdapterConfig(kind="full"), seed=0)
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="use_sliding_window"):
        use_shared_prefix(model)
    assert model.model.language_model.config._attn_implementation != NAME
