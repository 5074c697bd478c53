"""One stem, one name: CPU kernel, CUDA kernel, Python op, test, benchmark, and a page section.

A stem without a CUDA or CPU file says so in the docstring of its Python file, with the words
"no CUDA file" or "no CPU file".
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEMS = sorted(p.stem for p in (ROOT / "fastwm/ops").glob("[a-z]*.py"))
SHARED = {"dispatch", "gemm"}  # sources in csrc/cpu that several stems use


def test_stems_are_found():
    assert "lambda_return" in STEMS


@pytest.mark.parametrize("stem", STEMS)
def test_has_all_its_places(stem):
    python = " ".join((ROOT / f"fastwm/ops/{stem}.py").read_text().split())
    missing = [
        path
        for path in (f"tests/ops/test_{stem}.py", f"benchmarks/bench_{stem}.py")
        if not (ROOT / path).is_file()
    ]
    for path, words in ((f"csrc/cpu/{stem}.cpp", "CPU"), (f"csrc/cuda/{stem}.cu", "CUDA")):
        if not (ROOT / path).is_file() and f"no {words} file" not in python:
            missing.append(f"{path} (or the words 'no {words} file' in the Python file)")
    if f"\n## {stem}\n" not in (ROOT / "docs/kernels.md").read_text():
        missing.append(f"a section '## {stem}' in docs/kernels.md")
    assert missing == []


@pytest.mark.parametrize("folder, suffix", [("cpu", ".cpp"), ("cuda", ".cu")])
def test_kernels_belong_to_a_stem(folder, suffix):
    stems = {p.stem for p in (ROOT / "csrc" / folder).glob(f"*{suffix}")} - SHARED
    strangers = [s for s in stems if not any(s == k or s.startswith(f"{k}_") for k in STEMS)]
    assert strangers == []
