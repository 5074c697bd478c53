"""`python -m fastwm.bench [STEM ...]`: test a part, then time it; nothing red is ever timed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What must be green before a benchmark that is not named after its tests may run.
WHOLE = {"train": ("tests/test_golden_dreamer.py", "tests/test_dreamer.py")}


def stems(root: Path) -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in root.glob("benchmarks/bench_*.py"))


def tests_of(root: Path, stem: str) -> list[str]:
    """The test files of a stem, e.g. rssm -> tests/ops/test_rssm.py, tests/ops/test_rssm_raw.py."""
    names = (f"test_{stem}.py", f"test_{stem}_*.py")
    found = [path for folder in ("tests", "tests/ops") for name in names
             for path in sorted((root / folder).glob(name))]  # fmt: skip
    return [str(path.relative_to(root)) for path in found] or list(WHOLE.get(stem, ()))


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; returns the exit code: 0, 1 when something is red, 2 for a mistake."""
    parser = argparse.ArgumentParser("python -m fastwm.bench", description=__doc__)
    known = stems(root)
    parser.add_argument("stem", nargs="*", help=f"{', '.join(known)}; none: all")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME_<stem>.json")
    args, options = parser.parse_known_args(argv)
    wrong = [stem for stem in args.stem if stem not in known]
    if not known or wrong:
        got = f"got {', '.join(wrong)}" if known else f"found no benchmarks/ in {root}"
        way = f"one of {', '.join(known)}" if known else "a checkout: clone the repository"
        print(f"fastwm.bench: expected {way}, {got}", file=sys.stderr)
        return 2
    for stem in args.stem or known:
        if pytest(root, tests_of(root, stem)):
            print(f"fastwm.bench: the tests of {stem} are red: not timed", file=sys.stderr)
            return 1
        target = root / f"benchmarks/results/{args.save}_{stem}.json" if args.save else None
        if pytest(root, [f"benchmarks/bench_{stem}.py", *options], target):
            return 1
    return 0


def pytest(root: Path, arguments: list[str], save: Path | None = None) -> int:
    if not arguments:  # no tests are no licence: pytest would run all it finds
        return 1
    environment = {**os.environ} | ({"FASTWM_BENCH_SAVE": str(save)} if save else {})
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.run(command, cwd=root, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
