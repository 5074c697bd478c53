"""The options that eval, play and dream share: which run, which checkpoint, how many episodes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser(name: str, what: str, episodes: int = 10) -> argparse.ArgumentParser:
    """The options that eval, play and dream share."""
    options = argparse.ArgumentParser(f"python -m fastwm.{name}", description=what)
    options.add_argument("run", nargs="?", help="run folder, or a checkpoint file")
    options.add_argument("--logdir", dest="folder", metavar="RUN", help="another way to give RUN")
    count = {"type": positive, "metavar": "N"}
    options.add_argument("--episodes", default=episodes, **count, help=f"(default {episodes})")
    options.add_argument(
        "--checkpoint", default="best", metavar="best|latest|PATH", help="which one (default best)"
    )
    options.add_argument(
        "--use-best",
        dest="checkpoint",
        nargs="?",
        const="true",  # argparse passes it through the type, as it does a given word
        type=_best,
        metavar="true|false",
        help="the same as --checkpoint best, with `false` --checkpoint latest",
    )
    limit = "actions after which an episode counts as it stands (default 50000)"
    options.add_argument("--max-steps", default=50_000, **count, help=limit)
    options.add_argument("--seed", type=int, default=0, help="of environments and actions")
    options.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="where the networks run (default: theirs)"
    )
    return options


def run_of(args: argparse.Namespace) -> Path:
    """RUN, however it was given; exits like argparse where it was not, or twice."""
    given = [name for name in (args.run, args.folder) if name]
    if len(given) != 1:
        print(f"expected one run folder, RUN or --logdir RUN, got {len(given)}", file=sys.stderr)
        raise SystemExit(2)
    return Path(given[0])


def _best(text: str) -> str:
    found = {"true": "best", "1": "best", "yes": "best"}
    found |= {"false": "latest", "0": "latest", "no": "latest"}
    if text.lower() not in found:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return found[text.lower()]


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {number}")
    return number
