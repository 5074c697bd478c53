"""Watch a trained agent: `python -m fastwm.play RUN --episodes N --save-gif`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastwm.eval_options import parser, run_of


def options() -> argparse.ArgumentParser:
    """The options of play; a bare --action-mode and --deterministic both mean greedy."""
    found = parser("play", "Play episodes one after the other, and film them.", episodes=5)
    found.add_argument(
        "--action-mode",
        choices=("greedy", "sample"),
        nargs="?",
        const="greedy",
        default="sample",
        help="how actions are chosen: drawn (default), or the most likely ones (greedy; also "
        "without a value)",
    )
    found.add_argument(
        "--deterministic",
        dest="action_mode",
        action="store_const",
        const="greedy",
        help="the same as --action-mode greedy",
    )
    found.add_argument("--save-gif", action="store_true", help="write every episode as a GIF")
    found.add_argument("--gif-fps", type=int, default=20, help="frames per second (default 20)")
    found.add_argument("--gif-dir", type=Path, help="folder (default RUN/play)")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = options().parse_args(argv)
    run = run_of(args)

    from fastwm import assemble
    from fastwm.loops.evaluate import Film, Progress, evaluate

    folder = args.gif_dir or (run if run.is_dir() else run.parent) / "play"
    film = Film(folder, args.gif_fps) if args.save_gif else None
    try:
        config, agent, path, troubles = assemble.load_run(str(run), args.checkpoint, args.device)
        for trouble in troubles:
            print(f"fastwm.play: {trouble}; using {path}", file=sys.stderr)
        assemble.set_up_torch(config)
        with Progress(args.episodes) as progress:
            found = evaluate(
                agent,
                assemble.make_envs(config),
                episodes=args.episodes,
                envs=1,
                mode=args.action_mode,
                seed=args.seed,
                max_steps=args.max_steps,
                watch=[progress, film] if film else [progress],
            )
    except assemble.MISTAKES as error:
        print(f"fastwm.play: {error}", file=sys.stderr)
        return 2
    for i, (score, length) in enumerate(zip(found["scores"], found["lengths"], strict=True)):
        shown = f"   {film.paths[i]}" if film else ""
        print(f"episode {i}: return {score:.6g}, {length} steps{shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
