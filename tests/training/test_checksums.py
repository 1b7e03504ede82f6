from __future__ import annotations

from pathlib import Path

import pytest

from afmrl_ray.errors import CheckpointError
from afmrl_ray.training.checksums import verify_checksums, write_checksums

SHARDS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_optim.pt", "bf16_zero_pp_rank_1_optim.pt", "deep/layout.json")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name in SHARDS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode() * 40)
    for rank in range(2):
        write_checksums(str(tmp_path), rank)
    return tmp_path


def check(folder: Path, *, world: int) -> None:
    for rank in range(world):
        verify_checksums(str(folder), location="s3://b/step", writers=2, rank=rank, world=world, remedy="start again")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_intact_checkpoint_passes_on_any_number_of_ranks(checkpoint, world):
    check(checkpoint, world=world)


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_shard_is_named_by_some_rank(checkpoint, name, world, damage):
    path = checkpoint / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"^s3://b/step: {name} is damaged or missing .* or start again$"):
        check(checkpoint, world=world)


def test_the_checksums_of_a_rank_cover_only_its_own_shards(checkpoint):
    (checkpoint / "bf16_zero_pp_rank_1_optim.pt").write_bytes(b"")
    verify_checksums(str(checkpoint), location="s3://b/step", writers=2, rank=0, world=2, remedy="start again")
    with pytest.raises(CheckpointError):
        verify_checksums(str(checkpoint), location="s3://b/step", writers=2, rank=1, world=2, remedy="start again")


def test_a_missing_file_of_checksums_is_an_error(checkpoint):
    (checkpoint / "checksums-1.json").unlink()
    with pytest.raises(CheckpointError, match=r"checksums-1\.json is missing"):
        check(checkpoint, world=1)
