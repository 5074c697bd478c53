"""Watch a trained agent: `python -m fastwm.play RUN --episodes N --save-gif`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from fastwm.eval import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser("play", "Play episodes one after the other, and film them.")
    options.add_argument(
        "--action-mode", choices=("greedy", "sample"), default="greedy", help="default greedy"
    )
    options.add_argument("--save-gif", action="store_true", help="write every episode as a GIF")
    options.add_argument("--gif-fps", type=int, default=30, help="frames per second (default 30)")
    options.add_argument("--gif-dir", type=Path, help="folder (default RUN/play)")
    args = options.parse_args(argv)

    from fastwm import assemble
    from fastwm.loops.evaluate import Film, evaluate

    run = Path(args.run)
    folder = args.gif_dir or (run if run.is_dir() else run.parent) / "play"
    film = Film(folder, args.gif_fps) if args.save_gif else None
    try:
        config, agent, path, troubles = assemble.load_run(args.run, args.checkpoint, args.device)
        for trouble in troubles:
            print(f"fastwm.play: {trouble}; using {path}", file=sys.stderr)
        assemble.set_up_torch(config)
        found = evaluate(
            agent,
            assemble.make_envs(config),
            episodes=args.episodes,
            envs=1,
            mode=args.action_mode,
            seed=args.seed,
            watch=film,
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
