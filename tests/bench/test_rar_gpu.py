"""The script for GPU machines runs where nothing but torch and transformers is installed, and refuses unequal ways."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "jobs/bench/rar_gpu.py"
ABSENT = ("ray", "deepspeed", "pyarrow", "pydantic", "omegaconf", "PIL", "scipy", "sklearn", "rank_bm25")
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))
sys.path.insert(0, {str(SCRIPT.parent)!r})
sys.argv = ["rar_gpu.py", *sys.argv[2:]]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
SMALL = ["--device", "cpu", "--dtype", "float32", "--tiny", "--prompts", "2", "--groups", "2", "3", "--repeats", "2"]
SMALL += ["--pixels", "56", "--prompt-tokens", "20", "--completion", "3", "9", "--part-tokens", "60"]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_it_measures_both_ways_after_an_equality_check(tmp_path, adapter):
    absent = ABSENT if adapter == "lora" else (*ABSENT, "peft")
    out = subprocess.run(
        [sys.executable, "-c", RUN, ",".join(absent), *SMALL, "--adapter", adapter],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    report = json.loads((tmp_path / "runs/bench/rar_gpu.json").read_text())
    assert len(report["equality"]) == 2
    for gaps in report["equality"].values():
        assert gaps["rollout_logprob_diff"] < 1e-5
        assert gaps["gradient_gap"] < 1e-5
    updates = report["updates"]
    assert [(row["group_size"], row["checkpointing"], row["way"]) for row in updates] == [
        (size, kept, way) for size in (2, 3) for kept in (True, False) for way in ("plain", "packed")
    ]
    assert all(row["tokens_per_second"] > 0 and len(row["seconds"]) == 2 for row in updates)
    assert [row["times_plain"] is not None for row in updates] == [False, True] * 4
    for plain, packed in zip(updates[::2], updates[1::2], strict=True):
        assert plain["completion_tokens"] == packed["completion_tokens"] >= 2 * plain["group_size"] * 3
        # Every completion's prompt has 20 tokens, and an update two groups.
        assert {row["all_tokens"] - row["completion_tokens"] for row in (plain, packed)} == {40 * plain["group_size"]}
    assert all(row["all_tokens_per_second"] > row["tokens_per_second"] for row in updates)
    assert (updates[4]["parts"], updates[5]["parts"]) == (3, 2), "both ways cut by the tokens that they compute"
    assert out.stdout.count("tokens/s") == 8


@pytest.fixture
def script(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import rar_gpu

    return rar_gpu


@pytest.fixture
def policy(script):
    return script.make_policy(script.TINY, "full", torch.device("cpu"), torch.float32)


def groups(script):
    return script.make_groups(2, 3, pixels=56, prompt_tokens=20, completion=(3, 9), vocabulary=200)


def test_a_packed_way_with_other_numbers_is_refused(script, policy, monkeypatch):
    def wrong(*args):
        packed = pack(*args)
        packed.inputs["position_ids"][:, :, packed.places[packed.mask]] += 3
        return packed

    pack = script.pack
    script.equality(policy, groups(script), 1000, "float32")
    monkeypatch.setattr(script, "pack", wrong)
    with pytest.raises(AssertionError, match="is above"):
        script.equality(policy, groups(script), 1000, "float32")


def test_running_out_of_memory_is_a_result(script, policy):
    def step():
        script.Update(policy, groups(script), 1000, packed=False).backward()
        raise torch.OutOfMemoryError("CUDA out of memory")

    row = script.measure(step, policy, torch.device("cpu"), 2)
    assert (row["out_of_memory"], row["median"]) == (True, None)
    assert all(parameter.grad is None for parameter in policy.parameters()), "the next measurement starts with less"
    told = script.line(row | {"way": "plain", "group_size": 3, "checkpointing": False, "parts": 1})
    assert told.endswith("out of memory")


def test_a_prompt_shorter_than_its_image_is_refused(script):
    with pytest.raises(ValueError, match="--prompt-tokens"):
        script.make_groups(1, 1, pixels=56, prompt_tokens=6, completion=(1, 2), vocabulary=200)
