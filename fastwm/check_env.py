"""`python -m fastwm.check_env TASK`: what an environment really returns, and what is wrong."""

from __future__ import annotations

import argparse
import ast
import sys

from fastwm import envs
from fastwm.envs.check import check


def main(argv: list[str] | None = None) -> int:
    """Prints the report; 0 if the contract holds, 1 if it does not or the task cannot be made."""
    parser = argparse.ArgumentParser("python -m fastwm.check_env", description=__doc__)
    parser.add_argument("task", help=", ".join(envs.task_names()))
    parser.add_argument("--steps", type=int, default=1000, help="decisions per environment")
    parser.add_argument("--envs", type=int, default=4, help="number of environments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of envs.make, e.g. --option 'size=(64, 64)' (repeatable)",
    )
    args = parser.parse_args(argv)
    try:
        options = dict(parse_option(text) for text in args.option)
        with envs.make(args.task, args.envs, args.seed, **options) as env:
            report = check(env, args.steps, args.seed)
    except (ValueError, TypeError, ImportError, envs.EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    return 1 if report.errors else 0


def parse_option(text: str) -> tuple[str, object]:
    """Split name=value; the value is a Python literal, or else the text itself."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"check_env: expected --option NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())
