from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afmrl_ray.attributes.text import parse_attributes
from afmrl_ray.catalogue import CatalogueRef, StagedCatalogue
from afmrl_ray.config import Config, validate
from afmrl_ray.config.catalogue import ItemSelector
from afmrl_ray.config.models import AdapterConfig, EncoderConfig, GeneratorConfig
from afmrl_ray.config.rar import RewardConfig
from afmrl_ray.models.annotate import GeneratorRef
from afmrl_ray.rar.context import RARJob
from afmrl_ray.rar.module import PolicySpec
from afmrl_ray.rar.reward.spec import METRICS, Gallery, RewardSpec
from afmrl_ray.retrieval.embed import Encoder, EncoderRef, save_embeddings

IMAGE = {"min_pixels": 784, "max_pixels": 3136}


@pytest.fixture(scope="session")
def policy_spec(tiny_checkpoints, tiny_catalogue_ref) -> PolicySpec:
    return PolicySpec(
        start=tiny_checkpoints["generator"],
        generator=GeneratorConfig(image=IMAGE, max_new_tokens=10, max_attributes=12),
        adapter=AdapterConfig(kind="full"),
        catalogue=tiny_catalogue_ref,
        temperature=1.0,
        with_reference=True,
        seed=0,
    )


@dataclass(frozen=True)
class RewardFixture:
    """Inputs of a reward service over the tiny catalogue, and the expected metrics, computed by a plain sort."""

    spec: RewardSpec
    encoder: Encoder
    catalogue: StagedCatalogue
    rows: np.ndarray
    embeddings: np.ndarray

    def gallery(self, parts: int) -> RewardSpec:
        """The spec with its gallery in `parts` parts."""
        put = Gallery.put(self.catalogue, self.rows, self.embeddings, parts=parts)
        return replace(self.spec, galleries={"train": put})

    def by_hand(self, queries: list[tuple[int, str]], k: int, left_out=()) -> dict[str, list[float]]:
        """Every metric by sorting the whole gallery, without the query's own item, ties by item id.

        `left_out` are gallery rows that are removed; the temperature is the default one.
        """
        products, items = self.catalogue.column("product_id"), self.catalogue.column("item_id")
        found: dict[str, list[float]] = {name: [] for name in METRICS}
        for row, text in queries:
            scores = (self.encoder.embed([row], [text], inputs="both") @ self.embeddings.T)[0]
            order = np.lexsort(([items[r] for r in self.rows], -scores))
            order = np.array([i for i in order if self.rows[i] != row and self.rows[i] not in left_out])
            right = np.array([products[r] == products[row] for r in self.rows[order]])
            probabilities = torch.softmax(torch.from_numpy(scores[order]).double() / 0.05, 0).numpy()
            found["log_softmax"].append(float(np.log(probabilities[right].sum())))
            found["hit_1"].append(float(right[0]))
            gains = 1 / np.log2(np.arange(len(right)) + 2)
            found["hit"].append(float(right[:k].any()))
            found["recall"].append(right[:k].sum() / right.sum())
            found["reciprocal_rank"].append(1 / (np.flatnonzero(right)[0] + 1))
            found["ndcg"].append((gains * right)[:k].sum() / gains[: min(k, right.sum())].sum())
        return found


@pytest.fixture(scope="session")
def reward(ray_local, tiny_checkpoints, tiny_catalogue_ref) -> RewardFixture:
    ref = EncoderRef(tiny_checkpoints["encoder"], EncoderConfig(image=IMAGE))
    catalogue = tiny_catalogue_ref.open()
    rows = catalogue.rows(ItemSelector())
    encoder = Encoder(ref, tiny_catalogue_ref)
    embeddings = encoder.embed(rows.tolist(), [""] * len(rows), inputs="both")
    spec = RewardSpec(
        encoder=ref,
        catalogue=tiny_catalogue_ref,
        queries={"train": ItemSelector()},
        galleries={"train": Gallery.put(catalogue, rows, embeddings)},
        version="v1",
    )
    return RewardFixture(spec, encoder, catalogue, rows, embeddings)


def reward_config(**changes) -> RewardConfig:
    pool = {"num_workers": 2, "cpus_per_worker": 0.5, "batch_size": 3}
    return RewardConfig(**{"k": 4, "pool": pool, "timeout_s": 60, "backoff_s": 0.05, **changes})


def every_text_counts(texts, max_attributes):
    """Replaces `rollout_batch.parse_completions`: random weights write nonsense, so every text counts as valid."""
    return [
        parse_attributes(f"it: {text.encode().hex() or 'none'}", max_attributes=9, complete=True) for text, _ in texts
    ]


def small_job(
    checkpoints: dict[str, str], catalogue_ref: CatalogueRef, folder: Path, **rar: Any
) -> tuple[Config, RARJob]:
    """A RAR with two prompts of three completions a step, in `folder`."""
    config = validate(
        {
            "generator": {"image": IMAGE, "max_new_tokens": 6},
            "rar": {
                "prompts_per_step": 2,
                "group_size": 3,
                "checkpoint_every": 2,
                "heldout_samples": 1,
                "keep_best": False,
                "num_learners": 0,
                "cpus_per_learner": 0.5,
                "optimizer": {"learning_rate": 1e-3},
                "rollout": {"pool": {"cpus_per_worker": 0.5, "batch_size": 1}},
                **rar,
            },
        }
    )
    encoder = EncoderRef(checkpoints["encoder"], EncoderConfig(image=IMAGE))
    folder.mkdir(parents=True, exist_ok=True)
    gallery = str(folder / "gallery.safetensors")
    rows = np.arange(len(catalogue_ref.open()))
    vectors = Encoder(encoder, catalogue_ref).embed(rows.tolist(), [""] * len(rows), inputs="both")
    save_embeddings(gallery, rows, vectors)
    job = RARJob(
        generator=GeneratorRef(checkpoints["generator"], config.generator),
        encoder=encoder,
        catalogue=catalogue_ref,
        gallery=gallery,
        heldout_gallery=gallery,
        gallery_version="v1",
        directory=str(folder),
        name="rar-r0",
    )
    return config, job
