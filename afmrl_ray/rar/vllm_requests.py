"""Prompts and sampling options for vLLM, and groups from its outputs; nothing here imports vLLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import ModelInput, Visual
from afmrl_ray.rar.messages import PromptGroup


def shown_image(visual: Visual, merge_size: int) -> Image.Image:
    """The image as the vision tower gets it, at the size of its grid.

    vLLM resizes with another library, whose pixels differ from ours; it leaves an image of the right size as it is.

    Args:
        merge_size: patches per visual token along each axis.
    """
    assert visual.patches is not None, "the image went through the tower already"
    _, height, width = visual.grid
    _, channels, area = visual.patches.shape
    side = math.isqrt(area)
    # Patches are ordered by visual token, merge x merge patches each.
    tiles = visual.patches.reshape(
        height // merge_size, width // merge_size, merge_size, merge_size, channels, side, side
    )
    return Image.fromarray(tiles.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height * side, width * side, channels))


def prompt_of(row: ModelInput, merge_size: int) -> dict[str, Any]:
    """vLLM's tokens prompt: one placeholder per image, which vLLM repeats for every visual token of the image."""
    visual = row.token_types == 1
    first = visual & ~np.append(False, visual[:-1])
    prompt: dict[str, Any] = {"prompt_token_ids": row.input_ids[~visual | first].tolist()}
    if row.visuals:
        prompt["multi_modal_data"] = {"image": [shown_image(one, merge_size) for one in row.visuals]}
    return prompt


def completion_seeds(seed: int, group_size: int) -> list[int]:
    """[G] seeds of the completions of a group.

    vLLM's own `n` would use consecutive seeds, so that groups with nearby seeds would share completions.
    """
    return (np.random.SeedSequence(seed).generate_state(group_size, np.uint64) >> np.uint64(1)).tolist()


def sampling_options(
    processor: ItemProcessor, *, seed: int | None, max_new_tokens: int, temperature: float
) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` for one completion, with the sampling rules of `models.generation`.

    Without a seed, decoding is greedy, which vLLM does at temperature 0.
    The end of turn is the only stop token. Forbidden tokens get a bias of -inf, since vLLM limits the length of a list
    of allowed tokens.
    """
    return {
        "seed": seed,
        "temperature": 0.0 if seed is None else temperature,
        "max_tokens": max_new_tokens,
        "stop_token_ids": [processor.end_id],
        "ignore_eos": True,
        "logit_bias": dict.fromkeys(processor.forbidden_ids, -math.inf),
        "logprobs": 0,
        "detokenize": False,
    }


def groups_of(
    rows: Sequence[int],
    prompts: Sequence[ModelInput],
    outputs: Sequence[Any],
    processor: ItemProcessor,
    *,
    group_size: int,
    version: int,
) -> list[PromptGroup]:
    """Groups from vLLM's `RequestOutput`s, padded to the longest completion of all.

    Args:
        rows: [B] catalogue rows.
        prompts: [B] prompts.
        outputs: [B*G] outputs with one completion each, groups in the order of the prompts.

    Raises:
        RuntimeError: vLLM read other tokens than the prompt's, or ended a completion for another reason than the stop
            token or the token limit.
    """
    longest = max(len(output.outputs[0].token_ids) for output in outputs)
    groups = []
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        ids = np.full((group_size, longest), processor.pad_id, dtype=np.int64)
        mask = np.zeros((group_size, longest), dtype=bool)
        logp = np.zeros((group_size, longest), dtype=np.float32)
        texts = []
        for place, output in enumerate(outputs[index * group_size : (index + 1) * group_size]):
            _check(output, prompt, row)
            completion = output.outputs[0]
            tokens = list(completion.token_ids)
            ids[place, : len(tokens)] = tokens
            mask[place, : len(tokens)] = True
            steps = zip(tokens, completion.logprobs, strict=True)
            logp[place, : len(tokens)] = [step[token].logprob for token, step in steps]
            texts.append(processor.decode(tokens))
        groups.append(PromptGroup(row, version, ids, mask, logp, texts))
    return groups


def _check(output: Any, prompt: ModelInput, row: int) -> None:
    read = np.asarray(output.prompt_token_ids)
    if not np.array_equal(read, prompt.input_ids):
        raise RuntimeError(
            f"catalogue row {row}: vLLM read {len(read)} tokens that are not the {len(prompt)} of the prompt; its "
            "processor makes other visual tokens of the image"
        )
    reason = output.outputs[0].finish_reason
    if reason not in ("stop", "length"):
        raise RuntimeError(f"catalogue row {row}: vLLM ended a completion by {reason!r}")
