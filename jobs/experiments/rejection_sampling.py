"""Fine-tuning that RAR is compared with: on the best of a group of samples (rejection sampling), and on labels alone.

Both get as many prompts as RAR does, and as many optimizer steps; rejection sampling also as many samples and rewards.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from afmrl_ray.attributes.store import read_attributes, write_attributes
from afmrl_ray.attributes.text import Attributes, InvalidAttributes, format_attributes
from afmrl_ray.cit.spec import StageContext, StageSpec
from afmrl_ray.cit.stages.attributes import FILE, attribute_metrics, attribute_rows
from afmrl_ray.cit.stages.training import declare_rar, generator_spec, rar_job
from afmrl_ray.config import Config
from afmrl_ray.rar.context import open_context
from afmrl_ray.runs import StageName, StageOutcome

log = logging.getLogger("afmrl_ray.ablation_study")


def best_samples_spec(config: Config, name: StageName) -> StageSpec:
    """Labels by rejection sampling: for every prompt of the first round's RAR, the sample with the highest reward."""
    rar = declare_rar(config, 0)
    return StageSpec(name, best_samples_stage, reads=rar.reads, upstream=rar.upstream, resources=rar.resources)


def best_samples_stage(context: StageContext) -> StageOutcome:
    """Samples groups as RAR does, without any update, and keeps the best sample of each prompt."""
    config, catalogue = context.config, context.catalogue.open()
    found: dict[int, str] = {}
    samples = 0
    with open_context(config, rar_job(context)) as rar:
        rar.learners.restore(0)
        rar.rollouts.push(rar.learners.weights())
        rar.rewards.wait_until_ready()
        for step in tqdm(range(config.rar.steps), desc=context.name):
            batch = rar.prefetcher.take(step)
            samples += batch.rewards.size
            texts = best_texts(batch.rewards, batch.parsed)
            found |= {group.row: text for group, text in zip(batch.groups, texts, strict=True) if text}
    rows = np.array(sorted(found))
    table = attribute_rows(catalogue.column("item_id"), rows, [(found[row], "") for row in rows.tolist()])
    write_attributes(context.path(FILE), table, fingerprint=context.upstream["generator"].fingerprint)
    metrics = attribute_metrics(read_attributes(context.path(FILE)))
    return StageOutcome({"attributes": FILE}, {**metrics, "prompts": len(rows), "samples": samples})


def best_texts(rewards: np.ndarray, parsed: Sequence[Attributes | InvalidAttributes]) -> list[str]:
    """Attribute text of the valid completion with the highest known reward of each prompt; empty where there is none.

    Args:
        rewards: [P, G], NaN where scoring failed.
        parsed: [P * G] parsed completions, group after group.
    """
    texts = []
    size = rewards.shape[1]
    for place, row in enumerate(rewards):
        group = parsed[place * size : (place + 1) * size]
        usable = [
            (reward, -index, completion)
            for index, (reward, completion) in enumerate(zip(row.tolist(), group, strict=True))
            if not isinstance(completion, InvalidAttributes) and not np.isnan(reward)
        ]
        texts.append(format_attributes(max(usable, key=lambda each: each[:2])[2]) if usable else "")
    return texts


def fine_tuning_spec(config: Config, name: StageName, labels: StageName) -> StageSpec:
    """The distilled generator trained on as many prompts and for as many steps as RAR, with labels of another stage.

    The optimizer is that of distillation, whose learning rate falls to zero once more.
    """
    changes = {"distill.steps": config.rar.steps, "distill.batch_size": config.rar.prompts_per_step}
    return generator_spec(config, name, labels=labels, previous=StageName("distill"), changes=changes)
