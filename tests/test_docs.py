"""Tables in docs/ that name things: the things exist, and none is missing."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from fastwm import config, config_aliases

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def cells(text: str, heading: str) -> list[list[str]]:
    """Rows of the tables below a heading, without their heads."""
    part = text.split(f"\n## {heading}")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in part.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-| ")][1:]


# ---- from_other_repos.md

OTHER = (DOCS / "from_other_repos.md").read_text()
PAGES = {  # algorithm -> headings that hold its names, the first one wins
    "dreamerv3": ("dreamerv3-torch", "danijar/dreamerv3"),
    "dreamerv3_2023": ("The algorithm of 2023", "dreamerv3-torch", "danijar/dreamerv3"),
}
KNOWN = {name: config.flatten(config.SCHEMAS[name]()) for name in PAGES}


def pairs(algorithm: str) -> dict[str, str]:
    """Flag -> what stands beside it."""
    found: dict[str, str] = {}
    for heading in PAGES[algorithm]:
        for left, right, _ in cells(OTHER, heading):
            for flag in re.findall(r"`--([^`\s]+)", left):
                found.setdefault(flag, right)
    return found


PAIRS = [(name, flag, right) for name in PAGES for flag, right in pairs(name).items()]


@pytest.mark.parametrize("algorithm", PAGES)
def test_every_alias_stands_in_the_table(algorithm):
    written = pairs(algorithm)
    for name in config_aliases.names(algorithm, KNOWN[algorithm]):
        assert name in written or f"{name.rpartition('.')[0]}.*" in written, name


@pytest.mark.parametrize("algorithm, flag, right", PAIRS)
def test_every_row_says_what_the_alias_does(algorithm, flag, right):
    aliases = dict(config_aliases.meanings(algorithm, KNOWN[algorithm]))
    if flag in KNOWN[algorithm]:  # another value of the same setting
        assert flag in config_aliases.VALUES and f"`--{flag} " in right
        return
    names = [n for n in aliases if n == flag or f"{n.rpartition('.')[0]}.*" == flag]
    assert names or algorithm != "dreamerv3" and flag.startswith("agent."), flag
    for name in names:
        for key in aliases[name]:
            options = (key, f"{key.partition('.')[0]}.*", "critic.slow_*")
            assert any(f"`--{option}" in right for option in options), (name, key)


def test_names_without_a_counterpart():
    part = OTHER.split("## Names without a counterpart")[1].split("## ")[0]
    named = part.split(" instead:")[1]
    assert set(re.findall(r"`([^`]+)`", named)) == set(config_aliases.REFUSED)


# ---- guide_ha.md

GUIDE_HA = (DOCS / "guide_ha.md").read_text()


def test_every_name_of_world_models_stands_in_the_guide():
    text = GUIDE_HA.split("## Names of other code")[1]
    for name in config_aliases.HA:
        last = re.escape(name.rpartition(".")[2])
        assert re.search(rf"`(--)?([\w.]+\.)?{last}`", text), name
    refused = text.split("what to do instead:")[1].split(".\n")[0]
    assert set(re.findall(r"`([^`]+)`", refused)) == set(config_aliases.REFUSED_HA)


def test_the_guide_names_the_key_of_every_flag_of_world_models():
    known = config.flatten(config.SCHEMAS["ha"]())
    meanings = dict(config_aliases.meanings("ha", known))
    for left, right, _ in cells(GUIDE_HA, "Names of other code"):
        for flag in re.findall(r"`(?:--)?([\w-]+)`", left):
            for key in meanings.get(flag, ()):
                assert f"`--{key}`" in right or flag in ("height", "width"), (flag, key)


# ---- troubleshooting.md

SOURCES = [
    re.sub(r'"\s+f?"', "", path.read_text())  # texts that go on in the next line
    for path in (ROOT / "fastwm").rglob("*.py")
]
MESSAGES = re.findall(
    r"^\| `([^`]+)` \|", (DOCS / "troubleshooting.md").read_text().split("## It does")[0], re.M
)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_still_in_the_code(message):
    assert any(message in source for source in SOURCES)


def test_there_are_messages():
    assert len(MESSAGES) > 15


# ---- features.md

FEATURES = [
    line.strip("| ").split(" | ")
    for line in (DOCS / "features.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| feature") and set(line) - set("|- ")
]
SETTINGS = {"configs", "help", *config_aliases.REFUSED}.union(
    *(config.flatten(schema()) for schema in config.SCHEMAS.values()),
    *(config_aliases.table(name) for name in KNOWN),
)
TESTS = {
    f"{path.relative_to(ROOT)}::{node.name}"
    for path in (ROOT / "tests").rglob("test_*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
}


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: row[0][:40])
def test_features_name_tests_and_settings_that_exist(row):
    feature, how, covered = row
    named = re.findall(r"`([^`]+)`", covered)
    assert named, f"no test of {feature}"
    for name in named:
        file, _, test = name.partition("::")
        assert (ROOT / "tests" / file).is_file(), name
        assert not test or f"tests/{name}" in TESTS, name
    for flag in re.findall(r"`--([\w.]+)[^`]*`", how):
        option = re.sub(r"\.options\..*", ".options", flag)
        assert {option, flag} & SETTINGS, flag
    for preset in re.findall(r"preset `(\w+)`", how):
        assert preset in config.preset_names(), preset
    for path in re.findall(r"`((?:fastwm|examples|docs|benchmarks|tests)/[\w./]+)`", how):
        assert (ROOT / path).exists(), path


def test_there_are_features():
    assert len(FEATURES) > 60
    assert len({row[0] for row in FEATURES}) == len(FEATURES)


# ---- the Dockerfile


def test_the_dockerfile_takes_the_arguments_that_the_page_gives():
    text = (ROOT / "Dockerfile").read_text()
    given = re.findall(r"--build-arg (\w+)=", (DOCS / "install.md").read_text())
    assert given and set(given) <= set(re.findall(r"^ARG (\w+)", text, re.M))
    extras = re.search(r"EXTRAS=([\w,]+)", (DOCS / "install.md").read_text())[1].split(",")
    optional = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{name} = ", optional, re.M) for name in extras)
    for line in re.findall(
        r"docker run [^\n]+? fastwm ([\w.]+)", (DOCS / "install.md").read_text()
    ):
        module = shlex.split(line)[0]
        assert module.startswith(("fastwm.", "tensorboard."))
