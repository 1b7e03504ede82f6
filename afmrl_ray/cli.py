"""Command line of all jobs: arguments, config, logging, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm

from afmrl_ray.config import Config, dump_yaml, load_config
from afmrl_ray.errors import UserError
from afmrl_ray.user_name import user_name

EXIT_SUCCESS, EXIT_FAILURE, EXIT_USER_ERROR = 0, 1, 2

Job = Callable[[Config, argparse.Namespace], None]
Arguments = Callable[[argparse.ArgumentParser], None]

log = logging.getLogger("afmrl_ray")


def round_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--round`, for the jobs that run one stage of a round."""
    parser.add_argument(
        "--round", type=_round, default=0, help="round of the run, from 0; missing earlier stages run first"
    )


def _round(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a round number: 0, 1, 2, ...")
    return int(text)


def job_main(
    description: str,
    job: Job,
    argv: Sequence[str] | None,
    *,
    arguments: Arguments | None = None,
    dry_run: Callable[[Config], str] | None = None,
) -> int:
    """Run a job and return its exit code: 0 on success, 2 for a `UserError`, 1 for any other failure.

    Args:
        description: first line of `--help`.
        job: called with the config and the parsed arguments.
        argv: command line without the program's name; none = that of the process.
        arguments: adds the job's own options.
        dry_run: returns the text that `--dry-run` prints after the config.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file; sections and fields as in --print-config")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="overrides, applied in order")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--dry-run", action="store_true", help="print config, schedule and resources, and exit")
    if arguments is not None:
        arguments(parser)
    options = parser.parse_intermixed_args(argv)
    # Libraries ask for the user's name too, and fail where the system knows none.
    os.environ.setdefault("LOGNAME", user_name())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        config = load_config(options.config, options.overrides)
        if options.print_config or options.dry_run:
            sys.stdout.write(dump_yaml(config))
            if options.dry_run and dry_run is not None:
                sys.stdout.write("\n" + dry_run(config) + "\n")
            return EXIT_SUCCESS
        job(config, options)
    except UserError as error:
        _print_line(f"error: {' '.join(str(error).split())}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _print_line("interrupted; run the same command again to resume")
        return EXIT_FAILURE
    except Exception as error:
        log.exception("the job failed")
        where = "; ".join(getattr(error, "__notes__", [])) or "outside any stage"
        _print_line(f"failed ({where}); committed stages are kept: run the same command again to resume")
        return EXIT_FAILURE
    return EXIT_SUCCESS


def _print_line(line: str) -> None:
    """Print a line to stderr, below progress bars that are still on the screen."""
    tqdm.write(line, file=sys.stderr)
