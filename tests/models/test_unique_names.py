"""No attribute name is written twice, whatever the tokens that spell it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from afmrl_ray.attributes.text import InvalidAttributes, parse_attributes
from afmrl_ray.config.models import ImageConfig
from afmrl_ray.models.backbones import load_backbone
from afmrl_ray.models.generation import generate
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.packaged import resolve_checkpoint
from afmrl_ray.models.unique_names import TokenEnds, UniqueNames

TEXTS = "col|or|color| color|Color| |:|: |;|; |size| si|ze|red|a:b|x; co|".split("|")
ENDS = TokenEnds(TEXTS)


def written(tokens) -> UniqueNames:
    names = UniqueNames(ENDS, 1)
    for token in tokens:
        names.add([TEXTS.index(token)])
    return names


def forbidden(*tokens: str) -> set[str]:
    return {TEXTS[token] for token in written(tokens).forbidden().get(0, [])}


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((), set()),
        (("color",), set()),
        (("color", ":", "red"), set()),
        (("color", ":", "red", ";"), {"color", " color", "Color"}),
        (("Color", ":", "red", "; "), {"color", " color", "Color"}),
        (("col", "or", ":", "red", ";", " ", "col"), {"or"}),
        (("color", ": ", "red", ";", "size", ":", "red", "; ", " si"), {"ze"}),
        (("color", ":", "size", ";"), {"color", " color", "Color"}),
        (("color", ":", "red", "x; co"), set()),
    ],
)
def test_the_tokens_that_would_complete_a_used_name_are_forbidden(tokens, expected):
    assert forbidden(*tokens) == expected


@given(st.lists(st.integers(0, 2**16), min_size=1, max_size=40))
def test_no_completion_has_a_repeated_name(draws):
    """Any choice among the tokens that are left; tokens that hold several pairs are no attribute text of a model."""
    names, text = UniqueNames(ENDS, 1), ""
    usable = [index for index, token in enumerate(TEXTS) if token != "x; co"]
    for draw in draws:
        left = [index for index in usable if index not in names.forbidden().get(0, [])]
        token = left[draw % len(left)]
        names.add([token])
        text += TEXTS[token]
    found = parse_attributes(text, max_attributes=99)
    assert not (isinstance(found, InvalidAttributes) and found.reason == "repeated_name"), text


class Forgetful(nn.Module):
    """A head that writes `name: red;` again and again, with names at random whatever was written before."""

    def __init__(self, tokenizer) -> None:
        super().__init__()
        (names,) = ([tokenizer.encode(text)[0] for text in (" color", " pattern", " logo", " trim", " material")],)
        self._cycle = [names, *([tokenizer.encode(text)[0]] for text in (":", " red", ";"))]
        self._size, self._step = len(tokenizer), 0

    def forward(self, hidden):
        logits = torch.full((len(hidden), self._size), -20.0)
        logits[:, self._cycle[self._step % 4]] = 5.0
        self._step += 1
        return logits


def samples(*, unique_names: bool):
    path = resolve_checkpoint("package:small-generator")
    processor = ItemProcessor.from_pretrained(path, ImageConfig(min_pixels=12544, max_pixels=12544))
    model = load_backbone(path, "generator").eval()
    model.lm_head = Forgetful(processor.tokenizer)
    prompts = [processor.model_input(None, "red mug")] * 2
    out = generate(model, processor, prompts, max_new_tokens=20, group_size=8, seeds=[1, 2], unique_names=unique_names)
    return out, [parse_attributes(text, max_attributes=99) for text, _ in out.texts(processor)]


def test_samples_repeat_names_without_the_setting_and_never_with_it():
    _, repeating = samples(unique_names=False)
    _, unique = samples(unique_names=True)
    assert sum(getattr(each, "reason", "") == "repeated_name" for each in repeating) > 8
    assert all(len(each) == 5 for each in unique)


def test_log_probabilities_are_those_of_the_whole_distribution():
    """Each of five names has a fifth, although in the end only one may be chosen."""
    out, _ = samples(unique_names=True)
    names = out.logp[:, ::4]
    torch.testing.assert_close(names, torch.full_like(names, -1.6094), atol=1e-3, rtol=0)
