"""The pictures of a report as files: whether they are complete, and which panels they show."""

import hashlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from etils import epath
from PIL import Image

from common_jax.report.gather import Panels

DRAWN = "panels"  # the key of the fingerprint in the file


def is_picture(path: epath.PathLike) -> bool:
    """Whether a file exists and is a complete PNG, not one cut off by a full disk."""
    return _read_picture(path) is not None


def read_drawn(path: epath.PathLike, panels: Panels) -> bytes | None:
    """The file if it is a complete picture of these panels by `draw.draw_panels`, else None."""
    content, about = _read_picture(path) or (None, {})
    return content if about.get(DRAWN) == fingerprint(panels) else None


def _read_picture(path: epath.PathLike) -> tuple[bytes, Mapping[str, Any]] | None:
    """A complete PNG and its text chunks; None if there is none."""
    try:
        content = epath.Path(path).read_bytes()
        with Image.open(BytesIO(content), formats=["PNG"]) as image:
            image.load()
            about = image.info
    except (OSError, SyntaxError, ValueError):  # PIL raises all three for unreadable files
        return None
    # PIL accepts a file without this last chunk.
    return (content, about) if content[-8:-4] == b"IEND" else None


def fingerprint(panels: Panels) -> str:
    """Identifies panels; `draw.draw_panels` stores it in the picture."""
    return hashlib.sha256(repr(panels).encode()).hexdigest()
