"""Embeddings of sequences with a common prefix equal those of the sequences alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afmrl_ray.config.models import EncoderConfig, ImageConfig
from afmrl_ray.models.backbones import load_backbone
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import collate
from afmrl_ray.models.prefix_groups import embed_groups, group_tokens, split_at_common_prefix
from afmrl_ray.models.shared_prefix import use_shared_prefix
from afmrl_ray.retrieval.embed import Encoder, EncoderRef
from tests.models.test_item_processor import noise

TEXTS = ["", "color: red", "color: red; shape: round", "color: blue", "material: steel; shape: oval; size: xl"]
SIZES = [None, (56, 56), (140, 70)]


@pytest.fixture(scope="module")
def loaded(tiny_checkpoints):
    path = tiny_checkpoints["encoder"]
    model = load_backbone(path, "encoder")
    plain = EmbeddingModel(load_backbone(path, "encoder")).eval()
    use_shared_prefix(model)
    return (
        plain,
        EmbeddingModel(model).eval(),
        ItemProcessor.from_pretrained(path, ImageConfig(min_pixels=784, max_pixels=20_000)),
    )


@pytest.mark.timeout(120)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.lists(
        st.tuples(
            st.sampled_from(SIZES), st.sampled_from(["", "mug", "new hot sale mug"]),
            st.lists(st.sampled_from(TEXTS), min_size=1, max_size=6),
        ),
        min_size=1, max_size=4,
    ),
    tokens=st.integers(20, 400),
)  # fmt: skip
def test_embeddings_of_random_groups_equal_those_of_padded_rows(loaded, groups, tokens):
    """Texts that are equal, one alone, items without an image, and cuts within a group."""
    plain, shared, processor = loaded
    rows = []
    for seed, (size, title, texts) in enumerate(groups):
        image = processor.visual(noise(*size, seed)) if size else None
        rows.append([processor.model_input(image, f"{title}\n{text}") for text in texts])
    with torch.no_grad():
        found = embed_groups(shared, rows, processor.pad_id, tokens=tokens)
        expected = plain(**collate([row for own in rows for row in own], processor.pad_id))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_prefix_is_common_to_all_and_each_continuation_has_a_token(loaded):
    processor = loaded[2]
    image = processor.visual(noise(60, 60))
    rows = [processor.model_input(image, f"mug\n{text}") for text in TEXTS]
    prefix, continuations = split_at_common_prefix(rows)
    for row, ids in zip(rows, continuations, strict=True):
        np.testing.assert_array_equal(np.concatenate([prefix.input_ids, ids]), row.input_ids)
        assert len(ids) > 0
    assert len({int(ids[0]) for ids in continuations}) > 1
    assert group_tokens(rows) == len(prefix) + sum(map(len, continuations)) < sum(map(len, rows))
    prefix, continuations = split_at_common_prefix([rows[0], rows[0]])
    assert [len(ids) for ids in continuations] == [1, 1]
    assert group_tokens(rows[:1]) == len(rows[0])


@pytest.mark.parametrize("cached", [False, True])
def test_an_item_is_embedded_as_without_sharing_and_its_image_passes_the_tower_once(
    tiny_checkpoints, tiny_catalogue_ref, tmp_path, monkeypatch, cached
):
    config = EncoderConfig(
        image={"min_pixels": 784, "max_pixels": 3136}, vision_cache={"enabled": cached, "folder": str(tmp_path)}
    )
    encoder = Encoder(EncoderRef(tiny_checkpoints["encoder"], config), tiny_catalogue_ref)
    encoder.share_prefixes()
    expected = encoder.embed([3] * 5 + [8] * 5, TEXTS * 2, inputs="both")
    tower, seen = encoder._model.backbone.model.visual, []
    tower.register_forward_hook(lambda _, __, kwargs, ___: seen.append(len(kwargs["grid_thw"])), with_kwargs=True)
    groups = [encoder.item_rows(row, TEXTS, inputs="both") for row in (3, 8)]
    np.testing.assert_allclose(encoder.embed_groups(groups, tokens=10_000), expected, atol=1e-5)
    assert sum(seen) == (0 if cached else 2)
    np.testing.assert_allclose(
        encoder.embed_each([row for own in groups for row in own], tokens=300), expected, atol=1e-5
    )
