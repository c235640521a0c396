"""The architecture holds: who imports whom, how long files are, which letters an einsum uses."""

import ast
import pathlib
import re

import pytest
from imports import imports

from common_jax.nn.axes import AXES
from m2mkd_jax.config import PHASE_NAMES
from m2mkd_jax.data.sources import SOURCES
from m2mkd_jax.evaluators import EVALUATORS
from m2mkd_jax.families import FAMILIES
from m2mkd_jax.losses import DISTILLATIONS
from m2mkd_jax.moe.config import ROUTERS
from m2mkd_jax.moe.dispatch import DISPATCHERS
from m2mkd_jax.phases import PHASES

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = [p for p in ("common_jax", "m2mkd_jax", "cliptrans_jax") if (ROOT / p).exists()]

# Top to bottom: a module imports from its own line and lines below, never from lines above.
LAYERS = {
    "m2mkd_jax": (
        ("__main__",),
        ("commands",),
        ("main",),
        ("loading", "pretrained", "token_maps"),
        ("trained",),
        ("phases",),
        ("config",),
        ("families",),
        ("evaluators", "picture_files"),
        ("data",),
        ("hybrid", "connectivity", "curves"),
        ("losses", "regularizers"),
        ("assignment",),
        ("nac",),
        ("models",),
        ("moe",),
        ("stages",),
    ),
    "cliptrans_jax": (
        ("__main__",),
        ("commands",),
        ("main",),
        ("export", "vectors"),
        ("lines",),
        ("loading", "curves"),
        ("runs",),
        ("config",),
        ("resident",),
        ("encoders",),
        ("pretrained",),
        ("evaluators",),
        ("features", "decode"),
        ("data",),
        ("tensors",),
        ("losses", "contrastive", "stages"),
        ("models", "towers", "translators"),
    ),
    "common_jax": (
        ("commands",),
        ("app",),
        ("command_line",),
        ("loop",),
        ("report", "task", "log", "run_config"),
        ("metrics",),
        ("weights",),
        ("checkpoint", "step"),
        ("inputs", "optim"),
        ("workdir",),
        ("nn",),
        ("state", "mesh", "config"),
        ("hosts", "start_up"),
        ("signals", "ranges", "ranking"),
        ("untrusted",),
    ),
}
FOREIGN = {"torch", "torchvision", "tensorflow", "tensorflow_datasets", "tf_keras", "clu"}
# Modules that need no TensorFlow to be imported may be used inside a function where needed.
OPTIONAL = {"m2mkd_jax.data.files.records": {"tensorflow_datasets"}}
# Words of the two papers, their code and their tasks.
PAPERS = re.compile(
    r"\b(?i:m2mkd|nacs?|v?-?moe|cliptrans|m-?clip|m?bart|bleu|chrf|meteor|originals?|teachers?"
    r"|students?|distill\w*|captioning|routers?)(?:_jax)?\b|\bCLIP\b"
)
# The file of a door -> its table.
DOORS = {
    "m2mkd_jax/phases/__init__.py": PHASES,
    "m2mkd_jax/families/__init__.py": FAMILIES,
    "m2mkd_jax/evaluators/__init__.py": EVALUATORS,
    "m2mkd_jax/losses.py": DISTILLATIONS,
    "m2mkd_jax/data/sources.py": SOURCES,
    "m2mkd_jax/moe/config.py": ROUTERS,
    "m2mkd_jax/moe/dispatch.py": DISPATCHERS,
}


def modules():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def layer(package, name):
    """How far down `name` = package.a.b is; None for the package itself."""
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


def test_files_and_folders_stay_small():
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


def test_common_code_names_no_paper():
    """Neither in code, docstrings nor comments. Readers of published files may name whose files
    they read."""
    paths = [path for path in modules() if path.is_relative_to(ROOT / "common_jax")]
    read = [path for path in paths if "weights" not in path.parts]
    assert len(read) > 40
    for path in read:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = PAPERS.search(line)
            assert found is None, f"{path}:{number} names {found[0]!r}: {line.strip()}"


def test_einsum_letters_come_from_the_table():
    found = 0
    for path in modules():
        for equation in re.findall(r"einsum\(\s*\"([^\"]+)\"", path.read_text()):
            letters = set(re.findall(r"[A-Za-z]", equation))
            lower = {letter for letter in letters if letter.islower()}
            # Lower-case letters are for host-side numpy arithmetic on tables, never for
            # activations.
            assert not lower or path.name == "positions.py", f"{path}: {equation}"
            assert letters - lower <= set(AXES), f"{path}: {equation}"
            found += 1
    assert found > 0


def test_public_functions_have_docstrings_and_types():
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if len(node.body) > 1:  # a line of code explains itself
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


def config_classes(node):
    """Names of config classes in an expression; ConfigDict does not count."""
    for part in ast.walk(node):
        name = getattr(part, "id", getattr(part, "attr", ""))
        if name.endswith(("Config", "CONFIG")):
            yield name


def checked_classes(tree):
    """Config classes in calls of `isinstance` and in comparisons, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "type"):
            asked = node.args[1:]
        elif isinstance(node, ast.Compare):
            asked = [one for one in (node.left, *node.comparators) if not isinstance(one, ast.Call)]
        else:
            continue
        for expression in asked:
            yield from ((node.lineno, name) for name in config_classes(expression))


def test_no_file_checks_the_class_of_a_config():
    found = {}
    for path in modules():
        file = str(path.relative_to(ROOT))
        if not file.startswith("common_jax"):
            found[file] = list(checked_classes(ast.parse(path.read_text())))
    assert len(found) > 80
    assert {file: asked for file, asked in found.items() if asked} == {}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("isinstance(config.model, NacConfig)", ["NacConfig"]),
        ("isinstance(x, vit.ViTConfig | VMoEConfig)", ["ViTConfig", "VMoEConfig"]),
        ("type(x) is NacConfig", ["NacConfig"]),
        ("isinstance(x, ml_collections.ConfigDict)", []),
        ("isinstance(x, Mapping)", []),
        ("x == NacConfig(width=8)", []),
    ],
)
def test_class_checks_are_detected(code, names):
    assert [name for _, name in checked_classes(ast.parse(code))] == names


def test_phase_names_appear_only_in_the_phases_and_the_config():
    config = "m2mkd_jax/config.py"
    for path in (ROOT / "m2mkd_jax").rglob("*.py"):
        file = str(path.relative_to(ROOT))
        if file.startswith("m2mkd_jax/phases/"):
            continue
        constants = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and node.value in PHASE_NAMES
        ]
        # The tuple, and the default of `Config.phase`.
        assert len(constants) == (len(PHASE_NAMES) + 1 if file == config else 0), file


def names_listed(tree):
    """The strings in each literal tuple, list and set with at least two, and the keys of tables.

    The evaluators of a phase do not count: its record chooses among the table's.
    """
    keywords = (node for node in ast.walk(tree) if isinstance(node, ast.keyword))
    chosen = [keyword.value for keyword in keywords if keyword.arg == "evaluators"]
    for node in ast.walk(tree):
        if node in chosen:
            continue
        entries = getattr(node, "keys" if isinstance(node, ast.Dict) else "elts", ())
        if isinstance(node, ast.Dict) or len(entries) > 1:
            yield {entry.value for entry in entries if isinstance(entry, ast.Constant)}


@pytest.mark.parametrize("door", DOORS)
def test_each_door_has_a_single_table(door):
    names, tables = set(DOORS[door]), []
    for path in (ROOT / door.split("/")[0]).rglob("*.py"):
        file = str(path.relative_to(ROOT))
        # Only for phases, the config has its own tuple, since it is below them.
        if DOORS[door] is PHASES and file == "m2mkd_jax/config.py":
            continue
        listed = names_listed(ast.parse(path.read_text()))
        tables += [file for some in listed if len(some & names) >= min(2, len(names))]
    assert tables == [door]


def test_tables_are_told_from_choices_of_a_phase():
    code = "Phase(evaluators=('a', 'b'), folder='c'), ('a', 'b'), {'a': 1, 'b': 2}"
    assert [listed for listed in names_listed(ast.parse(code)) if listed] == [{"a", "b"}] * 2
