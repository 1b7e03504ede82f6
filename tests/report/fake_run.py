"""A fixture: a run directory with invented numbers, committed by the real stage machinery without any training."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from PIL import Image, ImageDraw

from afmrl_ray import storage
from afmrl_ray.runs import RunDirectory, Stage, StageOutcome

CONFIG = {
    "run": {"name": "fake", "seed": 0},
    "agcl": {"steps": 60},
    "evaluation": {"primary_protocol": "fine"},
    "teacher": {"base_url": "https://user:secret@teacher.example/v1"},
}
STEPS = 60


class FakeItems:
    """Coloured shapes in place of a catalogue."""

    def image(self, row: int) -> Image.Image:
        draw = random.Random(row)
        image = Image.new("RGB", (224, 224), tuple(draw.randrange(190, 245) for _ in range(3)))
        colour = tuple(draw.randrange(20, 200) for _ in range(3))
        getattr(ImageDraw.Draw(image), draw.choice(["ellipse", "rectangle"]))((50, 40, 180, 190), fill=colour)
        return image


class FakeRun:
    """Commits stages with numbers that differ everywhere, so that a mixed-up cell is seen.

    Args:
        storage_path: folder that gets the run.
        title: title of the first example.
        attributes: generated attributes of the first example.
    """

    def __init__(self, storage_path: str, *, title: str = "Blue mug", attributes: str = "color: blue") -> None:
        self.run = RunDirectory(storage_path, "fake")
        self.run.create()
        self.run.write_run(
            {
                "name": "fake",
                "config": CONFIG,
                "versions": {"afmrl_ray": "0.1.0", "ray": "2.60.0"},
                "catalogue": {
                    "fingerprint": "f" * 64,
                    "rows": 1210,
                    "kept": 1200,
                    "quarantined": {"image missing": 10},
                },
                "command": "python jobs/run_cit.py --config jobs/configs/fake.yaml",
            }
        )
        self._title, self._attributes = title, attributes
        self._draw = random.Random(1)

    def everything(self, rounds: int = 2, *, baseline: bool = True) -> RunDirectory:
        """All stages of a run in the driver's order."""
        self.stage("catalogue", {})
        self.stage("models", {"encoder": {"first_loss": 6.5, "last_loss": 5.4}})
        self.stage("labels", self.sizes(9.0))
        self.stage("distill", {"train/loss": 0.81}, log=["train/loss"])
        self.stage(
            "baselines",
            {"pixels": self.baseline_metrics(0.09, pixels=True), "chance": self.baseline_metrics(0.004, pixels=False)},
        )
        if baseline:
            self.stage(
                "baseline",
                {"train/loss": 2.2, "train/accuracy": 0.31},
                log=["train/loss", "train/accuracy", "train/masked_fraction"],
            )
            self.stage("evaluate-baseline", {"protocols": self.protocols(0.31)}, "baseline", examples=True)
        for number in range(rounds):
            self.round(number)
        return self.run

    def round(self, number: int) -> None:
        """All stages of one round."""
        n = number
        gradients = ["train/weight_gradient_fraction", "train/sibling_gradient_fraction"]
        self.stage(f"attributes-r{n}", self.sizes(8.3 - n))
        agcl_keys = ["train/loss", "train/accuracy", "train/masked_fraction", "train/positive_similarity", *gradients]
        self.stage(
            f"agcl-r{n}", {"train/loss": 1.9 - 0.1 * n, "train/accuracy": 0.4}, f"attributes-r{n}", log=agcl_keys
        )
        self.stage(f"gallery-r{n}", {"gallery": 300}, f"agcl-r{n}")
        before = 0.42 + 0.07 * n
        rar = {
            "eval/reward_before": interval(before, 0.02),
            "eval/reward_after": interval(before + 0.051, 0.02),
            "eval/reward_gain": interval(0.051, 0.013),
            "reward/mean": 0.457 + 0.07 * n,
            "rollout/invalid_fraction": 0.012,
            "data/prompts": 512,
            "data/dropped_prompts": 3,
            "actor/rollout_logprob_diff": math.nan,
        }
        keys = [
            "reward/mean",
            "actor/kl",
            "rollout/invalid_fraction",
            "reward/zero_variance_fraction",
            "rollout/attribute_pairs",
            "actor/rollout_logprob_diff",
        ]
        keys += [f"rollout/name_fraction/{name}" for name in ("color", "size", "material", "neckline")]
        self.stage(f"rar-r{n}", rar, f"gallery-r{n}", log=keys)
        self.stage(f"attributes-r{n + 1}", self.sizes(7.3 - n))
        metrics = {"protocols": self.protocols(0.444 + 0.06 * n), "attributes": self.sizes(7.3 - n)}
        self.stage(f"evaluate-r{n}", metrics, f"agcl-r{n}", f"attributes-r{n + 1}", examples=True)
        promotion = {"promoted": n != 1, "why": ["labels changes by -0.0310"] if n == 1 else []}
        gain = {"gain": interval(0.06, 0.011)} if n else {}
        self.stage(f"promotion-r{n}", {**promotion, **gain}, f"evaluate-r{n}")

    def stage(
        self, name: str, metrics: dict[str, Any], *upstream: str, log: list[str] | None = None, examples: bool = False
    ) -> Stage:
        """Commit one stage."""
        above = {up: stage.fingerprint for up in upstream if (stage := self.run.committed(up)) is not None}
        inputs = {"config": {"agcl": CONFIG["agcl"], "run": {"seed": 0}}, "upstream": above}

        def body(directory: str) -> StageOutcome:
            if log:
                lines = [
                    json.dumps({"step": step, **{key: self._point(key, step) for key in log}}) for step in range(STEPS)
                ]
                storage.write_bytes(storage.join(directory, "log", "metrics.jsonl"), ("\n".join(lines) + "\n").encode())
            if examples:
                storage.write_json(storage.join(directory, "examples.json"), self._examples())
            return StageOutcome({"examples": "examples.json"} if examples else {}, metrics)

        return self.run.run_stage(name, inputs, body)

    def _point(self, key: str, step: int) -> float | None:
        if key == "actor/kl" and step == 0:
            return None
        return self._draw.gauss(1 - math.exp(-step / 20) if key != "train/loss" else 2 * math.exp(-step / 20), 0.08)

    def _examples(self) -> list[dict[str, Any]]:
        titles = [self._title, "NEW hot sale steel bottle 500 ml with handle, free shipping, best gift", ""]
        written = [
            self._attributes,
            "color: black; pattern: striped; shape: round; material: steel; capacity: 500 ml",
            "",
        ]
        return [
            {
                "query_row": 10 * index,
                "item_id": f"item-{index:05d}",
                "title": title,
                "attributes": text,
                "hits": [
                    {
                        "row": 10 * index + hit,
                        "item_id": f"item-{7 * hit:05d}",
                        "score": 0.93 - hit / 50,
                        "right": hit == index,
                    }
                    for hit in range(5)
                ],
            }
            for index, (title, text) in enumerate(zip(titles, written, strict=True))
        ]

    def protocols(self, level: float) -> dict[str, Any]:
        """A retrieval protocol, a second one and a label protocol; numbers grow with `level`."""
        retrieval = {
            f"{name}@{k}": interval(level + 0.013 * k + shift, 0.021)
            for k in (1, 5, 10)
            for name, shift in (("hit", 0.0), ("recall", -0.011))
        }
        retrieval |= {"map@10": interval(level + 0.027, 0.02), "map_m5@10": interval(level + 0.029, 0.02)}
        names = ("probe_accuracy", "knn_accuracy", "nmi", "ari", "purity")
        labels = {
            name: {"mean": 0.5 + level / 2 - 0.031 * i, "low": None, "high": None} for i, name in enumerate(names)
        }
        coarse = {"hit@1": interval(level + 0.2, 0.01)}
        return {
            "labels": {"kind": "labels", "queries": 480, "gallery": 700, "metrics": labels},
            "coarse": {"kind": "retrieval", "queries": 77, "gallery": 88, "metrics": coarse},
            "fine": {"kind": "retrieval", "queries": 480, "gallery": 720, "metrics": retrieval},
        }

    def baseline_metrics(self, level: float, *, pixels: bool) -> dict[str, Any]:
        """Retrieval only; chance has neither counts nor intervals."""
        if pixels:
            return {name: found for name, found in self.protocols(level).items() if name != "labels"}
        metrics = {f"hit@{k}": {"mean": level * k, "low": None, "high": None} for k in (1, 5, 10)}
        return {"fine": {"kind": "retrieval", "metrics": metrics}}

    @staticmethod
    def sizes(words: float) -> dict[str, Any]:
        names = {
            name: {"written": words / 10 - shift, "source": 1.0} for name, shift in (("size", 0.3), ("color", 0.01))
        }
        quality = {"precision": words / 11, "recall": words / 13, "f1": words / 12, "names": names}
        return {"mean_words": words, "mean_pairs": words / 2.1, "invalid_fraction": words / 300, "quality": quality}


def interval(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half * 1.1}
