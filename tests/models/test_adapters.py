from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from afmrl_ray.config.models import AdapterConfig, EncoderConfig, ImageConfig
from afmrl_ray.errors import CheckpointError
from afmrl_ray.models.adapters import ADAPTER_FILE, load_for_training, load_trained, make_trainable, save_trained
from afmrl_ray.models.backbones import load_backbone
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.export import export_merged
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import collate
from afmrl_ray.models.model_settings import encoder_settings
from tests.models.test_item_processor import noise

LORA = AdapterConfig(kind="lora", r=4)


@pytest.fixture(scope="module")
def batch(tiny_checkpoints):
    processor = ItemProcessor.from_pretrained(tiny_checkpoints["encoder"], ImageConfig(min_pixels=784, max_pixels=3136))
    rows = [processor.model_input(noise(60, 60, seed), "red mug " * seed) for seed in range(4)]
    return collate(rows, processor.pad_id)


@pytest.fixture(params=["lora", "rslora", "dora"])
def adapter(request, tiny_checkpoints, tmp_path, batch):
    """A folder with an adapter that changes something, and the embeddings of the model it was saved from."""
    config = LORA if request.param == "lora" else LORA.model_copy(update={request.param: True})
    model = load_for_training(tiny_checkpoints["encoder"], "encoder", config, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        embeddings = EmbeddingModel(model).eval()(**batch)
    save_trained(model, str(tmp_path / "adapter"), processor=tiny_checkpoints["encoder"])
    return str(tmp_path / "adapter"), embeddings


@torch.no_grad()
def embed(model, batch):
    return EmbeddingModel(model).eval()(**batch)


def test_embeddings_are_of_unit_length_and_differ_from_the_bases(adapter, tiny_checkpoints, batch):
    _, embeddings = adapter
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4))
    base = embed(load_backbone(tiny_checkpoints["encoder"], "encoder"), batch)
    assert (embeddings - base).abs().max() > 1e-2


def test_stock_transformers_and_peft_load_it_to_the_same_embeddings(adapter, tiny_checkpoints, batch):
    from peft import PeftModel
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    path, embeddings = adapter
    stock = PeftModel.from_pretrained(
        Qwen2VLForConditionalGeneration.from_pretrained(tiny_checkpoints["encoder"], dtype=torch.float32), path
    )
    with torch.no_grad():
        hidden = stock.get_base_model().model(**batch).last_hidden_state[:, -1]
    torch.testing.assert_close(torch.nn.functional.normalize(hidden, dim=-1), embeddings, atol=1e-6, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(path).convert_tokens_to_ids("<|im_end|>") is not None


def test_merged_and_trainable_loading_give_the_same_embeddings(adapter, batch):
    path, embeddings = adapter
    torch.testing.assert_close(embed(load_trained(path, "encoder"), batch), embeddings, atol=1e-5, rtol=1e-4)
    going_on = load_for_training(path, "encoder", LORA, seed=0)
    torch.testing.assert_close(embed(going_on, batch), embeddings, atol=1e-6, rtol=1e-5)
    assert any("lora" in name for name, p in going_on.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_an_adapter_that_does_not_fit_is_an_error_not_a_warning(adapter, tmp_path, change):
    path, _ = adapter
    broken = str(tmp_path / "broken")
    shutil.copytree(path, broken)
    file = os.path.join(broken, ADAPTER_FILE)
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "lora_A" in name)
    tensor = tensors.pop(name)
    if change == "renamed":
        tensors[name.replace("language_model.", "")] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the adapter does not fit: 1 tensors missing"):
        load_trained(broken, "encoder")


def test_an_exported_adapter_is_an_ordinary_model_with_the_same_embeddings(adapter, tmp_path, batch):
    from transformers import Qwen2VLForConditionalGeneration

    path, embeddings = adapter
    out = str(tmp_path / "merged")
    settings = encoder_settings(EncoderConfig(), catalogue="c", upstream={})
    export_merged(path, out, settings)
    stock = Qwen2VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    torch.testing.assert_close(embed(stock, batch), embeddings, atol=1e-5, rtol=1e-4)
    assert not os.path.exists(os.path.join(out, "adapter_config.json"))
    ItemProcessor.from_pretrained(out, ImageConfig())
    with pytest.raises(CheckpointError, match="is not empty"):
        export_merged(path, out, settings)


def test_rslora_and_dora_reach_peft(tiny_checkpoints):
    def scaling(**changes) -> float:
        config = AdapterConfig(kind="lora", r=4, alpha=8, **changes)
        model = load_for_training(tiny_checkpoints["encoder"], "encoder", config, seed=0)
        return next(m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict))

    assert scaling() == 2
    assert scaling(rslora=True) == 4
    dora = load_for_training(tiny_checkpoints["encoder"], "encoder", LORA.model_copy(update={"dora": True}), seed=0)
    assert any("magnitude" in name for name, p in dora.named_parameters() if p.requires_grad)


def test_adapters_stay_in_the_language_model(tiny_checkpoints):
    for role in ("encoder", "generator"):
        model = load_for_training(tiny_checkpoints[role], role, LORA, seed=0)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trained
        assert all("language_model" in name and "lora_" in name for name in trained)


def test_full_training_freezes_the_vision_tower_unless_train_vision(tiny_checkpoints):
    model = load_backbone(tiny_checkpoints["generator"], "generator")
    make_trainable(model, AdapterConfig(kind="full"))
    assert not any(p.requires_grad for p in model.model.visual.parameters())
    assert all(p.requires_grad for p in model.model.language_model.parameters())
    make_trainable(model, AdapterConfig(kind="full", train_vision=True))
    assert all(p.requires_grad for p in model.parameters())


def test_targets_that_match_no_module_are_an_error_that_names_the_setting(tiny_checkpoints):
    with pytest.raises(CheckpointError, match=r"adapter.targets 'nothing' matches no module"):
        load_for_training(tiny_checkpoints["encoder"], "encoder", AdapterConfig(kind="lora", targets="nothing"), seed=0)


def test_a_whole_model_round_trips_with_its_processor(tiny_checkpoints, tmp_path, batch):
    model = load_for_training(
        tiny_checkpoints["encoder"], "encoder", AdapterConfig(kind="full", train_vision=True), seed=0
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    expected = embed(model, batch)
    save_trained(model, str(tmp_path / "model"), processor=tiny_checkpoints["encoder"])
    torch.testing.assert_close(embed(load_trained(str(tmp_path / "model"), "encoder"), batch), expected)
    ItemProcessor.from_pretrained(str(tmp_path / "model"), ImageConfig())
    adapter = load_for_training(tiny_checkpoints["encoder"], "encoder", LORA, seed=0)
    save_trained(adapter, str(tmp_path / "adapter"), processor=tiny_checkpoints["encoder"])
    with pytest.raises(CheckpointError, match=r"adapter.kind is full"):
        load_for_training(str(tmp_path / "adapter"), "encoder", AdapterConfig(kind="full"), seed=0)


def test_a_new_adapter_is_a_function_of_the_seed(tiny_checkpoints):
    def drawn(seed):
        torch.rand(seed + 1)  # what was drawn before must not matter
        model = load_for_training(tiny_checkpoints["encoder"], "encoder", LORA, seed=seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    state = torch.get_rng_state()
    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    torch.set_rng_state(state)
    torch.rand(1)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    drawn(0)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_trained_adapter_has_the_dtype_of_its_base(adapter, tiny_checkpoints):
    for path in (tiny_checkpoints["encoder"], adapter[0]):
        model = load_for_training(path, "encoder", LORA, seed=0, dtype="bfloat16")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
