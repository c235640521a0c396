"""Lines of text that name pictures."""

import io

import pytest

from cliptrans_jax.lines import Line, add_pictures, read_sentences, read_stream


def test_line_may_name_a_picture_without_a_sentence(tmp_path):
    file, picture = tmp_path / "lines.tsv", tmp_path / "1.png"
    picture.write_bytes(b"")
    content = "\t1.png\n \t 1.png\t\nred\t1.png\n\tred\t1.png\n\t\n\n"
    file.write_text(content)
    expected = [("", picture), ("", picture), ("red", picture), ("red", picture)]
    expected += [("", None), ("", None)]
    for lines in (read_sentences(file), read_stream(io.BytesIO(content.encode()), "stdin")):
        found = [(line.text, line.picture) for line in add_pictures(lines, tmp_path)]
        assert found == expected
    # A tab has this meaning only where lines name pictures.
    assert [line.text for line in read_sentences(file)][:2] == ["1.png", "1.png"]
    named = add_pictures(read_sentences(file)[:1], tmp_path, ["1.png"])
    assert [(line.text, line.picture) for line in named] == [("1.png", picture)]
    (alone,) = add_pictures([Line.of("sentence 1", "\t1.png")], tmp_path)
    assert (alone.text, alone.picture) == ("", picture)


@pytest.mark.parametrize(
    ("lines", "names", "said"),
    [(2, 1, "sentences than names of pictures"), (1, 2, "names of pictures than sentences")],
)
def test_numbers_of_sentences_and_pictures_must_agree(lines, names, said, tmp_path):
    blank = [Line(f"line {i}", "") for i in range(lines)]
    with pytest.raises(ValueError, match=f"^there are more {said}; give one name per line"):
        list(add_pictures(blank, tmp_path, [""] * names))
