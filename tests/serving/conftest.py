"""A run of two rounds with tiny models, committed without training, and the application over plain objects."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from afmrl_ray.attributes.store import AttributeRow, read_attributes, write_attributes
from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.catalogue import CatalogueRef
from afmrl_ray.cit.stages.index import index_gallery, write_index
from afmrl_ray.config import Config, validate
from afmrl_ray.config.models import TinyConfig
from afmrl_ray.config.serving import ServingConfig
from afmrl_ray.models.model_settings import ModelSettings, encoder_settings, generator_settings
from afmrl_ray.models.tiny import build_encoder, save_checkpoint
from afmrl_ray.retrieval.embed import EncoderRef, open_encoder
from afmrl_ray.retrieval.item_table import thumbnail
from afmrl_ray.runs import RunDirectory, StageOutcome
from afmrl_ray.runs.records import RunReader
from afmrl_ray.serving.api import make_api
from afmrl_ray.serving.bundle import Bundle, open_bundle
from afmrl_ray.serving.live_index import LiveIndex
from afmrl_ray.serving.metrics import ServingMetrics
from afmrl_ray.serving.models import Embedding, EncoderInput, ServedEncoder
from afmrl_ray.serving.security import Keys
from afmrl_ray.serving.service import SearchService
from afmrl_ray.serving.uploads import Upload

PIXELS = {"min_pixels": 3136, "max_pixels": 3136}


def image_bytes(colour: str = "red", size: tuple[int, int] = (56, 56), kind: str = "PNG") -> bytes:
    """A disc on white."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((8, 8, size[0] - 8, size[1] - 8), fill=colour)
    target = io.BytesIO()
    image.save(target, kind)
    return target.getvalue()


def served_config(storage_path: Path) -> Config:
    return validate(
        {
            "run": {"name": "served", "storage_path": str(storage_path)},
            "catalogue": {"cache_dir": str(storage_path / "staging")},
            "synthetic": {"preset": "tiny", "image_px": 56},
            "encoder": {"image": PIXELS},
            "generator": {"image": PIXELS, "max_new_tokens": 24},
            "index": {"gallery": {"split": ["test"], "role": "gallery"}},
            "evaluation": {"protocols": [{"kind": "retrieval", "name": "fine"}], "primary_protocol": "fine"},
        }
    )


@pytest.fixture(scope="session")
def served_run(
    tiny_checkpoints: dict[str, str],
    tiny_catalogue_ref: CatalogueRef,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunDirectory:
    """Rounds 0 and 1, of encoders with different weights, both with an index; round 1 was promoted last."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("served")
    config = served_config(folder)
    run = RunDirectory(str(folder), "served")
    run.create()
    run.write_run({"name": "served", "config": config.model_dump(mode="json")})
    catalogue = tiny_catalogue_ref.open()
    tiny = TinyConfig(
        hidden_size=48, num_layers=2, num_heads=4, vision_width=32, vision_depth=2, patch_px=14, vocabulary=420
    )

    settings: dict[str, ModelSettings] = {
        "encoder": encoder_settings(config.encoder, catalogue=tiny_catalogue_ref.fingerprint, upstream={}),
        "generator": generator_settings(config.generator, catalogue=tiny_catalogue_ref.fingerprint, upstream={}),
    }

    def model(role: str, number: int) -> Callable[[str], StageOutcome]:
        def body(directory: str) -> StageOutcome:
            target = f"{directory}/model"
            if role == "encoder" and number:
                tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoints["encoder"])
                save_checkpoint(build_encoder(tiny, tokenizer, 100 + number), tokenizer, tiny, target)
            else:
                shutil.copytree(tiny_checkpoints[role], target)
            settings[role].write(target)
            return StageOutcome({"model": "model"}, {})

        return body

    def attributes(directory: str) -> StageOutcome:
        rows = [catalogue.item(row) for row in range(len(catalogue))]
        texts = [AttributeRow(i.item_id, format_attributes(normalise_attributes(i.attributes))) for i in rows]
        kept = [row if row.text else AttributeRow(row.item_id, "", "empty") for row in texts]
        write_attributes(f"{directory}/attributes.parquet", kept, fingerprint="teacher")
        return StageOutcome({"attributes": "attributes.parquet"}, {})

    for number in (0, 1):
        encoder = run.run_stage(f"agcl-r{number}", {"n": number}, model("encoder", number))
        run.run_stage(f"rar-r{number}", {"n": number}, model("generator", number))
        written = run.run_stage(f"attributes-r{number + 1}", {"n": number}, attributes)
        protocols = {"fine": {"metrics": {"hit@1": {"mean": 0.4 + number / 10, "low": None, "high": None}}}}
        read = {"config": {"evaluation": config.evaluation.fingerprinted()}}
        run.run_stage(f"evaluate-r{number}", read, lambda _, p=protocols: StageOutcome({}, {"protocols": p}))
        run.run_stage(f"promotion-r{number}", {}, lambda _: StageOutcome({}, {"promoted": True, "why": []}))
        upstream = {stage.name: stage.fingerprint for stage in (encoder, written)}
        rows = catalogue.rows(index_gallery(config))
        text_of = read_attributes(written.output("attributes")).text
        vectors = open_encoder(EncoderRef(encoder.output("model"), config.encoder), tiny_catalogue_ref).embed(
            rows.tolist(), [text_of(catalogue.item(row).item_id) for row in rows.tolist()], inputs="both"
        )
        run.run_stage(
            f"index-r{number}",
            {"upstream": upstream, "config": {"index": config.index.fingerprinted()}},
            partial(write_index, config, catalogue, index_gallery(config), rows, vectors, text_of),
        )
    return run


class PlainEncoder:
    """`ports.EncoderPort` without Ray."""

    def __init__(self) -> None:
        self._encoder = ServedEncoder(rounds_kept=2, tokens=4096)

    async def embed(self, bundle: Bundle, given: Sequence[EncoderInput]) -> list[Embedding]:
        rows = [self._encoder.prepare(bundle, one) for one in given]
        return [Embedding(self._encoder.embed(bundle, [row])[0], len(row)) for row in rows]

    async def prepare(self, bundle: Bundle) -> None:
        self._encoder.load(bundle)


class PlainGenerator:
    """`ports.GeneratorPort` that writes a function of its input, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    async def write(self, bundle: Bundle, upload: Upload) -> tuple[str, str]:
        self.calls += 1
        if upload.title == "unreadable":
            return "", "no_pair"
        return f"color: red; round: {bundle.round}; size: {len(upload.title)}", ""

    async def prepare(self, bundle: Bundle) -> None:
        return None


class PlainIndex:
    """`ports.IndexPort` without Ray."""

    def __init__(self, state_dir: str, bundle: Bundle, **settings: Any) -> None:
        self.live = LiveIndex(state_dir, bundle, **{"rounds_kept": 2, "max_delta_items": 1000, **settings})

    async def state(self):
        return self.live.state

    async def search(self, key, vector, k, filters):
        return self.live.search(key, vector, k, filters)

    async def upsert(self, item, embedded):
        return self.live.write(lambda store: store.upsert(item, embedded))

    async def delete(self, item_id):
        return self.live.delete(item_id)

    async def get(self, item_id):
        return self.live.current().get(item_id)

    async def size(self):
        return len(self.live.current())

    async def prepare(self, bundle):
        self.live.prepare(bundle)

    async def begin_switch(self, bundle):
        self.live.write(lambda store: store.begin_switch(bundle))

    async def without_vector(self, key, limit):
        return self.live.store.without_vector(key, limit)

    async def add_vector(self, item, key, embedded):
        self.live.write(lambda store: store.add_vector(item, key, embedded))

    async def finish_switch(self, key):
        return self.live.write(lambda store: store.finish_switch(key))


class Application:
    """The API over plain objects."""

    def __init__(self, run: RunDirectory, state_dir: Path, number: int = 1, **settings: Any) -> None:
        values = {"run": run.path, "auth": {"anonymous_on_loopback": True}, **settings}
        self.config = ServingConfig.model_validate(values)
        self.metrics = ServingMetrics("test")
        self.generator = PlainGenerator()
        self.encoder = PlainEncoder()
        self.index = PlainIndex(str(state_dir), open_bundle(run, number))
        self.service = SearchService(
            self.encoder,
            self.generator,
            self.index,
            cached_attributes=self.config.cached_attributes,
            meter=self.metrics,
        )
        self.api = make_api(
            self.service,
            self.config,
            Keys.read(self.config.auth),
            self.metrics,
            lambda n: open_bundle(RunReader.open(run.path), n),
            lambda data: thumbnail(Image.open(io.BytesIO(data)), 64),
        )

    def client(self, host: str = "127.0.0.1", **settings: Any) -> Any:
        from starlette.testclient import TestClient

        return TestClient(self.api, client=(host, 5000), **settings)


@pytest.fixture
def application(served_run: RunDirectory, tmp_path: Path) -> Application:
    return Application(served_run, tmp_path / "state")


@pytest.fixture
def client(application: Application) -> Any:
    with application.client() as client:
        yield client


@pytest.fixture(scope="session")
def bundles(served_run: RunDirectory) -> tuple[Bundle, Bundle]:
    return open_bundle(served_run, 0), open_bundle(served_run, 1)


def unit(*values: float, dimensions: int = 48) -> np.ndarray:
    """A unit vector whose first elements are proportional to `values`."""
    vector = np.zeros(dimensions, dtype=np.float32)
    vector[: len(values)] = values
    return vector / np.linalg.norm(vector)
