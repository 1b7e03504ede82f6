"""A run to serve, with models of a given size and random weights: a request costs the same as with trained weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from afmrl_ray.attributes.store import AttributeRow, read_attributes, write_attributes
from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue, make_catalogue, open_catalogue, write_catalogue
from afmrl_ray.cit.stages.index import index_gallery, write_index
from afmrl_ray.config import Config, validate
from afmrl_ray.models.model_settings import ModelSettings, encoder_settings, generator_settings
from afmrl_ray.models.tiny import build_encoder, build_generator, save_checkpoint, train_tokenizer
from afmrl_ray.retrieval.embed import EncoderRef, open_encoder
from afmrl_ray.runs import RunDirectory, StageOutcome

IMAGE = {"min_pixels": 3136, "max_pixels": 3136}


def configuration(folder: Path, name: str, width: int, layers: int) -> Config:
    """Config of the run; both models have `layers` layers of hidden size `width`."""
    return validate(
        {
            "run": {"name": name, "storage_path": str(folder)},
            "catalogue": {"cache_dir": str(folder / "staging")},
            "synthetic": {"preset": "demo"},
            "tiny": {"hidden_size": width, "num_layers": layers, "num_heads": 4},
            "encoder": {"image": IMAGE},
            "generator": {"image": IMAGE, "max_new_tokens": 32},
            "evaluation": {"protocols": [{"kind": "retrieval", "name": "fine"}], "primary_protocol": "fine"},
        }
    )


def make_run(folder: Path, name: str, width: int, layers: int) -> tuple[RunDirectory, StagedCatalogue]:
    """A run of one round with an index, and its catalogue; a run of the same name is reused."""
    config = configuration(folder, name, width, layers)
    path = folder / "catalogue.parquet"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_catalogue(make_catalogue(config.synthetic), str(path))
    settings = config.catalogue.model_copy(update={"path": str(path)})
    ref = CatalogueRef(str(path), settings, open_catalogue(str(path), config=settings).fingerprint)
    catalogue = ref.open()
    run = RunDirectory(str(folder), name)
    run.create()
    run.write_run({"name": name, "config": config.model_dump(mode="json")})
    items = [catalogue.item(row) for row in range(len(catalogue))]
    texts = [format_attributes(normalise_attributes(item.attributes)) for item in items]
    tokenizer = train_tokenizer([item.title or "" for item in items] + texts, config.tiny.vocabulary)

    def model(build: Any, seed: int, settings: ModelSettings, directory: str) -> StageOutcome:
        save_checkpoint(build(config.tiny, tokenizer, seed), tokenizer, config.tiny, f"{directory}/model")
        settings.write(f"{directory}/model")
        return StageOutcome({"model": "model"}, {})

    def attributes(directory: str) -> StageOutcome:
        rows = [
            AttributeRow(item.item_id, text, "" if text else "empty") for item, text in zip(items, texts, strict=True)
        ]
        write_attributes(f"{directory}/attributes.parquet", rows, fingerprint="source")
        return StageOutcome({"attributes": "attributes.parquet"}, {})

    of_encoder = encoder_settings(config.encoder, catalogue=ref.fingerprint, upstream={})
    of_generator = generator_settings(config.generator, catalogue=ref.fingerprint, upstream={})
    read: dict[str, Any] = {name: getattr(config, name).fingerprinted() for name in ("encoder", "generator", "index")}
    encoder = run.run_stage("agcl-r0", {"config": read}, partial(model, build_encoder, 0, of_encoder))
    run.run_stage("rar-r0", {"config": read}, partial(model, build_generator, 1, of_generator))
    written = run.run_stage("attributes-r1", {}, attributes)
    primary_protocol: dict[str, Any] = {"fine": {"metrics": {}}}
    run.run_stage("evaluate-r0", {}, lambda _: StageOutcome({}, {"protocols": primary_protocol}))
    text_of = read_attributes(written.output("attributes")).text
    upstream = {stage.name: stage.fingerprint for stage in (encoder, written)}

    def index(directory: str) -> StageOutcome:
        rows = catalogue.rows(index_gallery(config))
        shown = [text_of(catalogue.item(row).item_id) for row in rows.tolist()]
        opened = open_encoder(EncoderRef(encoder.output("model"), config.encoder), ref)
        vectors = opened.embed(rows.tolist(), shown, inputs="both")
        return write_index(config, catalogue, index_gallery(config), rows, vectors, text_of, directory)

    run.run_stage("index-r0", {"upstream": upstream, "config": read}, index)
    return run, catalogue
