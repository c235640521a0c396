"""All processes of a run must be started alike: with the same config, and by the same code."""

import hashlib
import importlib.metadata
import importlib.util
import json
import pathlib
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import common_jax
from common_jax import config as configs
from common_jax import hosts
from common_jax.workdir.claim import shorten_lines

# Fields that may differ: where a process reads its own copy of the data, how many workers read it,
# where it caches, and what only process 0 or a profiler uses.
OWN = re.compile(r"(data|ood)\.path|data\.workers|features|run\.(compilation_cache|profile|wandb)")


def require_same_start(config: Mapping[str, Any], *, packages: Sequence[str]) -> None:
    """Compares the config, except OWN fields, and the code of all processes, which must call this
    together. Otherwise each would update its own copy of the parameters in its own way.

    Args:
      config: the config, as flags have set it.
      packages: names of the packages whose source files are compared.

    Raises:
      hosts.Disagreement: in all processes, with what differs between the first two that do, or if
        they have different numbers of devices.
    """
    hosts.require_same_devices()
    mine = _describe(config, packages)
    first = hosts.send(mine)
    # As text, in which NaN is equal to itself.
    other = hosts.first_with(json.dumps(first) != json.dumps(mine))
    if other is None:
        return
    here = socket.gethostname()
    there, lines = hosts.send((here, configs.difference(first, mine)), source=other)
    raise hosts.Disagreement(
        f"process 0 on {hosts.send(here)} and process {other} on {there} were started differently "
        f"(process 0 -> process {other}):\n  "
        + "\n  ".join(shorten_lines(lines))
        + "\ngive all processes the same --config and flags, and install the same versions for all"
    )


def _describe(config: Mapping[str, Any], packages: Sequence[str]) -> dict[str, Any]:
    """What must be the same in all processes, as it is read from JSON."""
    shared = {
        f"config.{key}": value for key, value in configs.flatten(config) if not OWN.fullmatch(key)
    }
    shared |= {f"version of {x.__name__}": x.__version__ for x in (common_jax, jax)}
    shared["version of jaxlib"] = importlib.metadata.version("jaxlib")
    # Checkouts of different commits have the same version.
    shared |= {f"code of {name}": _checksum(name) for name in packages}
    # Values that JSON lacks are refused later, by name.
    return json.loads(json.dumps(shared, default=repr))


def _checksum(package: str) -> str:
    """A checksum of a package's source files and of their names."""
    folder = pathlib.Path(importlib.util.find_spec(package).origin).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]
