"""An image goes through the frozen tower once, and what was kept gives the same embeddings, gradients and bits."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afmrl_ray.agcl.prepare import Preparer
from afmrl_ray.agcl.step import AGCLStep
from afmrl_ray.agcl.train import load_encoder
from afmrl_ray.config import validate
from afmrl_ray.config.models import AdapterConfig, EncoderConfig, ImageConfig, VisionCacheConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.adapters import load_for_training
from afmrl_ray.models.backbones import load_backbone
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import collate
from afmrl_ray.models.vision_cache import VisionCache, fingerprint
from afmrl_ray.retrieval.embed import Encoder, EncoderRef
from tests.models.test_item_processor import noise

PIXELS = ImageConfig(min_pixels=784, max_pixels=6000)
SIZES = [(60, 60), (120, 60), (60, 60), (200, 130)]


def encoded(seed: int) -> bytes:
    data = io.BytesIO()
    noise(*SIZES[seed % len(SIZES)], seed).save(data, "PNG")
    return data.getvalue()


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.fixture
def processor(tiny_checkpoints) -> ItemProcessor:
    return ItemProcessor.from_pretrained(tiny_checkpoints["encoder"], PIXELS)


@pytest.fixture
def frozen(tiny_checkpoints):
    return load_backbone(tiny_checkpoints["encoder"], "encoder").requires_grad_(False)


def config(folder: Path, max_gb: float = 1.0) -> VisionCacheConfig:
    return VisionCacheConfig(enabled=True, folder=str(folder), max_gb=max_gb)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_embeddings_from_the_cache_equal_those_from_pixels(frozen, processor, tmp_path):
    cache = VisionCache(frozen, processor, config(tmp_path))
    images = [encoded(seed) for seed in range(4)]
    texts = [f"mug {seed}" for seed in range(4)]
    model = EmbeddingModel(frozen).eval()
    pixels = [processor.model_input(decoded(data), text) for data, text in zip(images, texts, strict=True)]
    kept = [
        processor.model_input(cache.visual(data, lambda data=data: decoded(data)), text)
        for data, text in zip(images, texts, strict=True)
    ]
    wanted = model(**collate([*pixels, processor.model_input(None, "bag")], processor.pad_id))
    found = model(**collate([*kept, processor.model_input(None, "bag")], processor.pad_id))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    swapped = model(**collate([kept[1], kept[0]], processor.pad_id))
    torch.testing.assert_close(swapped, wanted[[1, 0]], rtol=1e-5, atol=1e-6)


def test_an_image_is_decoded_and_passes_the_tower_once(frozen, processor, tmp_path):
    runs = []
    frozen.model.visual.register_forward_hook(lambda *_: runs.append(1))
    images = [encoded(seed) for seed in range(3)]
    first = VisionCache(frozen, processor, config(tmp_path))
    made = [first.visual(data, lambda data=data: decoded(data)).features for data in images]
    second = VisionCache(frozen, processor, config(tmp_path))
    found = [second.visual(data, lambda: pytest.fail("decoded again")).features for data in images]
    assert len(runs) == 3
    assert (first.hits, first.misses, second.hits, second.misses) == (0, 3, 3, 0)
    for mine, theirs in zip(made, found, strict=True):
        assert torch.equal(mine, theirs)


def test_another_tower_or_pixel_budget_uses_another_folder(frozen, processor, tiny_checkpoints, tmp_path):
    data = encoded(0)
    VisionCache(frozen, processor, config(tmp_path)).visual(data, lambda: decoded(data))
    smaller = ItemProcessor.from_pretrained(tiny_checkpoints["encoder"], ImageConfig(min_pixels=784, max_pixels=800))
    other = VisionCache(frozen, smaller, config(tmp_path))
    assert other.visual(data, lambda: decoded(data)).grid == (1, 2, 2)
    before = fingerprint(frozen.model.visual, processor)
    next(frozen.model.visual.parameters()).data[0] += 1e-3
    assert fingerprint(frozen.model.visual, processor) != before
    moved = VisionCache(frozen, processor, config(tmp_path))
    moved.visual(data, lambda: decoded(data))
    assert (other.misses, moved.misses, len(files(tmp_path))) == (1, 1, 3)


def test_above_the_limit_the_least_recently_read_files_are_removed(frozen, processor, tmp_path):
    cache = VisionCache(frozen, processor, config(tmp_path))
    images = [encoded(4 * seed) for seed in range(12)]
    known: set[Path] = set()
    for place, data in enumerate(images):
        cache.visual(data, lambda data=data: decoded(data))
        (path,) = set(files(tmp_path)) - known
        known.add(path)
        os.utime(path, (place + 1, place + 1))
    size = files(tmp_path)[0].stat().st_size
    cache.visual(images[0], lambda: pytest.fail("it is cached"))  # the oldest is read, and so the youngest
    small = VisionCache(frozen, processor, config(tmp_path, max_gb=6 * size / 1e9))
    extra = encoded(400)
    small.visual(extra, lambda: decoded(extra))
    assert len(files(tmp_path)) == 5 + 1  # 0.9 of six, then the new one
    again = VisionCache(frozen, processor, config(tmp_path))
    for data in [images[0], *images[-4:]]:
        again.visual(data, lambda: pytest.fail("a young one is gone"))


def test_a_broken_file_is_computed_again(frozen, processor, tmp_path):
    data = encoded(1)
    cache = VisionCache(frozen, processor, config(tmp_path))
    made = cache.visual(data, lambda: decoded(data)).features
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    assert torch.equal(cache.visual(data, lambda: decoded(data)).features, made)
    assert torch.equal(cache.visual(data, lambda: pytest.fail("not written again")).features, made)


def test_a_full_disk_is_logged_once_and_stops_nothing(frozen, processor, tmp_path, monkeypatch, caplog):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache = VisionCache(frozen, processor, config(tmp_path))
    for seed in range(3):
        data = encoded(seed)
        assert cache.visual(data, lambda data=data: decoded(data)).features is not None
    assert [record.message.count("No space left") for record in caplog.records] == [1]


def test_a_trained_tower_is_refused(tiny_checkpoints, processor, tmp_path):
    trained = load_for_training(
        tiny_checkpoints["encoder"], "encoder", AdapterConfig(targets=r".*visual.*\.(qkv|proj)"), seed=0
    )
    with pytest.raises(ConfigError, match="vision_cache"):
        VisionCache(trained, processor, config(tmp_path))


class Engine:
    """The part of an engine that a step uses, in plain torch."""

    device = torch.device("cpu")

    def __init__(self, model) -> None:
        self._model = model

    def __call__(self, **batch):
        return self._model(**batch)

    def backward(self, loss, *, last=True):
        loss.backward()


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("budget", [None, 300])
def test_a_step_of_agcl_has_the_same_loss_and_gradient(tiny_checkpoints, tiny_catalogue_ref, tmp_path, kind, budget):
    values = {
        "encoder": {"image": PIXELS.model_dump(), "vision_cache": {"folder": str(tmp_path)}},
        "agcl": {"batch_size": 6, "adapter": {"kind": kind}, "tokens_per_microbatch": budget},
    }
    base = tiny_checkpoints["encoder"]
    found = []
    for cached in (False, True, True):
        values["encoder"]["vision_cache"]["enabled"] = cached
        config, catalogue = validate(values), tiny_catalogue_ref.open()
        encoder = load_encoder(config, base, catalogue, None)
        step = AGCLStep(config.agcl, encoder, Preparer(config, catalogue, encoder, None), Engine(encoder.module))
        stats = step(0)
        found.append((stats, [p.grad for p in encoder.module.parameters() if p.grad is not None]))
    for stats, gradients in found[1:]:
        assert stats["train/loss"] == pytest.approx(found[0][0]["train/loss"], rel=1e-5)
        assert len(gradients) == len(found[0][1]) > 0
        for mine, theirs in zip(gradients, found[0][1], strict=True):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm() + 1e-8
    assert [stats.get("data/vision_cache_hit_fraction") for stats, _ in found] == [None, 0.0, 1.0]


def test_evaluation_reads_the_cache_of_the_training(tiny_checkpoints, tiny_catalogue_ref, tmp_path):
    plain = EncoderConfig(image=PIXELS)
    cached = EncoderConfig(image=PIXELS, vision_cache=config(tmp_path))
    rows, texts = [3, 1, 7], ["color: red", "", "size: small"]
    wanted = Encoder(EncoderRef(tiny_checkpoints["encoder"], plain), tiny_catalogue_ref).embed(
        rows, texts, inputs="both"
    )
    for _ in range(2):
        encoder = Encoder(EncoderRef(tiny_checkpoints["encoder"], cached), tiny_catalogue_ref)
        np.testing.assert_allclose(encoder.embed(rows, texts, inputs="both"), wanted, atol=1e-6)
    assert (encoder._cache.hits, encoder._cache.misses) == (3, 0)
