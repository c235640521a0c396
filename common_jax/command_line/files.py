"""Config files: Python with a function get_config(), given as FILE.py or FILE.py:ARGUMENTS.

FILE is a path, or the name of one of this project's own configs, such as SYSTEM/NAME.py, which
works from any folder.
"""

import difflib
import os
import pathlib
import runpy
import traceback
import types
from typing import Any

import ml_collections

import common_jax

# The project's own configs: inside an installed package, or beside it in a checkout.
PACKAGE = pathlib.Path(common_jax.__file__).parent
INSTALLED = (PACKAGE / "configs", PACKAGE.parent / "configs")


def read_config_file(text: str) -> ml_collections.ConfigDict:
    """The locked ConfigDict that the file's get_config() returns for the arguments.

    Args:
      text: the value of --config, FILE.py or FILE.py:ARGUMENTS. get_config() is called with the
        part after the first colon.

    Raises:
      ValueError: for an error in the file or its arguments, with file and line.
      OSError: for a file that cannot be read.
    """
    name, colon, arguments = text.partition(":")
    get_config = run_config_file(text).get("get_config")
    if not callable(get_config):
        raise ValueError(f"--config={name} has no function get_config() that returns a config")
    try:
        config = get_config(arguments) if colon else get_config()
    except Exception as error:
        raise _located(error, name) from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"--config={name}: get_config() must return a ConfigDict, and returned "
            f"{type(config).__name__}"
        )
    return config.lock()


def run_config_file(text: str) -> dict[str, Any]:
    """The names that the config file in `text`, FILE.py:ARGUMENTS, defines; raises as
    `read_config_file`."""
    name = text.partition(":")[0]
    path = _find(name, text)
    try:
        return runpy.run_path(str(path))
    except Exception as error:
        raise _located(error, name) from error


def describe_config_file(text: str) -> str:
    """The docstring of the config file in `text` and the defaults of its arguments, for --help;
    raises as `read_config_file`."""
    names = run_config_file(text)
    about = [names.get("__doc__") or f"{text} has no docstring."]
    if defaults := names.get("ARGUMENTS"):
        about.append("Defaults: " + ", ".join(f"{key}={value}" for key, value in defaults.items()))
    return "\n".join(about)


def load_beside(file: str, name: str) -> types.SimpleNamespace:
    """The names defined by `name`.py in the same folder as `file`.

    For config files that share settings. They are run by path, from any working directory, and are
    not in a package, so an import statement would not find the other file.
    """
    return types.SimpleNamespace(**runpy.run_path(str(pathlib.Path(file).with_name(f"{name}.py"))))


def _find(name: str, text: str) -> pathlib.Path:
    """The path of an existing config file."""
    if "://" in text:
        raise ValueError(f"--config={text} must be a local file; copy it here first")
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.py")) or sorted(path.glob("*/*.py"))
        raise IsADirectoryError(
            f"--config={name} is a folder; give a file in it{_listed(files)}, or an absolute path"
        )
    if path.suffix == ".json":
        raise ValueError(
            f"--config={name} is JSON, and a config is a Python file, such as the one that the run "
            "was started with"
        )
    if path.is_file():
        return path
    name = name.removeprefix("configs/")
    installed = {
        str(file.relative_to(folder)): file
        for folder in (() if path.is_absolute() else INSTALLED)
        for file in folder.glob("**/*.py")
    }
    if name in installed:
        return installed[name]
    folder = pathlib.Path(os.path.abspath(path)).parent
    # A wrong working directory is a more common mistake than a wrong name.
    here = "" if path.is_absolute() else f"; relative paths start at {pathlib.Path.cwd()}"
    known = {one.stem: one.name for one in folder.glob("*.py")}
    known = {pathlib.Path(one).stem: one for one in installed} | known
    close = difflib.get_close_matches(path.name.removesuffix(".py"), known, n=1)
    hint = f" (did you mean {known[close[0]]!r}?)" if close else ""
    if not folder.is_dir() and not hint:
        nearest = next(one for one in folder.parents if one.is_dir())
        raise FileNotFoundError(
            f"--config={name}: there is no folder {folder}; only {nearest} exists{here}"
        )
    raise FileNotFoundError(f"--config={name}: there is no such file in {folder}{hint}{here}")


def _listed(files: list[pathlib.Path]) -> str:
    """` (a.py, b.py)`, or nothing."""
    shown = [*(str(one) for one in files[:10]), *(["..."] if len(files) > 10 else [])]
    return f" ({', '.join(shown)})" if shown else ""


def _located(error: Exception, name: str) -> Exception:
    """Turns an error in a config file into one that a user can act on, with file and line."""
    message = str(error) or type(error).__name__
    message = message if len(message) <= 1500 else f"{message[:1500]}..."
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return ValueError(
            f"--config={name} is not Python: {error.msg} in {error.filename}, line {error.lineno}"
        )
    path = str(_find(name, name))
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    where = f"{path}, line {lines[-1]}" if lines else path
    if isinstance(error, ValueError) and lines:
        return ValueError(f"{message} ({where})")
    return ValueError(f"--config={name}: {type(error).__name__} in {where}: {message}")
