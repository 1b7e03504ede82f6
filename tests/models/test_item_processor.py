from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from afmrl_ray.config.models import ImageConfig
from afmrl_ray.errors import CheckpointError
from afmrl_ray.models.backbones import check_checkpoint, load_backbone
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import append_completion, collate, mrope_positions

PIXELS = ImageConfig(min_pixels=28 * 28, max_pixels=84 * 84)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module", params=["encoder", "generator"])
def loaded(request, tiny_checkpoints):
    path = tiny_checkpoints[request.param]
    return load_backbone(path, request.param), ItemProcessor.from_pretrained(path, PIXELS)


def test_positions_equal_the_models_own(loaded):
    model, processor = loaded
    sizes = [(90, 90), (60, 150), (150, 100)]
    rows = [processor.model_input(noise(*size, seed), "new mug " * seed) for seed, size in enumerate(sizes)]
    rows.append(processor.model_input(None, "no image here"))
    batch = collate(rows, processor.pad_id)
    theirs, _ = model.model.get_rope_index(
        batch["input_ids"],
        mm_token_type_ids=batch["mm_token_type_ids"],
        image_grid_thw=batch["image_grid_thw"],
        attention_mask=batch["attention_mask"],
    )
    seen = batch["attention_mask"].bool()
    assert torch.equal(theirs[:, seen], batch["position_ids"][:, seen])


@given(
    text=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    grids=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4))),
)
@settings(max_examples=50, deadline=None)
def test_positions_of_several_images_never_overlap_and_text_continues_after_them(text, grids):
    text = (text * (len(grids) + 1))[: len(grids) + 1]
    types, patch_grids = [0] * (text[0] + 1), []
    for (rows, columns), gap in zip(grids, text[1:], strict=True):
        types += [1] * (rows * columns) + [0] * (gap + 1)
        patch_grids.append((1, 2 * rows, 2 * columns))
    positions = mrope_positions(np.array(types), patch_grids, 2)
    expected_last = sum(t + 1 for t in text) + sum(max(grid) for grid in grids) - 1
    assert (positions[:, -1] == expected_last).all()
    assert len({tuple(column) for column in positions.T}) == len(types)


@pytest.mark.parametrize("size", [(60, 60), (33, 190), (300, 120)])
@pytest.mark.parametrize("frames", [1, 2])
def test_pixels_are_those_of_the_stock_processor(loaded, size, frames):
    model, processor = loaded
    image = noise(*size, seed=3)
    stock = AutoImageProcessor.from_pretrained(model.name_or_path, backend="pil", temporal_patch_size=frames)
    processor = ItemProcessor(processor.tokenizer, stock, PIXELS)
    wanted = stock(
        images=[image],
        size={"shortest_edge": PIXELS.min_pixels, "longest_edge": PIXELS.max_pixels},
        return_tensors="pt",
    )
    row = processor.model_input(image, "mug")
    batch = collate([row, row], processor.pad_id)
    assert row.visuals[0].patches.dtype == np.uint8
    assert row.visuals[0].patches.size * frames == wanted["pixel_values"].numel()
    torch.testing.assert_close(
        batch["pixel_values"], torch.cat([wanted["pixel_values"].float()] * 2), atol=2e-6, rtol=0
    )
    assert torch.equal(batch["image_grid_thw"], torch.cat([wanted["image_grid_thw"]] * 2))


def test_a_padded_row_gives_the_same_states_as_alone(loaded):
    model, processor = loaded
    short, long = (
        processor.model_input(noise(60, 60), "mug"),
        processor.model_input(noise(100, 60), "new hot sale mug " * 4),
    )
    with torch.no_grad():
        together = model.model(**collate([short, long], processor.pad_id)).last_hidden_state[:, -1]
        alone = model.model(**collate([short], processor.pad_id)).last_hidden_state[:, -1]
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)


def test_length_from_the_header_is_the_length_of_the_input(loaded):
    _, processor = loaded
    for size in ((30, 40), (90, 90), (300, 120)):
        assert processor.length(size, "red mug") == len(processor.model_input(noise(*size), "red mug"))
    assert processor.length(None, "red mug") == len(processor.model_input(None, "red mug"))


def test_text_is_cut_to_the_limit_but_never_the_image(loaded):
    _, processor = loaded
    whole = processor.model_input(noise(84, 84), "word " * 200)
    cut = processor.model_input(noise(84, 84), "word " * 200, max_tokens=60)
    assert len(cut) == 60 < len(whole)
    assert cut.token_types.sum() == whole.token_types.sum() > 0
    np.testing.assert_array_equal(cut.input_ids[-3:], whole.input_ids[-3:])


def test_a_completions_positions_continue_the_prompts(loaded):
    _, processor = loaded
    prompt = processor.model_input(noise(84, 84), "mug")
    tokens = processor.completion_ids("color: red")
    joined = append_completion(prompt, tokens)
    np.testing.assert_array_equal(
        joined.positions[:, len(prompt) :], (prompt.positions.max() + 1 + np.arange(len(tokens)))[None].repeat(3, 0)
    )
    assert processor.decode(tokens.tolist()) == ("color: red", True)
    assert processor.decode(tokens[:-1].tolist()) == ("color: red", False)


def test_any_text_is_decoded_as_it_was_encoded(loaded):
    _, processor = loaded
    for text in ("köp nu!", "漢字 mug", "a;b:c\n"):
        assert processor.decode(processor.completion_ids(text).tolist())[0] == text


def test_a_wrong_architecture_and_a_missing_path_are_named(tiny_checkpoints, tmp_path):
    with pytest.raises(CheckpointError, match=r"generator.path: .* is qwen2_vl, the generator must be qwen2_5_vl"):
        check_checkpoint(tiny_checkpoints["encoder"], "generator")
    with pytest.raises(CheckpointError, match="does not exist"):
        check_checkpoint(str(tmp_path / "nothing"), "encoder")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        check_checkpoint(str(tmp_path), "encoder")
