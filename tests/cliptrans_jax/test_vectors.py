"""The inputs and outputs of `cliptrans features`."""

import numpy as np
import pytest
from meshes import one_device
from PIL import Image

from cliptrans_jax import vectors
from cliptrans_jax.vectors import LONGEST_TEXT, Item, as_arrays, encode_items, list_items


@pytest.fixture
def folder(tmp_path):
    """Pictures whose pixels are all 3, 1 and 2, in order of their names; one is bad."""
    (tmp_path / "below").mkdir()
    (tmp_path / ".cache").mkdir()
    for name, value in (("a.png", 3), ("b.PNG", 1), ("below/c.png", 2), (".cache/d.png", 4)):
        Image.new("RGB", (4, 4), (value,) * 3).save(tmp_path / name, "png")
    (tmp_path / "._a.png").write_bytes(b"of macOS")
    (tmp_path / "b2.png").write_bytes(b"cut off")
    (tmp_path / "notes.txt").write_text("a man")
    return tmp_path


def test_folder_is_searched_without_hidden_files(folder):
    names = [item.name for item in list_items([str(folder)])]
    assert names == [f"{folder}/{name}" for name in ("a.png", "b.PNG", "b2.png", "below/c.png")]


class FakeTower:
    """Gives each picture its first value, and sentences their length."""

    def __init__(self, tower, mesh, batch):
        self.batch = batch

    def pictures(self, pictures):
        assert 0 < len(pictures) <= self.batch
        return np.array([[picture[0, 0, 0]] for picture in pictures], np.float32)

    def sentences(self, texts):
        return np.array([[len(text)] for text in texts], np.float32)


def test_bad_pictures_are_left_out(folder, monkeypatch, caplog):
    monkeypatch.setattr(vectors, "Resident", FakeTower)
    monkeypatch.setattr(vectors, "IMAGE_BATCH", 1)
    for name in ("image_tower", "text_tower"):
        monkeypatch.setattr(vectors, name, lambda run, mesh: None)
    items = list_items([str(folder), str(folder / "notes.txt")])
    kept, found = encode_items(None, items, one_device())
    assert kept == [*items[:2], *items[3:]]
    assert found.tolist() == [[3], [1], [2], [5]]
    assert "left out" in caplog.text and f"{folder}/b2.png cannot be read" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 pictures can be read"):
        encode_items(None, items[2:3], one_device())


def test_one_long_text_does_not_make_all_large(caplog):
    texts = ["a" * 60_000, *["a man"] * 99]
    items = [Item(f"line {place}", text) for place, text in enumerate(texts)]
    arrays = as_arrays(items, np.zeros((100, 4), np.float32))
    assert arrays["texts"].nbytes <= 100 * 4 * LONGEST_TEXT
    assert arrays["texts"].tolist() == ["a" * LONGEST_TEXT, *texts[1:]]
    assert f"1 texts are stored without what follows {LONGEST_TEXT}" in caplog.text
