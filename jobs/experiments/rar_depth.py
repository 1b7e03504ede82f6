"""RAR with recall@k as its reward, for several k and seeds from one start: retrieval gain and attribute length.

Everything before RAR is trained once, with the config's own seed; finished stages are not run again. The command is run
once for each catalogue, with its config of `jobs/configs`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from afmrl_ray.cli import job_main
from afmrl_ray.config import Config
from afmrl_ray.report.estimate import Estimate
from afmrl_ray.report.format import format_mean
from afmrl_ray.report.text_table import TextTable
from afmrl_ray.retrieval.seeds import over_seeds
from jobs.experiments.stages import RewardDepths, reward_depths

OUT = Path("runs/bench")
COLUMNS = {
    "heldout_before": "reward before",
    "heldout_gain": "gain in reward",
    "hit1_before": "hit@1 % before",
    "hit1_gain": "gain in hit@1, all items with new attributes",
    "hit1_gain_queries": "gain in hit@1, queries alone",
    "pairs_before": "pairs before",
    "pairs_after": "pairs after",
    "invalid_before": "invalid % before",
    "invalid_after": "invalid % after",
    "zero_variance": "groups with zero variance %",
}
"""Headers by key of a measurement."""


def measure(depths: RewardDepths, k: int, seed: int) -> dict[str, float]:
    """Numbers of one RAR, by the keys of `COLUMNS`; hit@1, invalid and zero-variance values in per cent."""
    before = depths.hit_before()
    rar = depths.rar(k, seed)
    attributes = depths.attributes(rar)
    hit = depths.hit(f"{rar.name}-evaluate", attributes)
    hit_queries = depths.hit(f"{rar.name}-evaluate-queries", depths.query_attributes(rar, attributes))
    found = rar.metrics
    return {
        "heldout_before": found["eval/reward_before"]["mean"],
        "heldout_gain": found["eval/reward_gain"]["mean"],
        "hit1_before": 100 * before,
        "hit1_gain": 100 * (hit - before),
        "hit1_gain_queries": 100 * (hit_queries - before),
        "pairs_before": found["eval/attribute_pairs_before"],
        "pairs_after": found["eval/attribute_pairs_after"],
        "invalid_before": 100 * found["eval/invalid_fraction_before"],
        "invalid_after": 100 * found["eval/invalid_fraction_after"],
        "zero_variance": 100 * found["zero_variance"],
    }


def table(name: str, found: Mapping[tuple[int, int], Mapping[str, float]]) -> TextTable:
    """A row for each depth: means over seeds with half the width of their 95 % intervals.

    Args:
        name: name of the run.
        found: measurements by depth and seed.
    """
    rows = []
    for k in dict.fromkeys(k for k, _ in found):
        of_k = [values for (depth, _), values in found.items() if depth == k]
        cells = []
        for column in COLUMNS:
            value = over_seeds([values[column] for values in of_k])
            digits = 3 if column.startswith("heldout") else 1
            sign = "+" if column.endswith(("gain", "gain_queries")) else ""
            cells.append(format_mean(Estimate(value.mean, value.low, value.high), 1.0, digits, sign))
        rows.append([f"{k}", *cells])
    return TextTable(name, ["k", *COLUMNS.values()], rows)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 5, 10, 50, 100], help="values of k")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds of RAR's prompts and samples")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file (default: %(default)s)")


def body(config: Config, options: argparse.Namespace) -> None:
    found: dict[tuple[int, int], dict[str, float]] = {}
    out = options.out / f"rar_depth-{config.run.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with reward_depths(config) as depths:
        # Seeds are the outer loop, so that an interrupted experiment has all depths of the first seeds.
        for seed, k in product(range(options.seeds), options.depths):
            found[k, seed] = measure(depths, k, seed)
            rows = [{"k": k, "seed": seed, **values} for (k, seed), values in found.items()]
            out.write_text(json.dumps(rows, indent=2) + "\n")
            print(table(config.run.name, found).markdown(), flush=True)
    print(f"-> {out}")


def main(argv: Sequence[str] | None = None) -> int:
    return job_main(__doc__ or "", body, argv, arguments=arguments)


if __name__ == "__main__":
    sys.exit(main())
