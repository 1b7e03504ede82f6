"""What all jobs share: arguments, config, logging, exit codes (DESIGN 4.5 and 4.7)."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm

from afmrl_ray.config import Config, dump_yaml, load_config
from afmrl_ray.errors import UserError

EXIT_DONE, EXIT_FAILED, EXIT_USER = 0, 1, 2

Body = Callable[[Config, argparse.Namespace], None]
Arguments = Callable[[argparse.ArgumentParser], None]

log = logging.getLogger("afmrl_ray")


def round_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--round`, for the jobs that run one stage of a round."""
    parser.add_argument("--round", type=_round, default=0, help="round of the run, from 0; earlier ones run if needed")


def _round(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no round: 0, 1, 2, ...")
    return int(text)


def job_main(
    description: str,
    body: Body,
    argv: Sequence[str] | None,
    *,
    arguments: Arguments | None = None,
    dry_run: Callable[[Config], str] | None = None,
) -> int:
    """Run a job and return its exit code: 0 done, 2 the user's input is wrong, 1 anything else.

    Args:
        description: first line of `--help`.
        body: the job.
        argv: command line without the program's name; none = the process's own.
        arguments: adds options of the job's own.
        dry_run: text printed after the config by `--dry-run`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file; sections and fields as in --print-config")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides, applied in order")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--dry-run", action="store_true", help="print config, schedule and resources, and exit")
    if arguments is not None:
        arguments(parser)
    options = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        config = load_config(options.config, options.overrides)
        if options.print_config or options.dry_run:
            sys.stdout.write(dump_yaml(config))
            if options.dry_run and dry_run is not None:
                sys.stdout.write("\n" + dry_run(config) + "\n")
            return EXIT_DONE
        body(config, options)
    except UserError as error:
        _tell(f"error: {' '.join(str(error).split())}")
        return EXIT_USER
    except KeyboardInterrupt:
        _tell("interrupted; run the same command again to resume")
        return EXIT_FAILED
    except Exception as error:
        log.exception("the job failed")
        where = "; ".join(getattr(error, "__notes__", [])) or "outside any stage"
        _tell(f"failed ({where}); committed stages are kept: run the same command again to resume")
        return EXIT_FAILED
    return EXIT_DONE


def _tell(line: str) -> None:
    """Print a line of its own, not behind a progress bar that the job left standing."""
    tqdm.write(line, file=sys.stderr)
