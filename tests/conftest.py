"""Fixtures of the whole suite: one local Ray, tiny checkpoints, a tiny staged catalogue."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before any import of ray, torch or deepspeed: no token files, no thread storms, no shared JIT cache with its locks.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp(prefix="afmrl-torch-ext-"))
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with a Ray come first: they are the long ones, and the last file of all is waited for by one process."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A local Ray of four logical CPUs, shared by the whole session."""
    import ray

    # Short, because a Unix socket's path may have at most 107 bytes.
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        namespace="afmrl",
        object_store_memory=200 * 2**20,
        _temp_dir=folder,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={
            "env_vars": {
                name: os.environ[name]
                for name in ("RAY_ENABLE_AUTO_CONNECT", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")
            }
        },
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of an encoder and a generator with random weights, about 100,000 parameters each."""
    from afmrl_ray.config.models import TinyConfig
    from afmrl_ray.models.tiny import build_encoder, build_generator, save_checkpoint, train_tokenizer

    config = TinyConfig(
        hidden_size=48, num_layers=2, num_heads=4, vision_width=32, vision_depth=2, patch_px=14, vocabulary=420
    )
    texts = ["color: red; pattern: striped; shape: round; material: steel", "new hot sale mug with handle"] * 30
    tokenizer = train_tokenizer(texts, config.vocabulary)
    folders = {}
    for seed, (role, build) in enumerate((("encoder", build_encoder), ("generator", build_generator))):
        folders[role] = str(tmp_path_factory.mktemp(role))
        save_checkpoint(build(config, tokenizer, seed), tokenizer, config, folders[role])
    return folders


@pytest.fixture(scope="session")
def tiny_catalogue_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest synthetic catalogue, as a Parquet file."""
    from afmrl_ray.catalogue import make_catalogue, write_catalogue
    from afmrl_ray.config.catalogue import SyntheticConfig

    path = tmp_path_factory.mktemp("catalogue") / "catalogue.parquet"
    write_catalogue(make_catalogue(SyntheticConfig(preset="tiny", image_px=56)), str(path))
    return path


@pytest.fixture(scope="session")
def tiny_catalogue_ref(tiny_catalogue_path: Path, tmp_path_factory: pytest.TempPathFactory):
    """The same, as workers open it."""
    from afmrl_ray.catalogue import CatalogueRef, open_catalogue
    from afmrl_ray.config.catalogue import CatalogueConfig

    config = CatalogueConfig(path=str(tiny_catalogue_path), cache_dir=str(tmp_path_factory.mktemp("staging")))
    fingerprint = open_catalogue(str(tiny_catalogue_path), config=config).fingerprint
    return CatalogueRef(str(tiny_catalogue_path), config, fingerprint)
