from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers.processors import ByteLevel

from afmrl_ray.config.models import AdapterConfig, EncoderConfig, ImageConfig
from afmrl_ray.errors import CheckpointError, ConfigError
from afmrl_ray.models.adapters import load_for_training, load_trained, save_trained
from afmrl_ray.models.encoder import EmbeddingModel
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import collate
from afmrl_ray.models.model_settings import encoder_settings
from afmrl_ray.models.prompts import encoder_input
from afmrl_ray.models.sentence_transformers_export import export_sentence_transformers
from afmrl_ray.models.tiny import train_tokenizer

CONFIG = EncoderConfig(image=ImageConfig(min_pixels=1600, max_pixels=14000), max_tokens=150)
SETTINGS = encoder_settings(CONFIG, catalogue="c", upstream={})
COLOURS = "color: red; pattern: striped"
LONG = "new hot sale mug with handle " * 30
SYSTEM = """<|im_start|>system\nYou're a "helpful" assistänt. 🛒<|im_end|>\n"""


@dataclass(frozen=True)
class TeacherItem:
    """An image's size, none = no image; title; attributes."""

    size: tuple[int, int] | None
    title: str = ""
    attributes: str = ""

    @property
    def image(self) -> Image.Image:
        width, height = self.size
        pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    @property
    def given(self) -> dict:
        """As the model card says that it is given to sentence-transformers."""
        text = "\n".join(part for part in (self.title, self.attributes) if part)
        return ({"image": self.image} if self.size else {}) | ({"text": text} if text or not self.size else {})

    @property
    def messages(self) -> list[dict]:
        """What sentence-transformers makes of `given` and the folder's prompt."""
        content = [{"type": kind, kind: value} for kind, value in self.given.items()]
        return [
            {"role": "system", "content": [{"type": "text", "text": CONFIG.instruction}]},
            {"role": "user", "content": content},
        ]


ITEMS = [
    TeacherItem((90, 60), "hot mug", COLOURS),
    TeacherItem((61, 140), "mug"),
    TeacherItem((300, 220), "new striped steel mug with handle", COLOURS),
    TeacherItem((20, 24)),
    TeacherItem((150, 41), attributes=COLOURS),
    TeacherItem(None, "hot mug", COLOURS),
    TeacherItem(None, "Krug für Tee, 茶 🍵\nzwei Zeilen"),
    TeacherItem(None, attributes=COLOURS),
    TeacherItem(None, LONG, COLOURS),
    TeacherItem((80, 80), LONG, COLOURS),
]


class Shop:
    """`prompts.ItemReader` of the items above."""

    def image(self, row):
        return ITEMS[row].image

    def image_bytes(self, row):
        raise NotImplementedError

    def title(self, row, columns=("title",)):
        return ITEMS[row].title


def own_rows(processor):
    def inputs(item):
        return "both" if item.size else "text"

    return [
        encoder_input(processor, Shop(), n, config=CONFIG, inputs=inputs(item), attributes=item.attributes)
        for n, item in enumerate(ITEMS)
    ]


@pytest.fixture(scope="module", params=["plain", "system"])
def exported(request, tiny_checkpoints, tmp_path_factory):
    """The exported folder, what our own encoder makes of the items, and their rows.

    `system`: a chat template that begins with a system message, as that of the published checkpoints does.
    """
    source = str(tmp_path_factory.mktemp("trained") / "adapter")
    model = load_for_training(tiny_checkpoints["encoder"], "encoder", AdapterConfig(kind="lora", r=4), seed=0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_trained(model, source, processor=tiny_checkpoints["encoder"])
    if request.param == "system":
        template = Path(source) / "chat_template.jinja"
        template.write_text(SYSTEM + template.read_text())
    processor = ItemProcessor.from_pretrained(source, CONFIG.image)
    rows = own_rows(processor)
    with torch.no_grad():
        own = EmbeddingModel(load_trained(source, "encoder")).eval()(**collate(rows, processor.pad_id))
    out = str(tmp_path_factory.mktemp("exported") / "folder")
    export_sentence_transformers(source, out, SETTINGS)
    return out, own, rows


def gap(theirs, own) -> float:
    return float(np.abs(np.asarray(theirs) - own.numpy()).max())


def test_the_test_items_cover_images_texts_and_lengths(exported):
    _, own, rows = exported
    assert [len(row) for row in rows[-2:]] == [CONFIG.max_tokens] * 2
    assert len({row.visuals and row.visuals[0].grid for row in rows}) == 7
    similarities = own @ own.T - torch.eye(len(own))
    assert similarities.max() < 0.999


def test_the_chat_template_and_tokenizer_give_our_token_ids(exported):
    from transformers import AutoTokenizer

    out, _, rows = exported
    tokenizer = AutoTokenizer.from_pretrained(out)
    for item, row in zip(ITEMS, rows, strict=True):
        if item.size is None:
            text = tokenizer.apply_chat_template(item.messages, tokenize=False)
            assert tokenizer(text, truncation=True)["input_ids"] == row.input_ids.tolist()
            if len(row) < CONFIG.max_tokens:
                whole = tokenizer.apply_chat_template(item.messages, add_generation_prompt=True, return_dict=False)
                assert whole == row.input_ids.tolist()


def test_our_own_code_makes_the_same_inputs_from_the_folder(exported):
    out, _, rows = exported
    for again, row in zip(own_rows(ItemProcessor.from_pretrained(out, CONFIG.image)), rows, strict=True):
        assert again.input_ids.tolist() == row.input_ids.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_stock_transformers_gives_our_inputs_and_embeddings(exported, side):
    from transformers import AutoModel, AutoProcessor

    out, own, rows = exported
    processor = AutoProcessor.from_pretrained(out, backend="pil")
    features = processor.apply_chat_template(
        [item.messages for item in ITEMS],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"text_kwargs": {"padding": True, "truncation": "longest_first", "padding_side": side}},
    )
    for ids, mask, row in zip(features["input_ids"], features["attention_mask"], rows, strict=True):
        assert ids[mask.bool()].tolist() == row.input_ids.tolist()
    model, report = AutoModel.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        hidden = model.eval()(**features).last_hidden_state
    positions = torch.arange(hidden.shape[1])
    last = (features["attention_mask"] * positions).argmax(dim=1)
    embeddings = torch.nn.functional.normalize(hidden[torch.arange(len(hidden)), last], dim=-1)
    assert gap(embeddings, own) < 1e-5


def test_the_folder_holds_the_settings_that_sentence_transformers_reads(exported):
    folder = Path(exported[0])

    def read(name):
        return json.loads((folder / name).read_text())

    assert [module["path"] for module in read("modules.json")] == ["", "1_Pooling", "2_Normalize"]
    assert all((folder / module["path"]).is_dir() for module in read("modules.json"))
    assert read("1_Pooling/config.json") == {"embedding_dimension": 48, "pooling_mode": "lasttoken"}
    prompts = read("config_sentence_transformers.json")
    assert prompts["prompts"][prompts["default_prompt_name"]] == CONFIG.instruction
    assert read("preprocessor_config.json")["size"] == {"shortest_edge": 1600, "longest_edge": 14000}
    card = (folder / "README.md").read_text()
    assert "between 1600 and 14000 pixels" in card
    assert f'"{CONFIG.instruction}"' in card
    assert not re.search("@[A-Z_]+@", card)


def test_what_cannot_be_exported_is_an_error(tiny_checkpoints, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").touch()
    shutil.copytree(tiny_checkpoints["encoder"], tmp_path / "merging")
    train_tokenizer(["mug\n\nmug"] * 30, 420).save_pretrained(tmp_path / "merging")
    two_lines = SETTINGS.model_copy(update={"instruction": "\nRepresent."})
    with pytest.raises(ConfigError, match=r"encoder\.instruction: begins with a line break"):
        export_sentence_transformers(str(tmp_path / "merging"), str(tmp_path / "new"), two_lines)
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="the encoder must be qwen2_vl"):
        export_sentence_transformers(tiny_checkpoints["generator"], str(tmp_path / "new"), SETTINGS)
    with pytest.raises(CheckpointError, match="is not empty"):
        export_sentence_transformers(tiny_checkpoints["encoder"], str(tmp_path / "full"), SETTINGS)


@pytest.fixture
def loaded(exported):
    """The folder as stock sentence-transformers loads it, and our own embeddings."""
    library = pytest.importorskip("sentence_transformers", reason="a peer, installed by `make test-bench` alone")
    return library.SentenceTransformer(exported[0], device="cpu"), exported[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_stock_sentence_transformers_gives_our_embeddings(loaded, side, batch_size):
    model, own = loaded
    model[0].tokenizer.padding_side = side
    given = [item.given for item in ITEMS]
    theirs = model.encode(given, batch_size=batch_size)
    assert gap(theirs, own) < 1e-5
    assert float((torch.from_numpy(theirs) * own).sum(dim=1).min()) >= 1 - 1e-6
    assert gap(model.encode_query(given, batch_size=batch_size), own) < 1e-5
    assert gap(model.encode_document(given, batch_size=batch_size), own) < 1e-5


@pytest.mark.parametrize("wrong", ["prompt", "budget", "order", "end", "pooling"])
def test_each_part_of_the_folder_is_needed(loaded, wrong):
    model, own = loaded
    given = [item.given for item in ITEMS]
    prompt = None
    if wrong == "prompt":
        prompt = "Represent the products."
    elif wrong == "budget":
        model[0].processor.image_processor.size = {"shortest_edge": 784, "longest_edge": 3136}
    elif wrong == "order":
        given = [{"text": "\n".join(reversed(row["text"].split("\n")))} if "text" in row else row for row in given]
    elif wrong == "end":
        model[0].tokenizer.backend_tokenizer.post_processor = ByteLevel()
    elif wrong == "pooling":
        model[1].pooling_mode = "mean"
    assert gap(model.encode(given, prompt=prompt), own) > 1e-3


def test_the_code_of_the_model_card_runs_and_gives_our_embeddings(exported, monkeypatch, tmp_path):
    pytest.importorskip("sentence_transformers", reason="a peer, installed by `make test-bench` alone")
    out = exported[0]
    code = re.search(r"```python\n(.*?)```", (Path(out) / "README.md").read_text(), re.DOTALL).group(1)
    ITEMS[0].image.save(tmp_path / "mug.jpg")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code.replace('SentenceTransformer(".")', f"SentenceTransformer({out!r}, device='cpu')"), found)
    processor = ItemProcessor.from_pretrained(out, CONFIG.image)
    image = Image.open(tmp_path / "mug.jpg").convert("RGB")
    title, attributes = found["title"], found["attributes"]
    texts = [f"{title}\n{attributes}", title, "", title]
    rows = [
        processor.model_input(
            image if n < 3 else None, f"{CONFIG.instruction}\n{text}".strip(), max_tokens=CONFIG.max_tokens
        )
        for n, text in enumerate(texts)
    ]
    with torch.no_grad():
        own = EmbeddingModel(load_trained(out, "encoder")).eval()(**collate(rows, processor.pad_id))
    assert gap(found["embeddings"], own) < 1e-5
