"""`python -m fastwm.bench` times what is green and nothing else."""

from pathlib import Path

import pytest

from fastwm import bench

ROOT = Path(__file__).parents[1]


def tree(folder: Path, verdict: str) -> Path:
    (folder / "tests" / "ops").mkdir(parents=True)
    (folder / "benchmarks").mkdir()
    (folder / "pytest.ini").write_text("[pytest]\npython_files = test_*.py bench_*.py\n")
    (folder / "tests" / "ops" / "test_x.py").write_text(f"def test_x():\n    assert {verdict}\n")
    timed = "def test_time():\n    open('timed', 'w').close()\n"
    (folder / "benchmarks" / "bench_x.py").write_text(timed)
    return folder


def test_green_is_timed(tmp_path):
    assert bench.main(["x"], tree(tmp_path, "True")) == 0
    assert (tmp_path / "timed").exists()


def test_save_names_a_file_for_each_part(tmp_path):
    root = tree(tmp_path, "True")
    body = "import os\n\ndef test_time():\n    open(os.environ['FASTWM_BENCH_SAVE'], 'w').close()\n"
    (root / "benchmarks" / "bench_x.py").write_text(body)
    (root / "benchmarks" / "results").mkdir()
    assert bench.main(["x", "--save", "here"], root) == 0
    assert (root / "benchmarks/results/here_x.json").exists()


def test_red_is_not(tmp_path, capsys):
    assert bench.main([], tree(tmp_path, "False")) == 1
    assert not (tmp_path / "timed").exists()
    assert "the tests of x are red: not timed" in capsys.readouterr().err


@pytest.mark.parametrize("stem", bench.stems(ROOT))
def test_every_benchmark_has_tests(stem):
    found = bench.tests_of(ROOT, stem)
    assert found and all((ROOT / path).is_file() for path in found)


def test_mistakes(tmp_path, capsys):
    assert bench.main(["rsmm"], tree(tmp_path, "True")) == 2
    assert "expected one of x, got rsmm" in capsys.readouterr().err
    assert bench.main([], tmp_path / "elsewhere") == 2
    assert "a checkout" in capsys.readouterr().err
