"""What the repository's files import."""

import ast
import pathlib
from collections.abc import Iterator


def imports(path: pathlib.Path) -> Iterator[str]:
    """Absolute names of everything a file imports, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
