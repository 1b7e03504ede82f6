"""The step of AGCL under DeepSpeed: workers, ZeRO stages and GradCache give the gradient of one plain pass."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import distributed as dist

from afmrl_ray.agcl.prepare import Preparer
from afmrl_ray.agcl.qwen2_vl import TrainableQwen2VL
from afmrl_ray.agcl.step import AGCLStep
from afmrl_ray.attributes.store import AttributeRow, read_attributes, write_attributes
from afmrl_ray.attributes.text import format_attributes, normalise_attributes
from afmrl_ray.config import validate
from afmrl_ray.models.adapters import load_for_training
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import collate
from afmrl_ray.training.engine import Engine
from afmrl_ray.training.fit import seed_step
from afmrl_ray.training.stopwatch import Stopwatch
from tests.process_group import run_workers

BUDGET = 220
"""Tokens that cut a worker's twelve items into several parts."""


def values_of(**agcl) -> dict:
    return {
        "encoder": {"image": {"min_pixels": 784, "max_pixels": 3136}},
        "agcl": {"batch_size": 6, "mask": {"enabled": True, "threshold": 0.99, "min_negatives": 2}, **agcl},
    }


def trainable_encoder(config, base: str, catalogue) -> TrainableQwen2VL:
    model = load_for_training(base, "encoder", config.agcl.adapter, seed=0, dtype=config.encoder.dtype)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradient of the other factor
            parameter.data.copy_(torch.empty(parameter.shape).normal_(std=0.1, generator=draw))
    processor = ItemProcessor.from_pretrained(base, config.encoder.image)
    return TrainableQwen2VL(config, model, processor, catalogue)


def plain(case: tuple, ref, base: str, attributes: str, world: int) -> tuple[float, list[torch.Tensor]]:
    """One process without DeepSpeed: all activations of all workers at once, with the random numbers of each."""
    _, values = case
    config, catalogue = validate(values), ref.open()
    encoder = trainable_encoder(config, base, catalogue)
    pad_id = ItemProcessor.from_pretrained(base, config.encoder.image).pad_id
    given = (config, catalogue, encoder, read_attributes(attributes))
    kinds: list[list[torch.Tensor]] = [[], [], []]
    for rank in range(world):
        prepared = Preparer(*given, rank=rank, world=world).prepare(0)
        seed_step(0, 0, rank)
        embeddings: dict[int, torch.Tensor] = {}
        for part in prepared.parts:
            found = encoder.module(**collate([prepared.inputs[index] for index in part], pad_id))
            embeddings.update(zip(part, found, strict=True))
        own = torch.stack([embeddings[index] for index in range(len(prepared.inputs))]).split(prepared.counts)
        for kind, of_rank in zip(kinds, own, strict=True):
            kind.append(of_rank)
    everything = torch.cat([torch.cat(kind) for kind in kinds])
    whole = Preparer(*given).prepare(0)
    # With several workers, padding among the hard negatives is at the end.
    loss, _ = encoder.loss(0, whole, everything[: sum(whole.counts)], Stopwatch(torch.device("cpu")))
    loss.backward()
    return float(loss), [p.grad for p in encoder.module.parameters() if p.requires_grad]


def train(rank: int, world: int, cases: list, ref, base: str, attributes: str, folder: str) -> None:
    from deepspeed.utils import safe_get_full_grad

    for name, values in cases:
        config, catalogue = validate(values), ref.open()
        encoder = trainable_encoder(config, base, catalogue)
        engine = Engine(
            encoder.module,
            config.agcl.optimizer,
            steps=2,
            zero_stage=config.agcl.workers.zero_stage,
            bf16=config.encoder.dtype == "bfloat16",
        )
        preparer = Preparer(config, catalogue, encoder, read_attributes(attributes), rank=rank, world=world)
        step = AGCLStep(config.agcl, encoder, preparer, engine, rank=rank, world=world)
        seed_step(0, 0, rank)
        stats = step(0)
        gradients = [safe_get_full_grad(p).clone() for p in engine.parameters]
        if rank == 0:
            torch.save((stats, gradients), os.path.join(folder, f"{name}-{world}.pt"))
        dist.barrier()
        engine.close()


@pytest.fixture(scope="module")
def attributes(tiny_catalogue_ref, tmp_path_factory) -> str:
    catalogue = tiny_catalogue_ref.open()
    items = [catalogue.item(row) for row in range(len(catalogue))]
    path = str(tmp_path_factory.mktemp("attributes") / "attributes.parquet")
    rows = [AttributeRow(item.item_id, format_attributes(normalise_attributes(item.attributes))) for item in items]
    write_attributes(path, rows, fingerprint="teacher")
    return path


def check(case: tuple, folder, world: int, expected: tuple[float, list[torch.Tensor]]) -> dict[str, float]:
    stats, gradients = torch.load(folder / f"{case[0]}-{world}.pt")
    loss, wanted = expected
    assert stats["train/loss"] == pytest.approx(loss, rel=1e-5), case[0]
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * max(theirs.norm(), 1e-3), case[0]
    return stats


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world", [1, 2])
def test_gradcache_under_every_zero_stage_equals_the_plain_pass(
    tiny_checkpoints, tiny_catalogue_ref, attributes, tmp_path, world
):
    cases = [
        (
            f"zero{stage}-{kind}-{dropout}",
            values_of(
                adapter={"kind": kind, "r": 4, "dropout": dropout},
                workers={"zero_stage": stage},
                tokens_per_microbatch=BUDGET,
                learn_temperature=kind == "lora",
            ),
        )
        for stage, (kind, dropout) in itertools.product(range(4), (("lora", 0.0), ("lora", 0.3), ("full", 0.0)))
    ]
    given = (tiny_catalogue_ref, tiny_checkpoints["encoder"], attributes)
    run_workers(train, cases, *given, str(tmp_path), world=world)
    expected = {case[0][6:]: plain(case, *given, world) for case in cases if case[0].startswith("zero0")}
    assert expected["lora-0.3"][0] != pytest.approx(expected["lora-0.0"][0], rel=1e-3), "dropout does nothing"
    for case in cases:
        stats = check(case, tmp_path, world, expected[case[0][6:]])
        assert stats["data/microbatches"] > 1


@pytest.mark.timeout(300)
def test_in_bfloat16_gradcache_adds_no_error_beyond_rounding(
    tiny_checkpoints, tiny_catalogue_ref, attributes, tmp_path
):
    cases = [("lora-exact", values_of(adapter={"r": 4})), ("full-exact", values_of(adapter={"kind": "full"}))]
    for stage, kind, budget in itertools.product(range(4), ("lora", "full"), (None, BUDGET)):
        values = values_of(adapter={"kind": kind, "r": 4}, workers={"zero_stage": stage}, tokens_per_microbatch=budget)
        values["encoder"]["dtype"] = "bfloat16"
        cases.append((f"{kind}-zero{stage}-{'cut' if budget else 'whole'}", values))
    given = (tiny_catalogue_ref, tiny_checkpoints["encoder"], attributes)
    run_workers(train, cases, *given, str(tmp_path), world=1)

    def gradient(name: str) -> torch.Tensor:
        return torch.cat([part.float().flatten() for part in torch.load(tmp_path / f"{name}-1.pt")[1]])

    for kind, stage in itertools.product(("lora", "full"), range(4)):
        exact = gradient(f"{kind}-exact")
        whole, cut = (
            float((gradient(f"{kind}-zero{stage}-{which}") - exact).norm() / exact.norm()) for which in ("whole", "cut")
        )
        assert 1e-3 < whole < 0.2, "not rounded, or not the same gradient"
        assert cut < 1.25 * whole, (kind, stage)


FRACTIONS = {"train/weight_gradient_fraction", "train/sibling_gradient_fraction"}
MISSING = {"off": {"train/weight_gradient_fraction"}}


@pytest.mark.timeout(300)
def test_the_number_of_workers_changes_neither_loss_nor_gradient(
    tiny_checkpoints, hard_negatives_catalogue_ref, attributes, tmp_path
):
    """Local rows against global columns under every mask, several positives, hard negatives, both directions."""
    cases = [
        ("candidate", values_of(adapter={"kind": "full"})),
        ("one", values_of(lexical={"positive_weight": "one", "scale": "self", "idf": "batch"}, bidirectional=False)),
        (
            "margin",
            values_of(
                mask={"enabled": True, "kind": "margin", "margin": -0.05, "min_negatives": 2}, positives_per_query=2
            ),
        ),
        (
            "attributes",
            values_of(mask={"enabled": True, "kind": "attributes", "attribute_threshold": 0.5, "min_negatives": 1}),
        ),
        (
            "both",
            values_of(
                mask={"enabled": True, "kind": "both", "threshold": -1, "attribute_threshold": 0.3, "min_negatives": 1},
                lexical={"terms": "pairs", "idf_formula": "lucene", "scale": "self", "beta": 4.0},
                batch_grouping={"fraction": 1.0, "by": "attributes", "group_size": 3, "max_similarity": 1.0},
            ),
        ),
        ("off", values_of(mask={"enabled": False}, lexical={"enabled": False}, positives_per_query=2)),
        ("hard negatives", values_of(hard_negatives=2, mask={"enabled": True, "threshold": -1, "min_negatives": 0})),
        # The budget gives some workers more parts than others.
        ("cut", values_of(tokens_per_microbatch=90)),
    ]
    given = (hard_negatives_catalogue_ref, tiny_checkpoints["encoder"], attributes)
    expected = {case[0]: plain(case, *given, 1) for case in cases}
    one_worker: dict[str, dict[str, float]] = {}
    for world in (1, 2, 3):
        run_workers(train, cases, *given, str(tmp_path), world=world)
        for case in cases:
            stats = check(case, tmp_path, world, expected[case[0]])
            if case[0] in ("margin", "attributes", "both", "off", "hard negatives"):
                assert stats["train/masked_fraction"] > 0, case[0]
            fractions = {name: stats[name] for name in FRACTIONS if name in stats}
            assert set(fractions) >= FRACTIONS - MISSING.get(case[0], set()), case[0]
            assert fractions == pytest.approx(one_worker.setdefault(case[0], fractions), rel=1e-4), case[0]
