"""What a run's numbers say: `python -m fastwm.diagnose RUN`. Prints the rules that fire."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from fastwm import config as settings
from fastwm.diagnose_rules import Finding, History, findings


def read(run: Path) -> History:
    """The rows and settings of a run folder; a last line that is being written is left out."""
    path = run / "metrics.jsonl"
    if not path.is_file() or not (run / "config.toml").is_file():
        raise settings.ConfigError(
            f"expected a run folder with metrics.jsonl and config.toml, got {run}; "
            "a run writes them from its first log interval on"
        )
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    config = settings.from_dict(tomllib.loads((run / "config.toml").read_text()))
    return History(rows, settings.flatten(config))


def show(history: History, found: list[Finding], everything: bool) -> str:
    config, last = history.config, history.rows[-1] if history.rows else {}
    lines = [
        f"{config['algorithm']} on {config['task']}: env_steps {last.get('env_steps', 0)}, "
        f"updates {history.updates}"
    ]
    count = dict.fromkeys(("fires", "fine", "unknown"), 0)
    for finding in found:
        count[finding.state] += 1
        if finding.state == "fires" or everything:
            lines.append(f"{finding.state:8} {finding.rule.name:20} {finding.seen}")
        if finding.state == "fires":
            lines.append(f"         {'':20} healthy: {finding.rule.healthy}")
            lines.append(f"         {'':20} try: {finding.rule.advice}")
    lines.append(
        f"{count['fires']} rules fire, {count['fine']} are content, {count['unknown']} cannot tell"
        + ("" if everything else "; --all shows them")
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 also where rules fire, 2 for a mistake."""
    options = argparse.ArgumentParser("python -m fastwm.diagnose", description=__doc__)
    options.add_argument("run", type=Path, help="run folder")
    options.add_argument("--all", action="store_true", help="show what is fine or unknown too")
    args = options.parse_args(argv)
    try:
        history = read(args.run)
    except settings.ConfigError as error:
        print(f"fastwm.diagnose: {error}", file=sys.stderr)
        return 2
    print(show(history, findings(history), args.all))
    return 0


if __name__ == "__main__":
    sys.exit(main())
