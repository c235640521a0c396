"""What the documentation names is there: commands, flags, links, functions, tests and figures."""

import ast
import functools
import pathlib
import re
import shlex
import subprocess

import pytest

from common_jax import app
from common_jax.config import freeze
from m2mkd_jax import main as command
from m2mkd_jax.config import Config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
EQUATIONS = ROOT / "docs" / "equations.md"
MODULE = "m2mkd_jax.main"

# Paths of one machine have no place in a repository. Spelt so that this file does not find itself.
FOREIGN = ("/" + "work/", "../" + "shared")


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def quoted_commands(text: str) -> list[list[str]]:
    """The commands of m2mkd_jax.main in a text, as lists of words; a backslash goes on."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [line.strip().strip("`") for line in lines if f"-m {MODULE}" in line]
    return [shlex.split(line) for line in found]


def commands() -> list[tuple[str, list[str]]]:
    """(where it stands, the flags of the command)."""
    texts = {name(page): page.read_text() for page in PAGES}
    texts |= {name(path): ast.get_docstring(ast.parse(path.read_text())) for path in CONFIGS}
    texts["--help"] = command.DESCRIPTION
    found = []
    for place, text in texts.items():
        for words in quoted_commands(text):
            found.append((place, words[words.index(MODULE) + 1 :]))
    return found


def flags() -> list[tuple[str, str]]:
    """(page, --config.FIELD=VALUE) for all that the pages mention outside commands."""
    found = []
    for page in PAGES:
        lines = re.sub(r"\\\n\s*", "", page.read_text()).splitlines()
        text = "\n".join(line for line in lines if MODULE not in line)
        found += [(name(page), flag) for flag in re.findall(r"--config\.[\w.]+=[^\s`]*", text)]
    return found


def parsed(monkeypatch, arguments: list[str]) -> Config:
    """The frozen config of a command line, as the command reads it; raises what a user would see
    as text."""
    received = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(app.logging, "basicConfig", lambda **_: None)
    app.run(
        lambda config, workdir: received.append(freeze(Config, config)),
        command.DESCRIPTION,
        [MODULE, *arguments, "--debug"],
    )
    return received[0]


def test_commands_are_found():
    places = {place for place, _ in commands()}
    assert places >= {"README.md", "--help", *(name(path) for path in CONFIGS)}


@pytest.mark.parametrize(
    ("place", "arguments"), commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60]
)
def test_quoted_commands_are_understood(monkeypatch, place, arguments):
    options = {argument.partition("=")[0] for argument in arguments}
    assert {"--config", "--workdir"} <= options, f"{place}: {arguments}"
    parsed(monkeypatch, arguments)


@pytest.mark.parametrize(("place", "flag"), flags(), ids=str)
def test_mentioned_flags_are_fields(monkeypatch, place, flag):
    phase = "pipeline" if flag.startswith("--config.recipes") else "end_to_end"
    parsed(
        monkeypatch,
        [f"--config=configs/m2mkd/digits.py:phase={phase}", "--workdir=x", *shlex.split(flag)],
    )


def test_mentioned_fields_are_there():
    """`config.a.b` in backquotes, without a value."""
    fields = {field.removeprefix("config.") for field in paths(Config(), "config")}
    for page in PAGES:
        for path in re.findall(r"`config\.(?!json|py)([a-z_.]+)`", page.read_text()):
            assert path in fields, f"{name(page)}: config.{path}"


def paths(value, path: str):
    """The dotted paths of a dataclass's fields, sections included."""
    yield path
    for key, entry in getattr(value, "__dict__", {}).items():
        yield from paths(entry, f"{path}.{key}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_mentioned_files_are_there(page):
    """Files of the repository in backquotes, from its root or from m2mkd_jax."""
    roots = (ROOT, ROOT / "m2mkd_jax")
    folders = {path.name for root in roots for path in root.iterdir() if path.is_dir()} - {"runs"}
    for target in re.findall(r"`(\w+/[\w./]+)`", page.read_text()):
        if target.split("/")[0] in folders:
            found = any((root / target).exists() for root in roots)
            assert found, f"{name(page)}: {target}"


@functools.cache
def definitions(path: pathlib.Path) -> frozenset[str]:
    """Names a file defines: functions, classes, their methods as Class.method, and tables."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            functions = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
            names |= {f"{node.name}.{function.name}" for function in functions}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(names)


def test_equations_name_code_and_tests_that_exist():
    text = EQUATIONS.read_text()
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(places) > 80
    for file, symbol in places:
        path = ROOT / file
        assert path.exists() and symbol in definitions(path), f"{file}:{symbol}"
    for case in set(re.findall(r"`golden/(\w+)`", text)) - {"NAME"}:
        assert (ROOT / "tests" / "golden" / "m2mkd" / f"{case}.npz").exists(), case


def test_every_equation_has_a_function_and_a_test():
    rows = [line for line in EQUATIONS.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| equation ")]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4, row
        assert re.fullmatch(r"`[\w/]+\.py:[\w.]+`", cells[2]), row
        assert re.match(r"`(tests/.*:test_\w+|golden/\w+)`", cells[3]), row


def test_every_loss_has_an_equation():
    text = EQUATIONS.read_text()
    losses = definitions(ROOT / "m2mkd_jax" / "losses.py") - {"DISTILLATIONS"}
    routing = definitions(ROOT / "m2mkd_jax" / "models" / "routing.py")
    for loss in losses | {function for function in routing if function.endswith("_loss")}:
        assert f":{loss}`" in text, loss


def test_both_demo_tables_are_the_same():
    pattern = r"<!-- demo table -->(.*)<!-- end of demo table -->"
    pages = (ROOT / "README.md", ROOT / "docs" / "results.md")
    first, second = (re.search(pattern, page.read_text(), re.DOTALL)[1] for page in pages)
    assert first == second


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_of_prose_are_short(page):
    code = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        code ^= line.startswith("```")
        if not code and not line.startswith("|"):
            assert len(line) <= 110, f"{name(page)}:{number}"


def test_no_tracked_file_names_a_place_outside_the_repository():
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(git, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for file in filter(None, listed.stdout.split("\0")):
        path = ROOT / file
        if file.startswith(".ci/") or path.suffix in (".npz", ".png") or not path.is_file():
            continue
        text = path.read_text()
        for word in FOREIGN:
            assert word not in text, f"{file} mentions {word}"
