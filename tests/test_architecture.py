"""The house keeps its shape: who imports whom, how long a file is, which letters an einsum uses."""

import ast
import pathlib
import re

import pytest

from common_jax.nn.axes import AXES

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = [p for p in ("common_jax", "m2mkd_jax", "cliptrans_jax") if (ROOT / p).exists()]

# Top to bottom: a module imports from its own line and from lines below, never from above.
LAYERS = {
    "m2mkd_jax": (
        ("main",),
        ("loading", "pretrained"),
        ("phases",),
        ("config",),
        ("evaluators",),
        ("data",),
        ("hybrid", "connectivity"),
        ("losses", "regularizers"),
        ("assignment",),
        ("nac",),
        ("models",),
        ("moe",),
        ("stages",),
    ),
    "cliptrans_jax": (
        ("main",),
        ("loading",),
        ("runs",),
        ("config",),
        ("encoders",),
        ("pretrained",),
        ("evaluators",),
        ("features", "decode"),
        ("data",),
        ("tensors",),
        ("losses", "stages"),
        ("models", "towers", "translators"),
    ),
    "common_jax": (
        ("app",),
        ("command_line",),
        ("loop",),
        ("report", "task"),
        ("metrics",),
        ("weights",),
        ("checkpoint", "step"),
        ("inputs", "optim"),
        ("workdir",),
        ("state", "mesh", "config"),
        ("hosts",),
        ("nn", "signals", "ranges", "ranking"),
        ("untrusted",),
    ),
}
FOREIGN = {"torch", "torchvision", "tensorflow", "tensorflow_datasets", "tf_keras", "clu"}
# What imports without TensorFlow may be used where it is needed, inside a function.
OPTIONAL = {"m2mkd_jax.data.records": {"tensorflow_datasets"}}


def modules():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path):
    """Absolute names of everything a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(package, name):
    """How far down `name` = package.a.b stands; None for the package itself."""
    parts = name.split(".")
    if len(parts) < 2:
        return None
    return next((i for i, row in enumerate(LAYERS[package]) if parts[1] in row), None)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in FOREIGN - OPTIONAL.get(own, set()), f"{own} imports {name}"
        assert top not in ("configs", "tools", "benchmarks", "tests"), f"{own} imports {name}"
        if top in PACKAGES:
            allowed = {package, "common_jax"}
            assert top in allowed, f"{own} imports {name}: no arrow across"
        if top == package and own.count(".") >= 1 and not own.endswith("__init__"):
            here, there = layer(package, own), layer(package, name)
            assert here is not None, f"{own} is in no row of LAYERS"
            assert there is None or here <= there, f"{own} imports upwards: {name}"


def test_files_and_folders_are_of_a_size_to_read():
    for folder in {path.parent for path in modules()}:
        count = len([p for p in folder.glob("*.py") if p.name != "__init__.py"])
        assert count <= 14, f"{folder} has {count} modules"
    everything = [
        *modules(),
        *(p for d in ("tests", "tools", "benchmarks", "configs") for p in (ROOT / d).rglob("*.py")),
    ]
    for path in everything:
        lines = path.read_text().count("\n")
        assert lines <= 450, f"{path} has {lines} lines"


def test_einsum_letters_come_from_the_table():
    found = 0
    for path in modules():
        for equation in re.findall(r"einsum\(\s*\"([^\"]+)\"", path.read_text()):
            letters = set(re.findall(r"[A-Za-z]", equation))
            lower = {letter for letter in letters if letter.islower()}
            # Small letters are for host-side numpy arithmetic on tables, never for activations.
            assert not lower or path.name == "positions.py", f"{path}: {equation}"
            assert letters - lower <= set(AXES), f"{path}: {equation}"
            found += 1
    assert found > 0


def test_public_functions_have_docstrings_and_types():
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if len(node.body) > 1:  # a line of code says what it does
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None]
                assert not bare, f"{path}: {node.name} leaves {bare} untyped"
                assert node.args.kwarg is None, f"{path}: {node.name} takes **{node.args.kwarg.arg}"


def test_nothing_happens_at_import():
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            derivative = call and getattr(node.value.func, "attr", "") == "defvjp"
            assert derivative or not call, f"{path}:{node.lineno} calls a function at import"
