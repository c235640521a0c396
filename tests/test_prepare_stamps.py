"""Tux Paint's stamps as a table: sentences, pictures, and splits that keep all stamps of a thing
together."""

import numpy as np
import prepare_stamps
import pytest
from PIL import Image

from cliptrans_jax.data import emoji_set
from cliptrans_jax.data.corpora import DataConfig, load_corpus
from cliptrans_jax.data.corpus import Corpus

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{}" height="{}">'
    '<rect width="90" height="90" fill="#00ff00"/></svg>'
)


def stamp(folder, name, english, *others, picture="png"):
    path = folder / "usr/share/tuxpaint/stamps" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (english, *others)
    path.with_name(f"{path.name}.txt").write_text("".join(f"{line}\n" for line in lines))
    if picture == "png":
        image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
        image.paste((9, 9, 9, 0), (0, 0, 20, 20))  # transparent on the left
        image.save(path.with_name(f"{path.name}.png"))
    elif picture == "svg":
        path.with_name(f"{path.name}.svg").write_text(SVG.format(20, 40))


@pytest.fixture
def stamps(tmp_path):
    folder = tmp_path / "stamps"
    stamp(folder, "animals/frog", "A frog.", "de.utf8=Ein Frosch.", "zh_CN.utf8=一只青蛙。")
    stamp(folder, "animals/frog-1", "A green frog!", "cs.utf8=Zelená žába!", "broken line")
    stamp(folder, "vehicles/truck", "A truck.", "de.utf8= Ein Lastwagen. ", picture="svg")
    stamp(folder, "doc/notes", "No stamp.", picture="")
    return folder


def make(stamps, out, *flags):
    assert prepare_stamps.main([str(stamps), str(out), "--size=16", *flags]) == 0
    lines = (out / "stamps.tsv").read_text().splitlines()
    return [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]


def test_stamp_becomes_a_row_with_its_picture(stamps, tmp_path, capsys):
    rows = make(stamps, tmp_path / "out")
    assert [row["picture"] for row in rows] == [
        "animals/frog-1.png",
        "animals/frog.png",
        "vehicles/truck.png",
    ]
    sentences = {key: rows[1][key] for key in ("en", "de", "zh", "cs")}
    assert sentences == {"en": "A frog.", "de": "Ein Frosch.", "zh": "一只青蛙。", "cs": ""}
    assert rows[0]["cs"] == "Zelená žába!" and rows[2]["de"] == "Ein Lastwagen."
    assert "sentences: en 3, de 2, cs 1, zh 1" in capsys.readouterr().out
    frog = Image.open(tmp_path / "out/images/animals/frog.png")
    assert (frog.size, frog.mode) == ((16, 16), "RGB")
    pixels = [frog.getpixel(place) for place in ((2, 8), (13, 8), (13, 1))]
    assert pixels == [(255,) * 3, (255, 0, 0), (255,) * 3]
    truck = Image.open(tmp_path / "out/images/vehicles/truck.png")
    assert [truck.getpixel(place) for place in ((8, 8), (1, 8))] == [(0, 255, 0), (255,) * 3]


def test_stamp_table_loads_as_a_corpus(stamps, tmp_path):
    split = make(stamps, tmp_path / "out")[1]["split"]
    config = DataConfig("table", str(tmp_path / "out/stamps.tsv"))
    corpus = load_corpus(config, split, ("en", "de"), with_images=True)
    assert "A frog." in corpus.texts["en"]
    assert corpus.require_images()[0].shape == (16, 16, 3)


def test_stamps_of_one_thing_share_a_split(stamps, tmp_path):
    rows = [make(stamps, tmp_path / "out", f"--seed={seed}") for seed in range(40)]
    assert all(one[0]["split"] == one[1]["split"] for one in rows)
    assert {one[2]["split"] for one in rows} == {"train", "val", "test"}
    assert any(one[0]["split"] != one[2]["split"] for one in rows)
    names = {
        "a/frog": "A frog.",
        "a/frog-1": "A toad.",
        "b/thing": "The toad",
        "b/thing2": "One car",
        "c": "An X",
    }
    things = prepare_stamps.things_of(names)
    assert len({things[key] for key in list(names)[:4]}) == 1 and len(set(things.values())) == 2


def test_emoji_are_for_training_unless_they_name_held_out_stamps(stamps, tmp_path, monkeypatch):
    names = {"en": ("frog", "red truck", "truck"), "de": ("Frosch", "roter Lastwagen", "Lastwagen")}

    def load(split, languages, size):
        texts = names if split == "train" else dict.fromkeys(names, ())
        keys = ("\U0001f438", "\U0001f69a", "\U0001f69b")[: len(texts["en"])]
        images = Pictures([np.zeros((size, size, 3), np.uint8)] * len(keys))
        return Corpus("emoji", texts, images, keys)

    monkeypatch.setattr(emoji_set, "load_emoji", load)
    for seed in range(40):
        rows = make(stamps, tmp_path / "out", "--with-emoji", f"--seed={seed}")
        held_out = {row["en"] for row in rows[:3] if row["split"] != "train"}
        emoji = rows[3:]
        assert {row["split"] for row in emoji} == {"train"}
        expected = {"red truck"}
        expected |= {"frog"} if "A frog." not in held_out else set()
        expected |= {"truck"} if "A truck." not in held_out else set()
        assert {row["en"] for row in emoji} == expected
    assert emoji[0]["picture"].startswith("emoji/1f")


class Pictures(list):
    """The pictures of a corpus."""

    def name(self, index):
        return str(index)


def test_a_folder_without_stamps_is_refused(tmp_path, capsys):
    assert prepare_stamps.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "has no stamps (NAME.png or NAME.svg with NAME.txt)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_output_is_checked_before_the_stamps_are_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert prepare_stamps.main(["/nowhere", str(tmp_path / "file")]) == 2
    assert "OUT='" in (error := capsys.readouterr().err) and "it is a file" in error


@pytest.mark.parametrize("size", ["0", "-64"])
def test_pictures_without_a_side_are_refused(tmp_path, capsys, size):
    with pytest.raises(SystemExit) as end:
        prepare_stamps.main([str(tmp_path), str(tmp_path / "out"), f"--size={size}"])
    assert end.value.code == 2
    assert f"argument --size: '{size}' must be a whole number from 1" in capsys.readouterr().err
