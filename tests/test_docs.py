"""What the documentation refers to exists: commands, flags, links, functions, tests and figures."""

import ast
import dataclasses
import functools
import pathlib
import pkgutil
import re
import shlex
import subprocess
import types

import pytest
import sweep

from cliptrans_jax import config as cliptrans_config
from cliptrans_jax import main as cliptrans
from common_jax import app
from common_jax.commands.sweep import command
from common_jax.config import freeze
from m2mkd_jax import config as m2mkd_config
from m2mkd_jax import main as m2mkd

ROOT = pathlib.Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md"
EQUATIONS, ARCHITECTURE = ROOT / "docs" / "equations.md", ROOT / "docs" / "architecture.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.py") if "def get_config(" in path.read_text()
)

# Paths of one machine do not belong in a repository. Split so that this file does not match itself.
FOREIGN = ("/" + "work/", "../" + "shared")


@dataclasses.dataclass(frozen=True)
class System:
    """One of the two systems.

    Attributes:
      command: its module, which has DESCRIPTION.
      config: the dataclass of its config.
      words: words that mark a heading as about this system only.
      samples: configs that flags are tried on; one of them must accept the flags.
    """

    command: types.ModuleType
    config: type
    words: tuple[str, ...]
    samples: tuple[str, ...]


SYSTEMS = {
    "m2mkd_jax": System(
        m2mkd,
        m2mkd_config.Config,
        ("m2mKD", "NAC"),
        ("configs/m2mkd/digits.py:phase=end_to_end", "configs/m2mkd/digits.py:phase=pipeline"),
    ),
    "cliptrans_jax": System(
        cliptrans,
        cliptrans_config.Config,
        ("CLIPTrans",),
        tuple(
            f"configs/cliptrans/emoji.py:stage={stage}"
            for stage in ("translate", "caption", "pipeline")
        ),
    ),
}


def name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


# Commands.

# `python -m m2mkd_jax.main ...`, or the installed program's `m2mkd train ...`.
COMMAND = re.compile(r"(?:-m (\w+)\.main|(?:^|\s)(m2mkd|cliptrans) train)\b(.*)")


def texts() -> dict[str, str]:
    """All texts that quote commands."""
    found = {name(page): page.read_text() for page in PAGES}
    found |= {name(path): ast.get_docstring(ast.parse(path.read_text())) for path in CONFIGS}
    return found | {f"{key} --help": system.command.DESCRIPTION for key, system in SYSTEMS.items()}


def joined(text: str) -> str:
    """The text with backslash-continued lines joined."""
    return re.sub(r"\\\n\s*", "", text)


def commands() -> list[tuple[str, str, list[str]]]:
    """(place, package, flags) of all quoted commands of the two systems."""
    found = []
    for place, text in texts().items():
        for line in joined(text).splitlines():
            match = COMMAND.search(line.strip().strip("`"))
            if match and "--help" not in match[3]:
                package = match[1] or f"{match[2]}_jax"
                found.append((place, package, shlex.split(match[3])))
    return found


def parsed(monkeypatch, package: str, arguments: list[str]):
    """The frozen config of a command line, as the command reads it; raises the error a user would
    see as text."""
    system, received = SYSTEMS[package], []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(app.logging, "basicConfig", lambda **_: None)
    app.run(
        lambda config, workdir: received.append(freeze(system.config, config)),
        system.command.DESCRIPTION,
        [package, *arguments, "--debug"],
    )
    return received[0]


def test_commands_are_found():
    found = commands()
    assert {package for _, package, _ in found} == set(SYSTEMS)
    places = {place for place, _, _ in found}
    helps = {f"{key} --help" for key in SYSTEMS}
    assert places >= {"README.md", *helps, *(name(path) for path in CONFIGS)}


@pytest.mark.parametrize(
    ("place", "package", "arguments"),
    commands(),
    ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60],
)
def test_quoted_commands_parse(monkeypatch, place, package, arguments):
    options = {argument.partition("=")[0] for argument in arguments}
    assert {"--config", "--workdir"} <= options, f"{place}: {arguments}"
    parsed(monkeypatch, package, arguments)


def sweeps() -> list[tuple[str, list[str]]]:
    """(place, flags) of all quoted commands of tools/sweep.py."""
    found = []
    for place, text in (texts() | {"tools/sweep.py --help": sweep.__doc__}).items():
        for line in joined(text).splitlines():
            if match := re.search(r"python tools/sweep\.py (--[^>]*)", line):
                found.append((place, shlex.split(match[1])))
    return found


def test_sweeps_are_found():
    places = {place for place, _ in sweeps()}
    assert places == {"docs/sweeps.md", "tools/sweep.py --help"}


@pytest.mark.parametrize(("place", "arguments"), sweeps(), ids=str)
def test_quoted_sweeps_have_cells(monkeypatch, place, arguments):
    monkeypatch.chdir(ROOT)
    flags = command.parse_flags(arguments, sweep.programs())
    assert len(command.plan_asked(flags)) > 1 and flags.workdir, place


@pytest.mark.parametrize("place", texts())
def test_continued_commands_end_in_a_backslash(place):
    text = texts()[place]
    blocks = re.findall(r"^```.*?^```", text, re.M | re.S) if place.endswith(".md") else [text]
    for block in blocks:
        for line in joined(block).splitlines():
            assert not re.match(r"\s*--(config|workdir)\b", line), f"{place}: {line}"


def test_mentioned_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{name(page)}: make {target}"


# Flags and fields.


def prose(page: pathlib.Path) -> str:
    """The page with its code blocks blanked out."""
    blank = functools.partial(re.sub, r"[^\n]", " ")
    return re.sub(r"^```.*?^```", lambda m: blank(m[0]), page.read_text(), flags=re.M | re.S)


def subjects(text: str, place: int) -> tuple[str, ...]:
    """The systems that the text is about at a position: those named in the innermost heading above
    it that names any; else both."""
    titles = {}
    for match in re.finditer(r"^(#+) (.*)", text[:place], re.M):
        level = len(match[1])
        titles = {key: title for key, title in titles.items() if key < level} | {level: match[2]}
    for level in sorted(titles, reverse=True):
        words = {key: system.words for key, system in SYSTEMS.items()}
        if found := [key for key in words if any(word in titles[level] for word in words[key])]:
            return tuple(found)
    return tuple(SYSTEMS)


def spans(pattern: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """(page, text in backquotes, systems it may refer to), outside code blocks."""
    found = []
    for page in PAGES:
        text = prose(page)
        for match in re.finditer(r"`([^`]+)`", text):
            if re.search(pattern, match[1]):
                found.append((name(page), match[1], subjects(text, match.start())))
    return found


def flags() -> list[tuple[str, str, tuple[str, ...]]]:
    return [span for span in spans(r"--config\.[\w.]+=") if "-m " not in span[1]]


@pytest.mark.parametrize(("place", "span", "systems"), flags(), ids=str)
def test_mentioned_flags_are_fields(monkeypatch, place, span, systems):
    problems = []
    for package in systems:
        for sample in SYSTEMS[package].samples:
            try:
                parsed(
                    monkeypatch, package, [f"--config={sample}", "--workdir=x", *shlex.split(span)]
                )
                return
            except Exception as error:  # the flag library raises its own exceptions
                problems.append(f"{sample}: {error}")
    pytest.fail(f"{place}: {span}\n" + "\n".join(problems))


def test_mentioned_fields_exist():
    """`config.a.b` in backquotes, without a value."""
    known = {key: set(paths(system.config(), "config")) for key, system in SYSTEMS.items()}
    for place, span, systems in spans(r"^config\.(?!json|py)[a-z_.]+$"):
        assert any(span in known[package] for package in systems), f"{place}: {span} of {systems}"


def paths(value, path: str):
    """The dotted paths of a dataclass's fields, including sections."""
    yield path
    for key, entry in getattr(value, "__dict__", {}).items():
        yield from paths(entry, f"{path}.{key}")


def test_readme_and_pages_mention_all_phases_and_stages():
    for names, page in (
        (m2mkd_config.PHASE_NAMES, ROOT / "docs" / "m2mkd.md"),
        (cliptrans_config.RUNS, ROOT / "docs" / "cliptrans.md"),
    ):
        for one in names:
            assert f"`{one}`" in page.read_text(), one
            assert one == "pipeline" or f"`{one}`" in README.read_text(), one


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


# Files and names.


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_mentioned_files_exist(page):
    """Files of the repository in backquotes, relative to its root or to a package."""
    roots = (ROOT, *(ROOT / package for package in ("common_jax", *SYSTEMS)))
    folders = {path.name for root in roots for path in root.iterdir() if path.is_dir()}
    for target in re.findall(r"`(\w+/[\w./]+)`", page.read_text()):
        folder = target.split("/")[0]
        workdir = folder == "runs" and not target.endswith(".py")
        if folder in folders and not workdir:
            found = any((root / target).exists() for root in roots)
            assert found, f"{name(page)}: {target}"


def test_mentioned_names_exist():
    """`package.module.name` in backquotes."""
    for _, span, _ in spans(r"^(common|m2mkd|cliptrans)_jax(\.\w+)+$"):
        assert pkgutil.resolve_name(span) is not None, span


@functools.cache
def definitions(path: pathlib.Path) -> frozenset[str]:
    """Names a file defines: functions, classes, methods as Class.method, and tables."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            functions = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
            names |= {f"{node.name}.{function.name}" for function in functions}
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


def test_architecture_page_lists_the_enforced_layers():
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text())
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    layers = next(node.value for node in assigned if node.targets[0].id == "LAYERS")
    text = " ".join(ARCHITECTURE.read_text().split())
    for package, rows in ast.literal_eval(layers).items():
        assert f"{package}: {' > '.join(map(', '.join, rows))}" in text, package


# Equations.


def test_equations_name_code_and_tests_that_exist():
    text = EQUATIONS.read_text()
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(places) > 80
    for file, symbol in places:
        path = ROOT / file
        assert path.exists() and symbol in definitions(path), f"{file}:{symbol}"
    for case in set(re.findall(r"`golden/([\w./]+)`", text)):
        if not case.endswith("NAME"):
            file = case if "/" in case else f"m2mkd/{case}"
            assert (ROOT / "tests" / "golden" / f"{file}.npz").exists(), case


def test_every_equation_has_a_function_and_a_test():
    rows = [line for line in EQUATIONS.read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| equation ")]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 4, row
        assert re.fullmatch(r"\[`([\w/]+\.py):[\w.]+`\]\(\.\./\1\)", cells[2]), row
        assert re.match(r"\[?`(tests/.*:test_\w+|golden/[\w./]+)`", cells[3]), row


def test_every_loss_has_an_equation():
    text = EQUATIONS.read_text()
    losses = [
        (file, function)
        for file in ("m2mkd_jax/losses.py", "cliptrans_jax/losses.py")
        for function in definitions(ROOT / file)
        - {"DISTILLATIONS", "COMBINATIONS", "Distillation", "DistillationLoss"}
    ]
    routing = "m2mkd_jax/moe/routers.py"
    losses += [(routing, one) for one in definitions(ROOT / routing) if one.endswith("_loss")]
    for file, function in losses:
        assert f"`{file}:{function}`" in text, function


# Layout of a page.


@pytest.mark.parametrize("table", ["demo", "emoji"])
def test_demo_tables_agree_on_both_pages(table):
    pattern = rf"<!-- {table} table -->(.*)<!-- end of {table} table -->"
    first, second = (
        re.search(pattern, page.read_text(), re.DOTALL)[1] for page in (README, RESULTS)
    )
    assert first == second and "|---|" in first


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_prose_lines_are_short(page):
    code = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        code ^= line.startswith("```")
        if not code and not line.startswith("|"):
            assert len(line) <= 110, f"{name(page)}:{number}"


def test_tracked_files_name_no_place_outside_the_repository():
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(git, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for file in filter(None, listed.stdout.split("\0")):
        path = ROOT / file
        if file.startswith(".ci/") or path.suffix in (".npz", ".png") or not path.is_file():
            continue
        text = path.read_text(errors="replace")  # also of the stored checkpoints
        for word in FOREIGN:
            assert word not in text, f"{file} mentions {word}"
