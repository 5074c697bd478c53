"""Evaluate a run: `python -m fastwm.eval RUN --episodes N`. Prints and writes JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastwm.eval_options import parser, positive, run_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser("eval", "Mean return of a trained agent over whole episodes.")
    options.add_argument("--envs", type=positive, default=4, help="in parallel (default 4)")
    options.add_argument("--mode", choices=("greedy", "sample"), default="greedy")
    options.add_argument("--output", type=Path, help="JSON file (default RUN/eval.json)")
    args = options.parse_args(argv)
    run = run_of(args)

    from fastwm import assemble, checkpoint
    from fastwm.loops.evaluate import Progress, evaluate, summarize

    try:
        config, agent, path, troubles = assemble.load_run(str(run), args.checkpoint, args.device)
        for trouble in troubles:
            print(f"fastwm.eval: {trouble}; using {path}", file=sys.stderr)
        assemble.set_up_torch(config)
        with Progress(args.episodes) as progress:
            found = evaluate(
                agent,
                assemble.make_envs(config),
                episodes=args.episodes,
                envs=args.envs,
                mode=args.mode,
                seed=args.seed,
                max_steps=args.max_steps,
                watch=[progress],
            )
    except assemble.MISTAKES as error:
        print(f"fastwm.eval: {error}", file=sys.stderr)
        return 2
    result = summarize(found) | {"seeds": [args.seed], "mode": args.mode}
    result |= {"task": config.task, "checkpoint": str(path)}
    rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in result.items()}
    output = args.output or (run if run.is_dir() else run.parent) / "eval.json"
    checkpoint.write_text(output, json.dumps(result) + "\n")
    print(json.dumps(rounded))
    return 0


if __name__ == "__main__":
    sys.exit(main())
