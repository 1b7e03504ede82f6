"""What is served is what was trained: the bundle's settings come from the model folders and the stages' records."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from afmrl_ray import storage
from afmrl_ray.errors import CheckpointError, ConfigError
from afmrl_ray.models import annotate
from afmrl_ray.runs import RunDirectory
from afmrl_ray.runs.records import RunReader
from afmrl_ray.serving.bundle import Bundle, open_bundle
from afmrl_ray.serving.models import EncoderInput, ServedEncoder, ServedGenerator
from afmrl_ray.serving.store import ItemStore
from afmrl_ray.serving.uploads import Upload
from tests.serving.conftest import image_bytes

UPLOAD = Upload("red mug", image_bytes(size=(120, 90)))


@pytest.fixture
def moved(served_run: RunDirectory, tmp_path: Path) -> RunReader:
    """A copy of the run in another folder."""
    shutil.copytree(served_run.path, tmp_path / "moved")
    return RunReader.open(str(tmp_path / "moved"))


@pytest.fixture
def reconfigured(moved: RunReader) -> RunReader:
    """The run after a job with other settings of both models, the index and the evaluation wrote its `run.json`."""
    record = moved.read_run()
    config = record["config"]
    config["encoder"] |= {"instruction": "Another prompt.", "max_tokens": 9, "dtype": "bfloat16"}
    config["generator"] |= {"instruction": "Another question.", "max_new_tokens": 3, "inputs": "text"}
    for role in ("encoder", "generator"):
        config[role]["image"] = {"min_pixels": 196, "max_pixels": 196}
    config["index"] |= {"kind": "hnsw", "thumbnail_px": 32}
    config["evaluation"] |= {"primary_protocol": "other", "protocols": [{"kind": "retrieval", "name": "other"}]}
    storage.write_json(storage.join(moved.path, "run.json"), record)
    return moved


def encoder_prompt(bundle: Bundle) -> tuple[str, int]:
    """Text and number of image tokens of what the served encoder is given."""
    encoder = ServedEncoder(rounds_kept=2, tokens=4096)
    row = encoder.prepare(bundle, EncoderInput(UPLOAD, "color: red"))
    tokenizer = encoder._rounds.get(bundle).processor.tokenizer
    return tokenizer.decode(row.input_ids, skip_special_tokens=True), int(row.token_types.sum())


def generator_prompt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int, int]:
    """Text, number of image tokens and token limit of what the served generator is given."""
    seen: list[Any] = []
    generate = annotate.generate

    def recorded(model, processor, prompts, *, max_new_tokens, **more):
        seen.append((processor, prompts[0], max_new_tokens))
        return generate(model, processor, prompts, max_new_tokens=max_new_tokens, **more)

    monkeypatch.setattr(annotate, "generate", recorded)
    ServedGenerator(rounds_kept=2, max_pairs=None).write(bundle, [UPLOAD])
    ((processor, prompt, limit),) = seen
    text = processor.tokenizer.decode(prompt.input_ids, skip_special_tokens=True)
    return text, int(prompt.token_types.sum()), limit


def test_another_instruction_in_run_json_does_not_change_the_served_prompts(
    served_run: RunDirectory, reconfigured: RunReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, served = open_bundle(served_run, 1), open_bundle(reconfigured, 1)
    text, image_tokens = encoder_prompt(served)
    assert "Represent the product.\nred mug\ncolor: red" in text
    assert image_tokens == encoder_prompt(trained)[1]
    text, image_tokens, limit = generator_prompt(served, monkeypatch)
    assert "red mug\nList the key attributes." in text
    assert (image_tokens, limit) == (encoder_prompt(trained)[1], 24)


def test_everything_else_of_a_bundle_is_as_it_was_committed(served_run: RunDirectory, reconfigured: RunReader) -> None:
    trained, served = open_bundle(served_run, 1), open_bundle(reconfigured, 1)
    paths = {"run", "encoder_path", "generator_path", "index_path"}
    assert served.model_dump(exclude=paths) == trained.model_dump(exclude=paths)
    assert served.metrics["primary_protocol"] == {"protocol": "fine", "hit@1": 0.5}
    assert served.encoder_path.startswith(reconfigured.path)


@pytest.mark.parametrize("stage", ["agcl-r1", "rar-r1"])
def test_a_run_without_model_settings_names_the_stage_to_run_again(moved: RunReader, stage: str) -> None:
    committed = moved.committed(stage)
    assert committed is not None
    storage.remove(storage.join(committed.output("model"), "afmrl.json"))
    with pytest.raises(CheckpointError, match=rf"run stage {stage} again: remove {moved.path}/stages/{stage} and run"):
        open_bundle(moved, 1)
    assert open_bundle(moved, 0).round == 0


def test_an_index_without_recorded_settings_is_to_be_built_again(moved: RunReader) -> None:
    path = storage.join(moved.path, "stages", "index-r1", "stage.json")
    record = storage.read_json(path)
    record["inputs"]["config"] = {}
    storage.write_json(path, record)
    with pytest.raises(ConfigError, match=r"build it again: jobs/build_index\.py --round 1"):
        open_bundle(moved, 1)


def test_the_state_of_another_version_is_refused(bundles: tuple[Bundle, Bundle], tmp_path: Path) -> None:
    store = ItemStore(str(tmp_path))
    store.start(bundles[0])
    with sqlite3.connect(store.path) as database:
        database.execute("UPDATE meta SET value = '{\"key\": \"r0-old\"}' WHERE key = 'current'")
    with pytest.raises(ConfigError, match="written by another version of afmrl_ray; name a new folder"):
        ItemStore(str(tmp_path)).state()
