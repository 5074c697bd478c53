"""The code stays readable: files of at most 500 lines, functions of at most 60."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fastwm", "csrc", "_build_backend", "tests", "benchmarks", "examples", "configs")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}
FILES = [p for f in FOLDERS for p in sorted((ROOT / f).rglob("*")) if p.suffix in SUFFIXES]
COMMANDS = "train eval play dream check_env doctor selftest bench export data".split()


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def cpp_functions(text: str):
    """(first line, length) of each function: from its signature to the `}` indented like it."""
    lines = text.splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and re.search(r"\) ?(const |noexcept |mutable )*\{$", line):
            start = number  # a signature over several lines is indented deeper on its last one
            while start and lines[start].strip() and indent(lines[start]) > 2:
                start -= 1
        elif start is not None and line.startswith(" " * indent(lines[start]) + "}"):
            yield start + 1, number - start + 1
            start = None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    text = path.read_text()
    lines = text.count("\n")
    most = 80 if path.parent == ROOT / "fastwm" and path.stem in COMMANDS else 500
    assert lines <= most, f"{path.name} has {lines} lines, at most {most}"
    if path.suffix == ".py":
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, kinds)]
        long = [f"{n.name}: {n.end_lineno - n.lineno + 1}" for n in nodes
                if n.end_lineno - n.lineno + 1 > 60]  # fmt: skip
    else:
        long = [f"line {first}: {count}" for first, count in cpp_functions(text) if count > 60]
    assert long == [], f"functions over 60 lines in {path.name}: {long}"


def test_the_cpp_rule_sees_functions():
    body = "    x += 1;\n" * 61
    assert list(cpp_functions(f"void f(int x) {{\n{body}}}\n")) == [(1, 63)]
    method = f"struct S {{\n  S(int x)\n      : x(x) {{\n{body}  }}\n  int x;\n}};\n"
    assert list(cpp_functions(method)) == [(2, 64)]
