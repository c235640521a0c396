"""Untrusted JSON, which may have been changed by anyone or by accident."""

import json
from collections.abc import Sequence
from typing import Any

from common_jax.untrusted.refusal import RefusedError, brief


def parse_json(content: bytes) -> Any:
    """Returns the value of JSON text.

    Ignores a byte order mark, which some editors write. Accepts NaN and Infinity, which Python
    writes for numbers that are not finite. Raises RefusedError for text that is not UTF-8 or not
    JSON, that nests too deep, or that has one key of an object twice.
    """
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 ({error.reason} at byte {error.start})"
    except RefusedError:
        raise
    except RecursionError:
        message = "is not JSON that can be read: it nests too deep"
    except ValueError as error:
        message = f"is not JSON ({error})"
    raise RefusedError(message)


def as_text(value: Any) -> str:
    """Returns a value of JSON that must be text; raises TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} is not text")
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RefusedError(f"gives the key {brief(duplicate)} twice in one object")
    return value
