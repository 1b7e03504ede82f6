"""The benchmark for GPU machines runs where only torch and transformers are installed, and refuses unequal updates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.benchmarks import rar_gpu, rar_gpu_update

ROOT = Path(__file__).resolve().parents[3]
ABSENT = ("ray", "deepspeed", "pyarrow", "pydantic", "omegaconf", "PIL", "scipy", "sklearn", "rank_bm25")
RUN = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))
del sys.argv[1]
runpy.run_module("jobs.benchmarks.rar_gpu", run_name="__main__", alter_sys=True)
"""
SMALL = ["--device", "cpu", "--dtype", "float32", "--tiny", "--prompts", "2", "--groups", "2", "3", "--repeats", "2"]
SMALL += ["--pixels", "56", "--prompt-tokens", "20", "--completion", "3", "9", "--part-tokens", "60"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_packed_and_plain_updates_are_measured_after_an_equality_check(tmp_path, adapter):
    out = tmp_path / "rar_gpu.json"
    absent = ABSENT if adapter == "lora" else (*ABSENT, "peft")
    done = subprocess.run(
        [sys.executable, "-c", RUN, ",".join(absent), *SMALL, "--adapter", adapter, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert len(report["equality"]) == 2
    for gaps in report["equality"].values():
        assert gaps["rollout_logprob_diff"] < 1e-5
        assert gaps["gradient_gap"] < 1e-5
    updates = report["updates"]
    assert [(row["group_size"], row["checkpointing"], row["layout"]) for row in updates] == [
        (size, checkpointing, layout)
        for size in (2, 3)
        for checkpointing in (True, False)
        for layout in ("plain", "packed")
    ]
    assert all(row["tokens_per_second"] > 0 and len(row["seconds"]) == 2 for row in updates)
    assert [row["times_plain"] is not None for row in updates] == [False, True] * 4
    for plain, packed in zip(updates[::2], updates[1::2], strict=True):
        assert plain["completion_tokens"] == packed["completion_tokens"] >= 2 * plain["group_size"] * 3
        # Every completion's prompt has 20 tokens, and an update two groups.
        assert {row["all_tokens"] - row["completion_tokens"] for row in (plain, packed)} == {40 * plain["group_size"]}
    assert all(row["all_tokens_per_second"] > row["tokens_per_second"] for row in updates)
    # Micro-batches are cut by the tokens that are computed.
    assert (updates[4]["parts"], updates[5]["parts"]) == (3, 2)
    assert done.stdout.count("tokens/s") == 8


@pytest.fixture
def policy():
    return rar_gpu_update.make_policy(rar_gpu_update.TINY, "full", torch.device("cpu"), torch.float32)


def groups():
    return rar_gpu_update.make_groups(2, 3, pixels=56, prompt_tokens=20, completion=(3, 9), vocabulary=200)


def test_a_packed_update_with_other_numbers_is_refused(policy, monkeypatch):
    def wrong(*args):
        packed = pack(*args)
        packed.inputs["position_ids"][:, :, packed.places[packed.mask]] += 3
        return packed

    pack = rar_gpu_update.pack
    rar_gpu_update.equality(policy, groups(), 1000, "float32")
    monkeypatch.setattr(rar_gpu_update, "pack", wrong)
    with pytest.raises(AssertionError, match="is above"):
        rar_gpu_update.equality(policy, groups(), 1000, "float32")


def test_running_out_of_memory_is_a_result(policy):
    def step():
        rar_gpu_update.Update(policy, groups(), 1000, packed=False).backward()
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = rar_gpu.measure(step, policy, torch.device("cpu"), 2)
    assert (row["out_of_memory"], row["median"]) == (True, None)
    assert all(parameter.grad is None for parameter in policy.parameters()), "gradients are still allocated"
    line = rar_gpu.line(row | {"layout": "plain", "group_size": 3, "checkpointing": False, "parts": 1})
    assert line.endswith("out of memory")


def test_a_prompt_shorter_than_its_image_is_refused():
    with pytest.raises(ValueError, match="--prompt-tokens"):
        rar_gpu_update.make_groups(1, 1, pixels=56, prompt_tokens=6, completion=(1, 2), vocabulary=200)
