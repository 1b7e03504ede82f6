"""RAR from one start with rewards of several depths and seeds: what it gains, and what becomes of the attributes.

The reward is recall at k. Everything before RAR is done once, with the config's own seed; a cell that is done is not
done again. Give a config of `jobs/configs` and one run for each catalogue.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from scipy import stats

from afmrl_ray import storage
from afmrl_ray.cit import stage_functions
from afmrl_ray.cit.driver import open_run
from afmrl_ray.cit.evaluation import EvaluationInputs, evaluate_stage
from afmrl_ray.cit.pipeline import Pipeline
from afmrl_ray.cit.stages import Stage
from afmrl_ray.cli import job_main
from afmrl_ray.config import Config, with_values
from afmrl_ray.models.annotate import GeneratorRef
from afmrl_ray.retrieval.embed import EncoderRef
from afmrl_ray.training.metrics_log import read_metrics

OUT = Path("runs/bench")
COLUMNS = {
    "heldout_before": "reward before",
    "heldout_gain": "its gain",
    "hit1_before": "hit@1 % before",
    "hit1_gain": "its gain, all items annotated anew",
    "hit1_gain_queries": "its gain, queries alone",
    "pairs_before": "pairs before",
    "pairs_after": "after",
    "invalid_before": "invalid % before",
    "invalid_after": "after",
    "zero_variance": "groups without spread %",
}


class Cells:
    """Runs and measures RAR after RAR from the start of a run's first round."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._config = pipeline, pipeline.config
        primary_protocol = [
            p for p in self._config.evaluation.protocols if p.name == self._config.evaluation.primary_protocol
        ]
        self._evaluation = self._config.evaluation.model_copy(update={"protocols": tuple(primary_protocol)})
        agcl = pipeline.agcl(0)
        self._encoder = EncoderRef(agcl.output("model"), self._config.encoder)
        self._upstream = upstream(agcl, pipeline.gallery(0))
        self._before = self._hit("depth-before", pipeline.attributes(0))

    def cell(self, k: int, seed: int) -> dict[str, float]:
        """Numbers of one RAR."""
        changes = {"run.seed": seed, "rar.reward.k": k, "rar.reward.kind": "recall"}
        config, name = with_values(self._config, changes), f"depth-k{k}-s{seed}"
        inputs = {
            "upstream": self._upstream,
            "config": {"rar": config.rar.fingerprinted()},
            "seed": seed,
            "changes": changes,
        }
        run, reference = self._pipeline.run, self._pipeline.catalogue_ref

        def reinforced(directory: str) -> Any:
            job = self._pipeline.rar_job(0, directory)
            outcome = stage_functions.rar_stage_fn(config, job)
            steps = read_metrics(storage.join(directory, "log"))
            outcome.metrics["zero_variance"] = statistics.fmean(step["reward/zero_variance_fraction"] for step in steps)
            return outcome

        rar = run.run_stage(name, inputs, reinforced, resumable=True)
        annotate = self._config.annotate
        annotated = {"items": annotate.items.fingerprinted(), "truth": annotate.ground_truth_column}
        generator = GeneratorRef(rar.output("model"), self._config.generator)
        attributes = run.run_stage(
            f"{name}-attributes",
            {"upstream": upstream(rar), **annotated},
            lambda at: stage_functions.attributes_stage_fn(self._config, reference, generator, rar.fingerprint, at),
        )
        found = rar.metrics
        hit = self._hit(f"{name}-evaluate", attributes)
        # The gallery as RAR searched it, with the attributes from before.
        queries = run.run_stage(
            f"{name}-queries",
            {"upstream": upstream(attributes), "evaluation": self._evaluation.fingerprinted(), **annotated},
            lambda at: stage_functions.query_attributes_stage_fn(
                self._headline_config(), reference, self._pipeline.attributes(0), attributes, at
            ),
        )
        hit_queries = self._hit(f"{name}-evaluate-queries", queries)
        return {
            "heldout_before": found["eval/reward_before"]["mean"],
            "heldout_gain": found["eval/reward_gain"]["mean"],
            "hit1_before": 100 * self._before,
            "hit1_gain": 100 * (hit - self._before),
            "hit1_gain_queries": 100 * (hit_queries - self._before),
            "pairs_before": found["eval/attribute_pairs_before"],
            "pairs_after": found["eval/attribute_pairs_after"],
            "invalid_before": 100 * found["eval/invalid_fraction_before"],
            "invalid_after": 100 * found["eval/invalid_fraction_after"],
            "zero_variance": 100 * found["zero_variance"],
        }

    def _headline_config(self) -> Config:
        return self._config.model_copy(update={"evaluation": self._evaluation})

    def _hit(self, name: str, attributes: Stage) -> float:
        asked = EvaluationInputs(
            self._headline_config(), self._pipeline.catalogue_ref, self._encoder, attributes.output("attributes")
        )
        inputs = {
            "upstream": {**self._upstream, **upstream(attributes)},
            "evaluation": self._evaluation.fingerprinted(),
        }
        stage = self._pipeline.run.run_stage(name, inputs, lambda at: evaluate_stage(asked, at))
        return float(stage.metrics["protocols"][self._evaluation.primary_protocol]["metrics"]["hit@1"]["mean"])


def upstream(*stages: Stage) -> dict[str, str]:
    """Fingerprints by name, as all stages name those that they stand on."""
    return {stage.name: stage.fingerprint for stage in stages}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over seeds (Student's t)."""
    if len(values) < 2:
        return values[0], math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * error


def table(name: str, cells: Mapping[tuple[int, int], Mapping[str, float]]) -> str:
    """A row for each depth as Markdown, means over seeds with intervals."""
    lines = [f"| {name}: k | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for k in dict.fromkeys(k for k, _ in cells):
        of_k = [values for (depth, _), values in cells.items() if depth == k]
        shown = []
        for column in COLUMNS:
            mean, half = interval([values[column] for values in of_k])
            digits = 3 if column.startswith("heldout") else 1
            sign = "+" if column.endswith("gain") else ""
            shown.append(f"{mean:{sign}.{digits}f} ± {half:.{digits}f}")
        lines.append(f"| {k} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 5, 10, 50, 100])
    parser.add_argument("--seeds", type=int, default=3, help="of RAR's prompts and samples")


def body(config: Config, options: argparse.Namespace) -> None:
    found: dict[tuple[int, int], dict[str, float]] = {}
    out = OUT / f"rar_depth-{config.run.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with open_run(config) as pipeline:
        cells = Cells(pipeline)
        # Seeds outside, so that a run that is stopped has all depths of the first ones.
        for seed, k in product(range(options.seeds), options.depths):
            found[k, seed] = cells.cell(k, seed)
            rows = [{"k": k, "seed": seed, **values} for (k, seed), values in found.items()]
            out.write_text(json.dumps(rows, indent=2) + "\n")
            print(table(config.run.name, found), flush=True)
    print(f"-> {out}")


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
