"""Untrusted JSON, which anyone may have changed, on purpose or by accident."""

import json
from collections.abc import Sequence
from typing import Any

from common_jax.untrusted.refusal import RefusedError, brief


def parse_json(content: bytes) -> Any:
    """Parses JSON text.

    Ignores a byte order mark, which some editors write. Accepts NaN and Infinity, which Python
    writes for non-finite numbers. Raises RefusedError for text that is not UTF-8 or not JSON, is
    nested too deep, or has the same key twice in one object.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 ({error.reason} at byte {error.start})"
    except RefusedError:
        raise
    except RecursionError:
        message = "is JSON that is nested too deep"
    except ValueError as error:
        message = f"is not JSON ({error})"
    raise RefusedError(message)


def as_text(value: Any) -> str:
    """Returns a JSON value that must be text; raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} is not text")
    return value


def as_id(value: Any) -> float | str:
    """Returns a JSON value that must be a number or text; raises TypeError for anything else."""
    if not isinstance(value, (int, float, str)):
        raise TypeError(f"{brief(value)} is not an id")
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RefusedError(f"has the key {brief(duplicate)} twice in one object")
    return value
