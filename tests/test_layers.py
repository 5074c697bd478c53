"""Who may import whom: modules import only smaller ranks, and only with absolute imports."""

import ast
from pathlib import Path

import pytest

import fastwm

PACKAGE = Path(fastwm.__file__).parent
SIDE = -1  # the side column: may import rank 0 only, and nothing of rank 1 to 6 nor each other
RANKS = {
    "config": 0, "settings": 0, "spaces": 0, "_replay": 0, "configs": 0, "cudagraph": 0,
    "compiled": 0,
    "ops": 1,
    "nets": 2, "distributions": 2, "optim": 2,
    "rssm": 3,
    "worldmodels": 4, "behavior": 4,
    "explore": 5,
    "agents": 6,
    "replay": SIDE, "episodes": SIDE, "envs": SIDE, "log": SIDE, "checkpoint": SIDE,
    "loops.clock": SIDE,
    "loops": 7,
    "assemble": 7.5,  # config to objects, for the command lines
    "train": 8, "eval": 8, "play": 8.5, "dream": 8.5, "check_env": 8, "doctor": 8, "selftest": 8,
    "convert": 8, "bench": 8, "diagnose": 8, "export": 8, "data": 8, "__init__": 8,
}  # fmt: skip


def unit(name: str) -> str:
    """The part of a dotted module path below `fastwm.` that has a rank; replay_io is of replay."""
    parts = name.split(".")
    if ".".join(parts[:2]) in RANKS:
        return ".".join(parts[:2])
    return parts[0] if parts[0] in RANKS else parts[0].split("_")[0] or parts[0]


def allowed(importer: str, imported: str) -> bool:
    above, below = RANKS[importer], RANKS[imported]
    if importer == imported or above == below == 0:
        return True
    if above == SIDE:
        return below == 0
    return (below == SIDE and above >= 7) or SIDE < below < above


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "relative import"
            elif node.module == "fastwm":
                for alias in node.names:  # a public name stands for the module it lives in
                    path = fastwm._LAZY.get(alias.name, alias.name)
                    yield node.lineno, path.removeprefix("fastwm.")
            elif (node.module or "").startswith("fastwm."):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                ranked = [n.removeprefix("fastwm.") for n in names]
                exact = [n for n in ranked if n in RANKS]
                yield node.lineno, (exact or ranked)[-1 if exact else 0]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("fastwm."):
                    yield node.lineno, alias.name.removeprefix("fastwm.")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
    importer = unit(name)
    assert importer in RANKS, f"{path.name} has no rank: add it to the table and to the design"
    wrong = []
    for line, imported in imports(path):
        if imported in ("__version__",) or (importer == "__init__" and imported != "ops"):
            continue
        if unit(imported) not in RANKS or not allowed(importer, unit(imported)):
            wrong.append(f"{path.name}:{line}: {importer} imports {imported}")
    assert wrong == []


def test_the_rule_itself():
    assert allowed("rssm", "ops") and allowed("loops", "replay") and allowed("envs", "spaces")
    assert not allowed("ops", "rssm") and not allowed("replay", "ops")
    assert not allowed("agents", "replay") and not allowed("envs", "replay")
    assert not allowed("nets", "optim")
