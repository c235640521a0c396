"""Every test asserts something."""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys

import pytest
from quick import SLOW, is_slow

FOLDER = pathlib.Path(__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
CHECKERS = ("np.testing.assert_", "pytest.raises", "pytest.warns", "pytest.fail")


@functools.cache
def functions(path: pathlib.Path) -> dict[str, ast.FunctionDef]:
    """All functions of a file, including nested ones and methods."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}


@functools.cache
def imported(path: pathlib.Path) -> dict[str, tuple[pathlib.Path, str]]:
    """Names that a file imports from test helpers -> helper file and name there."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (FOLDER / f"{node.module}.py").exists():
            helper = FOLDER / f"{node.module}.py"
            found |= {alias.asname or alias.name: (helper, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            helpers = ((FOLDER / f"{alias.name}.py", alias.name) for alias in node.names)
            for helper, module in helpers:
                if helper.exists():
                    found |= {f"{module}.{name}": (helper, name) for name in functions(helper)}
    return found


def has_assertion(path: pathlib.Path, name: str) -> bool:
    """Whether a function asserts, expects an error, or uses a function that does."""
    todo, seen = [(path, name)], set()
    while todo:
        place = todo.pop()
        path, name = place
        if place in seen or name not in functions(path):
            continue
        seen.add(place)
        for node in ast.walk(functions(path)[name]):
            if isinstance(node, ast.Assert):
                return True
            if isinstance(node, ast.Attribute | ast.Name):  # called, a fixture, or passed on
                called = ast.unparse(node)
                if called.startswith(CHECKERS):
                    return True
                todo.append(imported(path).get(called, (path, called)))
    return False


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name.startswith("test_")], ids=lambda path: path.stem
)
def test_every_test_has_an_assertion(path):
    tests = [name for name in functions(path) if name.startswith("test_")]
    assert tests
    assert [name for name in tests if not has_assertion(path, name)] == []
    asserts = (x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Assert))
    assert not any(isinstance(x.test, ast.Constant | ast.Tuple) for x in asserts)  # always true


def test_quick_tests_skip_only_existing_files():
    assert [name for name in SLOW if not (FOLDER / name).exists()] == []
    assert is_slow(FOLDER / SLOW[0]) and not is_slow(pathlib.Path(__file__))


def test_test_without_an_assertion_is_detected(tmp_path):
    path = tmp_path / "test_it.py"
    path.write_text(
        "import pytest\nfrom same import assert_same\n\n"
        "def check(x):\n    assert x\n\n"
        "def call(x):\n    call(x)\n\n"
        "def test_a():\n    check(1)\n\n"
        "def test_b():\n    call(1)\n\n"
        "def test_c():\n    assert_same({}, {})\n\n"
        "def test_d():\n    with pytest.raises(ValueError):\n        call(1)\n\n"
        "def test_e():\n    print(checked)\n"
    )
    assert {name for name in functions(path) if has_assertion(path, name)} == {
        "check",
        "test_a",
        "test_c",
        "test_d",
    }


def commands() -> dict[str, str]:
    """The Makefile's commands that run a file of tests/ -> their PYTHONPATH."""
    lines = (FOLDER.parent / "Makefile").read_text().splitlines()
    found = (re.fullmatch(r"\tPYTHONPATH=(\S+) .* tests/(\w+)\.py", line) for line in lines)
    return {match[2]: match[1] for match in found if match}


@pytest.mark.parametrize("name", commands())
def test_makefile_commands_find_their_modules(name):
    """Although tests/ has folders named like the packages, and an editable install comes after
    them."""
    environment = os.environ | {"PYTHONPATH": commands()[name]}
    load = f"import runpy, sys; sys.path[0] = 'tests'; runpy.run_path('tests/{name}.py')"
    command = (sys.executable, "-c", load)
    done = subprocess.run(
        command, cwd=FOLDER.parent, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_make_clean_keeps_runs_and_measurements(tmp_path):
    removed = [".venv", ".venv-real", "build/lib", "build/bdist.linux-x86_64", "a.egg-info"]
    kept = ["runs/demo/m2mkd", "build/bench", "build/gpu", "docs"]
    for name in (*removed, *kept):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    # Its own VENV, and not that of a make that runs this test: it is deleted.
    command = ["make", "-f", FOLDER.parent / "Makefile", "VENV=.venv", "clean"]
    subprocess.run(command, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, check=True)
    assert not [name for name in removed if (tmp_path / name).exists()]
    assert all((tmp_path / name / "file").exists() for name in kept)
