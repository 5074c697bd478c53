"""Train: `python -m fastwm.train ALGORITHM [PRESET ...] [--dotted.key value ...]`, see --help."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fastwm import config as settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a mistake, 3 for non-finite updates."""
    try:
        config, _ = settings.load(sys.argv[1:] if argv is None else argv)
    except settings.ConfigError as error:
        print(f"fastwm.train: {error}", file=sys.stderr)
        return 2

    from fastwm import assemble  # after --help and settings errors, which need no torch

    try:
        return train(config, assemble.run_folder(config))
    except assemble.MISTAKES as error:
        print(f"fastwm.train: {error}", file=sys.stderr)
        return 2


def train(config, folder) -> int:
    """Start or continue the run of a folder."""
    from fastwm import assemble, checkpoint
    from fastwm.checkpoint_partial import load_weights
    from fastwm.loops import online

    with checkpoint.lock(folder):
        if config.algorithm == "ha":
            from fastwm import assemble_ha

            return assemble_ha.train(config, folder)
        stored, notes = assemble.read_folder(config, folder)
        run = build(config, folder, stored)
        try:
            assemble.announce(run)
            if config.from_checkpoint and stored is None:
                source, regex = config.from_checkpoint, config.from_checkpoint_regex
                notes += load_weights(run.agent.model, source, regex)
            for note in notes:
                run.logger.say(note)
            if stored:
                run.logger.say(
                    f"resume   from env_steps {stored['env_steps']}, updates {stored['updates']}"
                )
            return online.train(run, stored)
        finally:
            run.logger.close()
            if run.envs is not None:
                run.envs.close()


def build(config, folder, stored):
    """The pieces of a run: on environments, or on stored episodes."""
    from fastwm import assemble

    if config.offline_traindir:
        from fastwm import assemble_offline

        return assemble_offline.offline_run(config, folder, stored)
    return assemble.online_run(config, folder, stored)


if __name__ == "__main__":
    sys.exit(main())
