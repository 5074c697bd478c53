"""Exchange with other World Models code: `python -m fastwm.convert import SOURCE TARGET`.

import: a folder of rollout .npz files becomes a data folder (--data_dir of `train ha`), or a folder
with vae, mdrnn, ctrl/best.tar becomes a run folder. export: the other way round.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = argparse.ArgumentParser("python -m fastwm.convert", description=__doc__)
    options.add_argument("direction", choices=("import", "export"))
    options.add_argument("source", type=Path, help="folder of rollouts, models, data, or a run")
    options.add_argument("target", type=Path, help="folder to write, which must not hold any yet")
    options.add_argument(
        "--order",
        choices=("before", "after"),
        default="before",
        help="whether a line of a rollout has the observation before its action (torchwm, 2018), "
        "or after it (ctallec); default before",
    )
    options.add_argument(
        "--rows", type=int, default=0, help="upper rows of imported pictures to see (default all)"
    )
    args = options.parse_args(argv)

    from fastwm import assemble
    from fastwm.loops import ha_exchange as exchange

    try:
        if args.direction == "export":
            _export(exchange, args)
        else:
            _import(exchange, args)
    except (*assemble.MISTAKES, ValueError) as error:
        print(f"fastwm.convert: {error}", file=sys.stderr)
        return 2
    return 0


def _import(exchange, args: argparse.Namespace) -> None:
    if exchange.has_models(args.source):
        flags = exchange.import_models(args.source, args.target, print)
        print(f"use them with: python -m fastwm.train ha --logdir {args.target} {' '.join(flags)}")
        return
    store = exchange.import_rollouts(args.source, args.target, args.order, args.rows, print)
    print(f"{len(store)} episodes, {store.rows} rows: --data_dir {args.target}")


def _export(exchange, args: argparse.Namespace) -> None:
    data = args.source if (args.source / "index.json").is_file() else args.source / "data"
    if exchange.has_models(args.source):
        exchange.export_models(args.source, args.target, print)
    elif not (data / "index.json").is_file():
        raise ValueError(
            f"convert: expected a run or a data folder at {args.source}, found neither models nor "
            "episodes"
        )
    if (data / "index.json").is_file():
        exchange.export_rollouts(data, args.target, args.order, print)


if __name__ == "__main__":
    sys.exit(main())
