"""Size-limited reading of tokenizer files, whose content is not trusted."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common_jax.untrusted import brief, plain, refuse_pointer
from common_jax.workdir import read_json

# The values of fields, by name. A file may lack a field, whose default is then among the values.
Fields = Mapping[str, tuple[Any, ...]]
# The fields of each step, by its type, of each section of a tokenizer.json. Type None is for a
# section that is missing, or for a step without a type, as older versions wrote them.
Sections = Mapping[str, Mapping[str | None, Fields]]

# Several times the largest published file, Gemma's.
MAX_BYTES = 1 << 27


def read_record(path: Path) -> dict[str, Any]:
    """Reads a JSON file with one object; raises ValueError, naming the file, for anything else."""
    return read_json(require_bounded(path))


def read_bounded(path: Path) -> bytes:
    """Returns a file's bytes; raises ValueError if it is larger than any tokenizer's, or a git-lfs
    pointer."""
    content = require_bounded(path).read_bytes()
    refuse_pointer(path, content)
    return content


def require_bounded(path: Path) -> Path:
    """Returns the path; raises ValueError if the file is larger than any tokenizer's."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, more than any tokenizer's {MAX_BYTES}; fetch "
            "it again"
        )
    return path


def require_sections(record: Mapping[str, Any], sections: Sections) -> None:
    """Raises ValueError if a tokenizer.json has a step that is not in `sections`.

    Our tokenizers are built from pieces, and would silently ignore such a step.
    """
    for section, kinds in sections.items():
        for step in steps_of(record.get(section)):
            kind = step.get("type")
            if kind not in kinds:
                known = " or ".join(repr(name) for name in kinds if name)
                raise ValueError(f"its {section} is {brief(kind)}, and the published one's {known}")
            require_fields(step, kinds[kind], f"{section} {kind}")


def require_fields(record: Mapping[str, Any], fields: Fields, name: str) -> None:
    """Raises ValueError if any of `fields` is in the record with another value."""
    for field, values in fields.items():
        if field in record and record[field] not in values:
            known = " or ".join(map(repr, values))
            raise ValueError(
                f"its {name} has {field}={brief(record[field])}, and the published one's is {known}"
            )


def steps_of(section: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    """Returns the steps of a normaliser or pre-tokeniser in a tokenizer.json, in order; one without
    a type if the section is missing."""
    section = {} if section is None else section
    if section.get("type") != "Sequence":
        return [section]
    return section["normalizers"] if "normalizers" in section else section["pretokenizers"]


@contextlib.contextmanager
def parsing(path: Path, kind: str) -> Iterator[None]:
    """Turns any error about a file's content into a ValueError saying that the file is not
    `kind`."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{path} is not {kind} ({type(error).__name__}: {plain(str(error))}); fetch it again"
        ) from error


def added_message(path: Path, added: Sequence[str]) -> str:
    """Returns the message for a published tokenizer to which tokens were added."""
    more = f" and {len(added) - 5} more" if len(added) > 5 else ""
    return (
        f"{path} has tokens that the published tokenizer lacks: "
        f"{plain(', '.join(added[:5]))}{more}. No network here has them in its table; use the "
        "folder of the published tokenizer, in which all other tokens have the same ids"
    )
