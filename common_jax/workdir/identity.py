"""The identity of a run: run.json, made at its first start, with an id that all of its checkpoints
carry."""

import dataclasses
import datetime
import importlib.metadata
import secrets
from collections.abc import Sequence

import jax
from etils import epath

from common_jax import hosts
from common_jax.workdir.files import read_json, write_json

FILE = "run.json"
PACKAGE = "modular-jax"
DIGITS = 12  # hexadecimal: 48 bits, which float64 holds exactly and all processes can agree on


@dataclasses.dataclass(frozen=True)
class Identity:
    """The identity of a run.

    Attributes:
      id: random hexadecimal digits.
      unmarked: steps of the checkpoints that an earlier version wrote without an id.
    """

    id: str
    unmarked: tuple[int, ...] = ()


def read_identity(workdir: epath.PathLike) -> Identity | None:
    """The identity of the run in `workdir`; None where there is no run.json.

    Raises:
      ValueError: when run.json is not one, naming it.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return None
    content = read_json(path)
    found, unmarked = content.get("id"), content.get("unmarked", [])
    steps = isinstance(unmarked, list) and all(type(step) is int for step in unmarked)
    if not isinstance(found, str) or not found or not steps:
        raise ValueError(
            f"{path} holds {str(content)[:200]}, where the id of a run is expected. Restore it; or "
            "delete it, and the run takes the id of its checkpoints"
        )
    return Identity(found, tuple(unmarked))


def keep_identity(
    workdir: epath.PathLike, *, adopt: str | None = None, unmarked: Sequence[int] = ()
) -> Identity:
    """The identity of the run in `workdir`, a new one if it has none. All processes must call this
    at the same place; all get the same id.

    Args:
      workdir: of the run.
      adopt: the id to write where there is no run.json; None draws one.
      unmarked: steps of the run's checkpoints that have no id.
    """
    found = None
    if jax.process_index() == 0:
        found = read_identity(workdir)
        if found is None:
            found = Identity(adopt or secrets.token_hex(DIGITS // 2), tuple(unmarked))
            _write(workdir, found)
    if jax.process_count() == 1:
        return found
    # The others may not see the file yet.
    number = int(hosts.agree(int(found.id, 16) if found else -1)[0])
    return found or Identity(f"{number:0{DIGITS}x}")


def _write(workdir: epath.PathLike, identity: Identity) -> None:
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"id": identity.id, "version": _version(), "made": now}
    if identity.unmarked:
        content["unmarked"] = list(identity.unmarked)
    write_json(workdir / FILE, content)


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"
