"""Embeddings and annotations by Ray Data actors equal those of the plain code, in the requested order."""

from __future__ import annotations

import numpy as np
import pytest

from afmrl_ray.attributes.store import AttributeRow, write_attributes
from afmrl_ray.config.cluster import PoolConfig
from afmrl_ray.config.models import EncoderConfig, GeneratorConfig
from afmrl_ray.models.annotate import Annotator, GeneratorRef, annotate_rows
from afmrl_ray.retrieval.embed import Encoder, EncoderRef, View, embed_rows, load_embeddings, save_embeddings

IMAGE = {"min_pixels": 784, "max_pixels": 3136}
POOL = PoolConfig(num_workers=2, cpus_per_worker=0.5, batch_size=4)
ROWS = np.array([30, 2, 17, 5, 41, 9, 8, 0, 1])


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_embeddings_of_several_views_keep_the_requested_order_and_use_the_stored_attributes(
    ray_local, tiny_checkpoints, tiny_catalogue_ref, tmp_path
):
    items = tiny_catalogue_ref.open().column("item_id")
    store = str(tmp_path / "attributes.parquet")
    write_attributes(store, [AttributeRow(items[row], f"color: red; size: {row}") for row in ROWS[:5]], fingerprint="g")
    encoder = EncoderRef(tiny_checkpoints["encoder"], EncoderConfig(image=IMAGE))
    with_attributes, bare, images = (
        View("both", ("title",), True), View("both", ("title",), False), View("image", ("title",), False)
    )  # fmt: skip
    wanted = {with_attributes: ROWS, images: ROWS[2:5], bare: ROWS[::-1]}
    embedded = embed_rows(wanted, encoder, tiny_catalogue_ref, attributes=store, pool=POOL)
    found = embedded[with_attributes]
    texts = [f"color: red; size: {row}" if index < 5 else "" for index, row in enumerate(ROWS)]
    plain = Encoder(encoder, tiny_catalogue_ref)
    expected = plain.embed(ROWS.tolist(), texts, inputs="both")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    without = plain.embed(ROWS[::-1].tolist(), [""] * len(ROWS), inputs="both")
    np.testing.assert_allclose(embedded[bare], without, atol=1e-5)
    assert np.abs(without[::-1][:5] - expected[:5]).max() > 1e-3
    seen = plain.embed(ROWS[2:5].tolist(), [""] * 3, inputs="image")
    np.testing.assert_allclose(embedded[images], seen, atol=1e-5)
    save_embeddings(str(tmp_path / "e.safetensors"), ROWS, found)
    rows, embeddings = load_embeddings(str(tmp_path / "e.safetensors"))
    np.testing.assert_array_equal(rows, ROWS)
    np.testing.assert_array_equal(embeddings, found)


@pytest.mark.ray
@pytest.mark.timeout(180)
def test_annotations_keep_the_requested_order(ray_local, tiny_checkpoints, tiny_catalogue_ref):
    config = GeneratorConfig(image=IMAGE, max_new_tokens=6)
    generator = GeneratorRef(tiny_checkpoints["generator"], config)
    found = annotate_rows(ROWS, generator, tiny_catalogue_ref, pool=POOL)
    assert found == Annotator(generator, tiny_catalogue_ref).annotate(ROWS.tolist())
    assert all(bool(text) != bool(reason) for text, reason in found)


def test_prompts_that_are_too_long_are_reported_and_not_truncated(tiny_checkpoints, tiny_catalogue_ref):
    config = GeneratorConfig(image=IMAGE, max_new_tokens=4, max_prompt_tokens=20)
    generator = GeneratorRef(tiny_checkpoints["generator"], config)
    found = Annotator(generator, tiny_catalogue_ref).annotate(ROWS.tolist())
    assert [reason for _, reason in found] == ["prompt_too_long"] * len(ROWS)


def test_a_view_with_attributes_needs_an_attribute_table(tiny_checkpoints, tiny_catalogue_ref):
    encoder = EncoderRef(tiny_checkpoints["encoder"], EncoderConfig(image=IMAGE))
    with pytest.raises(ValueError, match="needs attributes"):
        embed_rows({View("both", ("title",), True): ROWS}, encoder, tiny_catalogue_ref, attributes=None, pool=POOL)
