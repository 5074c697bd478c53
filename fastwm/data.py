"""`python -m fastwm.data show FOLDER | export RUN FOLDER`: stored episodes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m fastwm.data", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    show = verbs.add_parser("show", help="what a folder of episodes holds")
    show.add_argument("folder", type=Path)
    export = verbs.add_parser("export", help="write a run's replay as one npz file per episode")
    export.add_argument("run", type=Path, help="run folder")
    export.add_argument("folder", type=Path, help="where the files go")
    args = parser.parse_args(argv)

    from fastwm.checkpoint import CheckpointError
    from fastwm.replay_import import DataError
    from fastwm.settings import ConfigError

    try:
        for line in describe(args.folder) if args.verb == "show" else save(args.run, args.folder):
            print(line)
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"fastwm.data: {error}", file=sys.stderr)
        return 2
    return 0


def describe(folder: Path) -> list[str]:
    """Rows, spaces, episodes and their returns."""
    from fastwm.replay_import import Folder

    data = Folder(folder)
    obs_space, act_space = data.spaces()
    returns, score = [], 0.0
    for rows in data.pieces(obs_space, act_space):
        for first, last, reward in zip(
            rows["is_first"], rows["is_last"], rows["reward"], strict=True
        ):
            score = (0.0 if first else score) + float(reward)
            if last:
                returns.append(score)
    lines = [f"{data.rows:,} rows in {len(data.files)} files, {len(returns)} whole episodes"]
    if returns:
        mean = sum(returns) / len(returns)
        lines.append(f"return {mean:.6g} on average, {min(returns):.6g} to {max(returns):.6g}")
    spaces = {**obs_space, "action": act_space}
    return lines + [f"{name}: {s.kind} {s.classes or s.shape}" for name, s in spaces.items()]


def save(run: Path, folder: Path) -> list[str]:
    """Every whole episode that the run's latest checkpoint still holds."""
    from fastwm import checkpoint
    from fastwm.replay import Replay
    from fastwm.replay_import import DataError, episodes, write_episode
    from fastwm.spaces import Space

    stored = checkpoint.load(run / "checkpoint" / "latest.pt")
    manifest = stored.get("replay")
    if manifest is None:
        raise DataError(f"data: expected a run with --replay.save true, got none in {run}")
    spec = {name: (tuple(shape), dtype) for name, (shape, dtype) in manifest["spec"].items()}
    count = manifest["num_envs"]
    rows = count * manifest["length"]
    replay = Replay(spec, count, rows, manifest["batch_length"], force=True)
    replay.load(run / "replay", manifest)
    space = Space.from_dict(stored["act_space"])
    files = [write_episode(folder, n, e, space) for n, e in enumerate(episodes(replay))]
    return [f"wrote {len(files)} episodes to {folder}"]


if __name__ == "__main__":
    sys.exit(main())
