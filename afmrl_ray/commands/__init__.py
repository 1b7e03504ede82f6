"""The command `afmrl`: one module for each subcommand, imported when it is called.

`jobs/*.py` run the same functions, for `ray job submit`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run:main", "all rounds: distillation, AGCL and RAR in turn, evaluation and report"),
    "catalogue make": ("make_catalogue:main", "write the synthetic catalogue as one Parquet file"),
    "catalogue import": ("import_catalogue:main", "convert CSV, JSON Lines or M5Product to a catalogue and check it"),
    "distill": ("stages:distill", "fine-tune the generator on the teacher's attributes"),
    "annotate": ("stages:annotate", "write attributes with the generator as it is before a round"),
    "train encoder": ("stages:train_encoder", "train the encoder of a round by attribute-guided contrastive learning"),
    "train generator": ("stages:train_generator", "train the generator of a round by GRPO, rewarded with retrieval"),
    "tune generator": ("tune_generator:main", "compare settings of the generator's GRPO with Ray Tune"),
    "evaluate": ("stages:evaluate", "measure a round by every protocol"),
    "index": ("index:main", "build the index of a round, for serving"),
    "export": ("export:main", "write a trained model as one ordinary checkpoint"),
    "report": ("report:main", "write the report of a run, or compare two runs"),
    "keys": ("keys:main", "make a key of the served API"),
}
"""Words of a subcommand to `module:function` in this package and one line of help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit code: 0 done, 2 the user's input is wrong, 1 anything else."""
    words = list(sys.argv[1:] if argv is None else argv)
    for length in (2, 1):
        if (name := " ".join(words[:length])) in COMMANDS and len(words) >= length:
            module, _, function = COMMANDS[name][0].partition(":")
            found = importlib.import_module(f"{__name__}.{module}")
            return int(getattr(found, function)(words[length:]))
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"afmrl_ray {version('afmrl_ray')}\n")
        return 0
    near = [name for name in COMMANDS if name.split()[0] == words[0]]
    instead = f"{', '.join(near)}" if near else "one that `afmrl --help` lists"
    sys.stderr.write(f"error: there is no command {' '.join(words[:2])!r}; use {instead}\n")
    return 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: afmrl COMMAND [options] [section.field=value ...]",
            "",
            "Attribute-enhanced multimodal product retrieval, trained on Ray.",
            "",
            *lines,
            "",
            "`afmrl COMMAND --help` lists the options of a command.",
            "",
        ]
    )
