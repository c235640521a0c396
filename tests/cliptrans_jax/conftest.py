"""Fixtures shared by several test files."""

import pytest
from tiny_cliptrans import write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The folder of a small corpus."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "shapes")
