"""The translations file round-trips, and the table shows its images."""

import io

import numpy as np
import pytest
from PIL import Image

from cliptrans_jax.evaluators import show
from cliptrans_jax.evaluators.show import (
    Hypothesis,
    Row,
    picture_table,
    read_translations,
    write_translations,
)
from common_jax.report import write_report

NASTY = ("a\tb\nc\rd", "\\t is no tab, \\\\ no \\", '"quoted', " ", "x\x85y\u2028z\x0b\x0c", "😀 é")


def row(index, *, others=(), picture=None):
    texts = [NASTY[(index + i) % len(NASTY)] for i in range(4)]
    return Row(index, *texts, -1 / (index + 3), others, picture)


def test_any_text_round_trips(tmp_path):
    path = tmp_path / "new" / "translations.tsv"
    rows = [row(index) for index in range(len(NASTY))]
    write_translations(path, rows)
    assert read_translations(path) == rows
    lines = path.read_bytes().decode().split("\n")
    assert lines[0].split("\t") == ["index", "key", "source", "reference", "output", "score"]
    assert len(lines) == len(rows) + 2  # the header, and nothing after the last newline
    assert lines[1].split("\t")[1] == r"a\tb\nc\rd"


def test_other_hypotheses_are_in_extra_columns(tmp_path):
    path = tmp_path / "translations.tsv"
    others = (Hypothesis("second\n", -0.5), Hypothesis("", -2.0))
    rows = [row(0), row(1, others=others), row(2, others=others[:1])]
    write_translations(path, rows)
    header, first, *_ = path.read_text().split("\n")
    assert header.split("\t")[6:] == ["output_2", "score_2", "output_3", "score_3"]
    assert first.split("\t")[6:] == [""] * 4
    assert read_translations(path) == rows


def test_empty_table_has_a_header(tmp_path):
    path = tmp_path / "translations.tsv"
    write_translations(path, [])
    assert read_translations(path) == []


def test_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "translations.tsv"
    write_translations(path, [row(0)])
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_translations(path, [Row(0, "k", "\ud800", "r", "o", 0.0)])
    monkeypatch.setattr(type(show.epath.Path(path)), "replace", failing)
    with pytest.raises(OSError, match="killed"):
        write_translations(path, [row(1), row(2)])
    assert path.read_bytes() == before


def failing(*arguments):
    raise OSError("killed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index\tkey\n", "should begin with the columns"),
        ("{header}\n0\tk\ts\tr\to\n", "line 2: 5 cells under 6 columns"),
        ("{header}\n0\tk\ts\tr\to\t1.0\nx\tk\ts\tr\to\t1.0\n", "line 3: invalid literal"),
        ("{header}\n0\tk\ts\\x\tr\to\t1.0\n", "line 2: .* none of the escapes"),
        ("{header}\n0\tk\ts\tr\to\\\t1.0\n", "line 2: .* none of the escapes"),
    ],
)
def test_malformed_file_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "translations.tsv"
    path.write_text(content.format(header="\t".join(show.COLUMNS)))
    with pytest.raises(ValueError, match=r"translations\.tsv.*" + message):
        read_translations(path)


def test_table_shows_the_first_rows_with_small_images(tmp_path):
    colour = np.zeros((300, 600, 3), np.uint8)
    colour[..., 0] = 255
    grey = np.full((8, 8, 1), 77, np.uint8)
    rows = [row(0, picture=colour), row(1, picture=grey), row(2), row(3)]
    table = picture_table(rows, limit=3)
    assert table.caption == "Translations, the first 3 of 4"
    assert table.header == ("picture", "source", "reference", "output")
    assert [cells[1:] for cells in table.rows] == [
        (r.source, r.reference, r.output) for r in rows[:3]
    ]
    pictures = [cells[0] for cells in table.rows]
    with Image.open(io.BytesIO(pictures[0])) as image:
        assert (image.format, image.size) == ("PNG", (128, 64))
        assert image.getpixel((5, 5)) == (255, 0, 0)
    with Image.open(io.BytesIO(pictures[1])) as image:
        assert np.array_equal(np.asarray(image), grey[..., 0])
    assert pictures[2] == ""
    page = write_report(tmp_path, title="t", tables=[table]).read_text()
    assert page.count("<td><img") == 2


def test_several_models_have_one_column_each():
    rows = [row(7), row(3, picture=np.zeros((2, 2, 3), np.uint8))]
    outputs = {"without": ["a", "b"], "with": ["c", "d"]}
    table = show.picture_columns(rows, outputs, caption="Both")
    assert table.header == ("picture", "source", "reference", "without", "with")
    assert [cells[1:] for cells in table.rows] == [
        (rows[0].source, rows[0].reference, "a", "c"),
        (rows[1].source, rows[1].reference, "b", "d"),
    ]
    assert [cells[0] == "" for cells in table.rows] == [True, False]


def test_all_rows_are_shown_when_there_are_few():
    assert picture_table([row(0)], limit=3).caption == "Translations"
    with pytest.raises(ValueError, match="limit=0"):
        picture_table([row(0)], limit=0)
