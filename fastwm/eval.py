"""Evaluate a run: `python -m fastwm.eval RUN --episodes N`. Prints and writes JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def parser(name: str, what: str) -> argparse.ArgumentParser:
    """The options that eval and play share."""
    options = argparse.ArgumentParser(f"python -m fastwm.{name}", description=what)
    options.add_argument("run", help="run folder, or a checkpoint file")
    options.add_argument("--episodes", type=_positive, default=10, help="how many (default 10)")
    options.add_argument(
        "--checkpoint", default="best", metavar="best|latest|PATH", help="which one (default best)"
    )
    options.add_argument("--seed", type=int, default=0, help="of environments and actions")
    options.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="where the networks run (default: theirs)"
    )
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {number}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser("eval", "Mean return of a trained agent over whole episodes.")
    options.add_argument("--envs", type=_positive, default=4, help="in parallel (default 4)")
    options.add_argument("--mode", choices=("greedy", "sample"), default="greedy")
    options.add_argument("--output", type=Path, help="JSON file (default RUN/eval.json)")
    args = options.parse_args(argv)

    from fastwm import assemble, checkpoint
    from fastwm.loops.evaluate import evaluate, summarize

    try:
        config, agent, path, troubles = assemble.load_run(args.run, args.checkpoint, args.device)
        for trouble in troubles:
            print(f"fastwm.eval: {trouble}; using {path}", file=sys.stderr)
        assemble.set_up_torch(config)
        found = evaluate(
            agent,
            assemble.make_envs(config),
            episodes=args.episodes,
            envs=args.envs,
            mode=args.mode,
            seed=args.seed,
        )
    except assemble.MISTAKES as error:
        print(f"fastwm.eval: {error}", file=sys.stderr)
        return 2
    result = summarize(found) | {"seeds": [args.seed], "mode": args.mode}
    text = json.dumps(result | {"task": config.task, "checkpoint": str(path)})
    run = Path(args.run)
    output = args.output or (run if run.is_dir() else run.parent) / "eval.json"
    checkpoint.write_text(output, text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
