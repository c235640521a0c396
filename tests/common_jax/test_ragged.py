"""Sequences of unequal length in flat arrays: they behave like lists of their elements."""

import pickle
import zlib

import numpy as np
import pytest

from common_jax.inputs.ragged import (
    Chain,
    Lines,
    Picked,
    Ragged,
    elements,
    joined,
    lengths_of,
    take,
)
from common_jax.inputs.texts import read_lines, read_whole_lines

ROWS = [[5, 6, 7], [], [8], [9, 9]]
TEXTS = ("a dog", "", "zwei Hügel", "字 😀")


def ragged():
    return Ragged.of(np.concatenate(ROWS).astype(np.int32), np.array([3, 0, 1, 2], np.int32))


def test_ragged_arrays_match_a_list():
    rows = ragged()
    assert [row.tolist() for row in rows] == ROWS and rows[-1].tolist() == ROWS[-1]
    assert [row.tolist() for row in rows[1:3]] == ROWS[1:3]
    assert [row.tolist() for row in rows.take(np.array([3, 0]))] == [ROWS[3], ROWS[0]]
    assert np.shares_memory(rows[0], rows.flat)
    with pytest.raises(IndexError):
        rows[4]


def test_lines_match_a_tuple():
    lines = Lines.of(TEXTS)
    assert lines == TEXTS and lines == TEXTS and lines == [*TEXTS]
    assert lines != TEXTS[:3] and lines != (*TEXTS[:3], "x") and lines != "abcd"
    assert (lines[-1], [*lines[1:3]], "a dog" in lines) == (TEXTS[-1], [*TEXTS[1:3]], True)
    assert (lengths_of(lines) == 0).tolist() == [False, True, False, False]
    assert pickle.loads(pickle.dumps(lines)) == TEXTS
    assert take(lines, np.array([2, 0])) == (TEXTS[2], TEXTS[0])
    assert take(TEXTS, np.array([2, 0])) == (TEXTS[2], TEXTS[0])


def test_elements_are_picked_from_several_sequences():
    rows = np.array([3, 0, 0], np.int32)
    parts = {"en": ragged(), "de": [[1], [2]], "fr": np.eye(2)}
    picked = Picked.of(parts, ["en", "de", "fr"], rows)
    assert [np.asarray(row).tolist() for row in picked] == [[9, 9], [1], [1, 0]]
    assert lengths_of(picked).tolist() == [2, 1, 2]
    for places in ([2, 0, 1, 0], []):
        found = elements(picked, np.array(places, int))
        assert [np.asarray(row).tolist() for row in found] == [
            np.asarray(picked[place]).tolist() for place in places
        ]
    assert [len(row) for row in picked.take(np.array([1, 0]))] == [1, 2]
    assert np.asarray(Picked.of({"x": np.eye(3)}, ["x"] * 2, rows[1:])).tolist() == [[1, 0, 0]] * 2


def test_chain_concatenates_its_parts():
    chain = Chain((Lines.of(TEXTS[:2]), TEXTS[2:], ()))
    assert ([*chain], len(chain), chain[1], chain[2]) == ([*TEXTS], 4, TEXTS[1], TEXTS[2])
    with pytest.raises(IndexError):
        chain[4]


@pytest.mark.parametrize("content", ["a\nbc\n\nd\n", " a\nb \nc", "a\r\nb\r\n", "", "\n"])
def test_joined_matches_python_join(tmp_path, monkeypatch, content):
    monkeypatch.setattr("common_jax.inputs.ragged.PIECE", 2)
    (tmp_path / "x.en").write_bytes(content.encode())
    lines = read_lines(tmp_path / "x.en")
    for texts in (lines, Chain((lines, ("x", "y"), lines)), [*lines], lines.take(slice(1, None))):
        wanted = "\n".join(texts).encode()
        assert b"".join(joined(texts)) == wanted
        assert zlib.crc32(b"".join(joined(texts))) == zlib.crc32(wanted)


def test_lines_are_stripped_like_python_strip(tmp_path):
    blank = " \t\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000"
    generator = np.random.default_rng(0)
    letters = [*blank, *"aß字\u200b😀à"]
    lines = ["".join(generator.choice(letters, size)) for size in generator.integers(0, 9, 2000)]
    (tmp_path / "x.en").write_bytes("\n".join(lines).encode())
    wanted = tuple(line.strip() for line in read_whole_lines(tmp_path / "x.en"))
    assert read_lines(tmp_path / "x.en") == wanted and len(wanted) >= 1999
