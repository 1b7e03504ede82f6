"""Dual encoders: embeddings of stock checkpoints, and settings that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, SiglipConfig, SiglipModel

from afmrl_ray.config import validate
from afmrl_ray.config.models import EncoderConfig, ImageConfig, TinyConfig
from afmrl_ray.errors import CheckpointError, ConfigError
from afmrl_ray.models.backbones import check_checkpoint, load_backbone
from afmrl_ray.models.dual_encoder import DualEncoder, DualProcessor, fuse, zeros_where_missing
from afmrl_ray.models.tiny_dual_encoder import build_dual_encoder, save_dual_encoder, train_dual_tokenizer
from afmrl_ray.retrieval.embed import DualEncoderEmbedder, Encoder, EncoderRef, open_encoder

TINY = TinyConfig(hidden_size=48, num_layers=2, vision_width=32, vision_depth=2, patch_px=14, vocabulary=420)


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory) -> str:
    tokenizer = train_dual_tokenizer(["color: red; pattern: striped", "new hot sale mug"] * 30, TINY.vocabulary)
    path = str(tmp_path_factory.mktemp("clip"))
    model = build_dual_encoder(TINY, ImageConfig(min_pixels=3136, max_pixels=3136), tokenizer, seed=0)
    save_dual_encoder(model, tokenizer, path)
    return path


@pytest.fixture(scope="module")
def siglip_path(tmp_path_factory, clip_path) -> str:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(clip_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 20, "projection_size": 32}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    path = str(tmp_path_factory.mktemp("siglip"))
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(path)
    return path


def config_of(path: str) -> EncoderConfig:
    return EncoderConfig(kind="dual_encoder", path=path)


def test_embeddings_are_those_of_stock_clip(clip_path, tiny_catalogue_ref):
    catalogue = tiny_catalogue_ref.open()
    rows, texts = [0, 3, 7], ["color: red", "", "logo: blue"]
    ours = DualEncoderEmbedder(EncoderRef(clip_path, config_of(clip_path)), tiny_catalogue_ref)
    model = CLIPModel.from_pretrained(clip_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(clip_path)
    pixels = AutoImageProcessor.from_pretrained(clip_path, backend="pil")
    for row, text in zip(rows, texts, strict=True):
        title = catalogue.title(row)
        written = tokenizer([f"{title}\n{text}".strip()], return_tensors="pt", truncation=True, max_length=77)
        with torch.no_grad():
            words = model.get_text_features(**{k: written[k] for k in ("input_ids", "attention_mask")}).pooler_output
            seen = model.get_image_features(**pixels(images=[catalogue.image(row)], return_tensors="pt")).pooler_output
        words, seen = (vector[0].numpy() / np.linalg.norm(vector[0].numpy()) for vector in (words, seen))
        both = (words + seen) / np.linalg.norm(words + seen)
        for inputs, expected in (("both", both), ("image", seen if not text else None)):
            if expected is not None:
                found = ours.embed([row], [text], inputs=inputs)[0]
                assert np.abs(found - expected).max() < 1e-5, (row, inputs)


def test_embeddings_of_a_batch_equal_those_of_its_items_alone(clip_path, tiny_catalogue_ref):
    """Padding and neighbours change nothing, and items that lack an image or a text do not shift the others."""
    encoder = DualEncoderEmbedder(EncoderRef(clip_path, config_of(clip_path)), tiny_catalogue_ref)
    rows, texts = [0, 1, 2, 3], ["", "color: red; pattern: striped; logo: blue", "trim: gold", ""]
    together = encoder.embed(rows, texts, inputs="both")
    alone = np.concatenate([encoder.embed([row], [text], inputs="both") for row, text in zip(rows, texts, strict=True)])
    assert np.abs(together - alone).max() < 1e-5
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert not np.allclose(encoder.embed([1], [texts[1]], inputs="both"), encoder.embed([1], [""], inputs="both"))


def test_siglip_checkpoints_load_and_their_texts_are_padded_to_the_full_length(siglip_path, tiny_catalogue_ref):
    check_checkpoint(siglip_path, "dual_encoder")
    model = load_backbone(siglip_path, "dual_encoder")
    processor = DualProcessor.from_pretrained(siglip_path, model)
    batch = processor.collate([processor.model_input(None, "red mug"), processor.model_input(None, "x" * 400)])
    assert batch["input_ids"].shape == (2, 20)
    encoder = open_encoder(EncoderRef(siglip_path, config_of(siglip_path)), tiny_catalogue_ref)
    found = encoder.embed([0, 1], ["", ""], inputs="both")
    assert found.shape == (2, 32)
    stock = SiglipModel.from_pretrained(siglip_path).eval()
    with torch.no_grad():
        expected = stock.get_text_features(input_ids=batch["input_ids"]).pooler_output
        ours = DualEncoder(model).eval()(**batch)[1]
    assert torch.allclose(torch.nn.functional.normalize(expected, dim=-1), ours, atol=1e-6)


def test_vectors_of_present_inputs_are_expanded_with_zeros_and_fused():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert zeros_where_missing(vectors, [False, True, True]).tolist() == [[0, 0], [1, 0], [0, 1]]
    fused = fuse(zeros_where_missing(vectors, [True, True, False]), zeros_where_missing(vectors, [False, True, True]))
    assert torch.allclose(fused, torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_the_wrong_kind_of_checkpoint_names_the_setting(clip_path, tiny_checkpoints):
    with pytest.raises(CheckpointError, match=r"encoder.path: .* is clip, .* set encoder.kind=dual_encoder"):
        check_checkpoint(clip_path, "encoder")
    with pytest.raises(CheckpointError, match="must be clip or siglip"):
        check_checkpoint(tiny_checkpoints["encoder"], "dual_encoder")


def test_rars_encoder_refuses_a_dual_encoder(clip_path, tiny_catalogue_ref):
    with pytest.raises(ConfigError, match=r"encoder\.kind dual_encoder"):
        Encoder(EncoderRef(clip_path, config_of(clip_path)), tiny_catalogue_ref)


@pytest.mark.parametrize(
    ("agcl", "named"),
    [
        ({}, "agcl.lexical.enabled=false"),
        ({"lexical": {"enabled": False}, "tokens_per_microbatch": 100}, "agcl.tokens_per_microbatch=null"),
        ({"lexical": {"enabled": False}, "learn_temperature": True}, "agcl.learn_temperature=false"),
    ],
)
def test_settings_of_agcl_that_a_dual_encoder_lacks_are_refused(agcl, named):
    with pytest.raises(ConfigError, match=named):
        validate({"encoder": {"kind": "dual_encoder"}, "agcl": agcl})


def test_settings_of_dual_encoders_are_not_in_the_fingerprint_of_qwen():
    plain, other = EncoderConfig(), EncoderConfig(dual_encoder={"region_weight": 0.5})
    assert plain.fingerprinted() == other.fingerprinted()
    assert "kind" not in plain.fingerprinted()
    dual = EncoderConfig(kind="dual_encoder", dual_encoder={"region_weight": 0.5}).fingerprinted()
    assert dual["dual_encoder"]["region_weight"] == 0.5
