"""Repeated attribute names are forbidden while decoding, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from afmrl_ray.attributes.text import InvalidAttributes, format_attributes, parse_attributes
from afmrl_ray.config.models import ImageConfig, TinyConfig
from afmrl_ray.models.backbones import load_backbone
from afmrl_ray.models.generation import generate
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.logprobs import completion_batch, completion_logprobs
from afmrl_ray.models.packaged import resolve_checkpoint
from afmrl_ray.models.pretrain import pretrain
from afmrl_ray.models.shared_prefix import use_shared_prefix
from afmrl_ray.models.tiny import build_generator, save_checkpoint, train_tokenizer
from afmrl_ray.models.unique_names import NameTokens, UniqueNames
from tests.models.test_packaged import IMAGES, items

NAMES = ("color", "heel", "trim", "größe", "sleeve length")


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """A tiny generator that was taught lists whose names are drawn with replacement."""
    config = TinyConfig(hidden_size=48, num_layers=2, vision_width=32, vision_depth=2, patch_px=14, vocabulary=420)
    draw = np.random.default_rng(0)
    lists = [format_attributes((str(name), "red") for name in draw.choice(NAMES, size=4)) for _ in range(200)]
    tokenizer = train_tokenizer(lists * 3, config.vocabulary)
    folder = str(tmp_path_factory.mktemp("repeating"))
    model = build_generator(config, tokenizer, 0)
    save_checkpoint(model, tokenizer, config, folder)
    processor = ItemProcessor.from_pretrained(folder, ImageConfig(min_pixels=28 * 28, max_pixels=84 * 84))
    prompt = processor.model_input(None, "list")
    options = {"steps": 120, "batch_size": 24, "learning_rate": 5e-3, "seed": 0, "label": "lists"}
    pretrain(model, processor, lambda index: (prompt, lists[index]), len(lists), **options)
    return model.eval(), processor, prompt


def reasons(out, processor):
    parsed = [parse_attributes(text, max_attributes=12, complete=done) for text, done in out.texts(processor)]
    return [each.reason if isinstance(each, InvalidAttributes) else "" for each in parsed]


@pytest.mark.parametrize("shared", [False, True], ids=["prompt repeated", "prompt shared"])
def test_no_name_is_sampled_twice_and_logprobs_are_the_learners(repeating, shared):
    model, processor, prompt = repeating
    if shared:
        use_shared_prefix(model)
    arguments = {"max_new_tokens": 48, "group_size": 100, "seeds": [1, 2]}
    free = generate(model, processor, [prompt] * 2, **arguments)
    out = generate(model, processor, [prompt] * 2, **arguments, unique_names=True)
    assert reasons(free, processor).count("repeated_name") > 50
    assert "repeated_name" not in reasons(out, processor)

    completions = [ids[keep].numpy() for ids, keep in zip(out.ids, out.mask, strict=True)]
    batch, mask = completion_batch([prompt] * 200, completions, processor.pad_id)
    with torch.no_grad():
        logp = completion_logprobs(model, batch, mask, forbidden_ids=processor.forbidden_ids)
    torch.testing.assert_close(logp, out.logp[:, : logp.shape[1]], atol=2e-5, rtol=1e-4)


def test_stock_generation_with_the_processor_writes_the_same(repeating):
    model, processor, prompt = repeating
    names = UniqueNames(processor.name_tokens, 1)
    ours = generate(model, processor, [prompt], max_new_tokens=30, unique_names=True)
    theirs = model.generate(
        torch.from_numpy(prompt.input_ids)[None],
        max_new_tokens=30,
        do_sample=False,
        suppress_tokens=processor.forbidden_ids,
        logits_processor=LogitsProcessorList([names]),
    )
    written = ours.ids[0][ours.mask[0]].tolist()
    assert theirs[0, len(prompt) :][: len(written)].tolist() == written


def test_greedy_outputs_without_a_repetition_are_unchanged():
    path = resolve_checkpoint("package:small-generator")
    model, processor = load_backbone(path, "generator").eval(), ItemProcessor.from_pretrained(path, IMAGES)
    inputs = [processor.model_input(image, f"{text}\nList the key attributes.") for _, image, text in items(24, seed=5)]
    free = generate(model, processor, inputs, max_new_tokens=64)
    assert set(reasons(free, processor)) == {""}
    out = generate(model, processor, inputs, max_new_tokens=64, unique_names=True)
    assert torch.equal(out.ids, free.ids)
    assert torch.equal(out.logp, free.logp)


@pytest.fixture(scope="module")
def tokens(tiny_checkpoints):
    processor = ItemProcessor.from_pretrained(tiny_checkpoints["generator"], ImageConfig())
    return processor.tokenizer, NameTokens(processor.tokenizer)


def forbidden(tokens, text):
    """Whether each token of a text was forbidden where it stands."""
    tokenizer, table = tokens
    names, found = UniqueNames(table, 1), []
    for token in tokenizer(text)["input_ids"]:
        found.append(bool(names.forbid(torch.zeros(1, len(table.data)))[0, token] == -torch.inf))
        names.write([token])
    return found


WORDS = st.text(st.characters(exclude_characters=";:<|\ufffd", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS.filter(str.strip), min_size=2, max_size=5, unique_by=lambda w: " ".join(w.lower().split())))
def test_a_second_writing_is_caught_and_other_texts_are_free(tokens, words):
    # Distinct first letters: none begins with another one.
    names = [f"{place}{word}" for place, word in enumerate(words)]
    text = format_attributes((name, "a: b") for name in names)
    assert not any(forbidden(tokens, text))
    again = forbidden(tokens, f"{text}; {names[-2]}: c")
    assert any(again)


@pytest.mark.parametrize("text", ["size: a; size: b", "größe: a;größe: b", "a b: c; A  B : d", "x: 1; x <|: 2"])
def test_forms_of_a_repetition(tokens, text):
    assert isinstance(parse_attributes(text.replace("<|", ""), max_attributes=9), InvalidAttributes)
    assert any(forbidden(tokens, text))


def test_a_name_inside_one_token_is_seen():
    class Tokenizer:
        def get_added_vocab(self):
            return {}

        def get_vocab(self):
            return {token: index for index, token in enumerate(["size", ":", "Ġred", ";Ġsize:", "size:", ";", "s"])}

    names = UniqueNames(NameTokens(Tokenizer()), 1)
    for token in (0, 1):
        assert not torch.isinf(names.forbid(torch.zeros(1, 7))).any()
        names.write([token])
    names.write([2])
    assert torch.isinf(names.forbid(torch.zeros(1, 7)))[0].tolist() == [False, False, False, True, False, False, False]
    names.write([5])
    assert torch.isinf(names.forbid(torch.zeros(1, 7)))[0].tolist() == [True, False, False, True, True, False, False]
