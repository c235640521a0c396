"""The identity of a run: run.json, written at its first start, with an id that is also in all of
the run's checkpoints."""

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
DIGITS = 12  # hexadecimal; 48 bits are exact in float64, the type that processes exchange


@dataclasses.dataclass(frozen=True)
class Identity:
    """The content of run.json."""

    id: str  # random hexadecimal digits
    unmarked: tuple[int, ...] = ()  # steps of checkpoints that an earlier version wrote without id


def read_identity(workdir: epath.PathLike) -> Identity | None:
    """Reads the identity of the run in `workdir`; None if there is no run.json. Raises ValueError,
    naming the file, if run.json holds no identity."""
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return None
    content = read_json(path)
    run_id, unmarked = content.get("id"), content.get("unmarked", [])
    are_steps = isinstance(unmarked, list) and all(type(step) is int for step in unmarked)
    if not isinstance(run_id, str) or not run_id or not are_steps:
        raise ValueError(
            f"{path} must hold the id of a run, not {str(content)[:200]}. Restore it; or delete "
            "it, and the run takes the id of its checkpoints"
        )
    return Identity(run_id, tuple(unmarked))


def keep_identity(
    workdir: epath.PathLike, *, adopt: str | None = None, unmarked: Sequence[int] = ()
) -> Identity:
    """Returns the identity of the run in `workdir`; creates one if there is none.

    All processes must call this at the same point; all get the same id.

    Args:
      workdir: the run's folder.
      adopt: the id to write if there is no run.json; None draws one.
      unmarked: steps of the run's existing checkpoints without an id.
    """
    identity = None
    if jax.process_index() == 0:
        identity = read_identity(workdir)
        if identity is None:
            identity = Identity(adopt or secrets.token_hex(DIGITS // 2), tuple(unmarked))
            _write(workdir, identity)
    if jax.process_count() == 1:
        return identity
    # The others may not see the file yet.
    number = int(hosts.largest(int(identity.id, 16) if identity else -1)[0])
    return identity or Identity(f"{number:0{DIGITS}x}")


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
