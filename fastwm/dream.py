"""Look into a dream: `python -m fastwm.dream RUN` films it, with --keys you play it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastwm.eval_options import parser, positive, run_of

HELP = "arrows act, + and - temperature, c the agent acts, r again, q ends"


def options() -> argparse.ArgumentParser:
    found = parser("dream", "Dream episodes in a run's world model, and film them.", episodes=1)
    found.add_argument("--temperature", type=float, help="of World Models (default: the run's)")
    found.add_argument("--keys", action="store_true", help=f"play it in this terminal: {HELP}")
    found.add_argument("--context", type=int, default=20, help="real steps that Dreamer sees first")
    found.add_argument("--gif-fps", type=positive, default=20, help="pictures per second")
    found.add_argument("--gif-dir", type=Path, help="folder (default RUN/dream)")
    found.add_argument("--scale", type=positive, default=4, help="pixels per pixel of a GIF")
    found.set_defaults(max_steps=None)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = options().parse_args(argv)
    run = run_of(args)

    from fastwm import assemble
    from fastwm.loops import dreams
    from fastwm.loops.terminal import is_terminal

    try:
        dream = _dream(run, args)
        if args.keys and is_terminal():
            dreams.play(dream, args.gif_fps, HELP)
            return 0
        if args.keys:
            print("fastwm.dream: no terminal with keys here, filming instead", file=sys.stderr)
        folder = args.gif_dir or (run if run.is_dir() else run.parent) / "dream"
        dreams.film(dream, folder, args.episodes, args.gif_fps, args.scale)
    except assemble.MISTAKES as error:
        print(f"fastwm.dream: {error}", file=sys.stderr)
        return 2
    return 0


def _dream(run: Path, args: argparse.Namespace) -> Any:
    from fastwm import assemble, settings
    from fastwm.loops import dreams

    config, agent, path, troubles = assemble.load_run(str(run), args.checkpoint, args.device)
    for trouble in troubles:
        print(f"fastwm.dream: {trouble}; using {path}", file=sys.stderr)
    make_envs = assemble.make_envs(config)
    if config.algorithm == "ha":
        heat = config.dream.temperature if args.temperature is None else args.temperature
        if not heat >= 0:
            raise settings.ConfigError(f"--temperature: expected a number >= 0, got {heat}")
        folder = run if run.is_dir() else path.parent.parent
        starts = dreams.ha_starts(folder, config, agent.policy, make_envs)
        limits = {"temperature": heat, "length": args.max_steps or config.dream.length}
        return dreams.HaDream(agent.policy.eval(), starts, **limits, seed=args.seed)
    if not config.algorithm.startswith("dreamerv3"):
        raise settings.ConfigError(f"expected a run of ha or dreamerv3, got {config.algorithm}")
    if args.temperature is not None:
        raise settings.ConfigError("--temperature: expected a run of ha, got one of dreamerv3")
    limits = {"length": args.max_steps or 200, "context": args.context}
    return dreams.DreamerDream(agent, make_envs, **limits, seed=args.seed)


if __name__ == "__main__":
    sys.exit(main())
