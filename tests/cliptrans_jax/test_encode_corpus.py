"""Token ids of large corpora are cached in a file, which never changes the ids."""

import dataclasses
import logging
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from tiny_cliptrans import number_tokenizer

from cliptrans_jax.data.corpus import Corpus, Numbered
from cliptrans_jax.data.tokenizers import tokens
from cliptrans_jax.data.tokenizers.tokens import encode_corpus
from common_jax.inputs.ragged import Lines
from common_jax.workdir import arrays

SENTENCES = tuple(" ".join(map(str, range(3, 3 + size))) for size in (4, 0, 1, 2, 3))


class Cut:
    """Cuts texts, and counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, texts):
        self.calls += 1
        return number_tokenizer(limit=6).cut(texts)


def tokenizer(cut, *, limit=6, definition=b"words are ids"):
    numbers = number_tokenizer(limit=limit)
    return dataclasses.replace(numbers, cut=cut, definition=lambda: definition)


def corpus(sentences=SENTENCES, name="wmt de en"):
    return Corpus(name, {"en": sentences}, None, Numbered("train", len(sentences)))


def ids_of(folder, made=None, texts=None, frame="en"):
    made = tokenizer(Cut()) if made is None else made
    texts = corpus() if texts is None else texts
    return encode_corpus(made, texts, "en", frame=frame, folder=folder)


def as_lists(ids):
    return [row.tolist() for row in ids]


WANTED = as_lists(tokenizer(Cut()).encode(SENTENCES, "en"))


@pytest.fixture(autouse=True)
def large(monkeypatch):
    monkeypatch.setattr(tokens, "LARGE", len(SENTENCES))


def only(folder):
    (path,) = folder.iterdir()
    return path


def test_ids_are_computed_once_and_then_read_from_a_file(tmp_path, caplog):
    folder, cut = tmp_path / "new" / "features", Cut()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            ids = ids_of(folder, tokenizer(cut))
            assert as_lists(ids) == WANTED and not ids.flat.flags.writeable
    assert cut.calls == 1 and "5 sentences encoded" in caplog.text
    path = only(folder)
    assert path.name.startswith("wmt_de_en.en.") and path.name.endswith(".ids.npz")
    with np.load(path) as stored:
        assert stored["lengths"].tolist() == [len(row) for row in WANTED]
        assert stored["ids"].tolist() == [token for row in WANTED for token in row]


def test_small_corpora_and_buckets_use_no_file(tmp_path):
    cut = Cut()
    assert as_lists(ids_of(tmp_path, tokenizer(cut), corpus(SENTENCES[:4]))) == WANTED[:4]
    assert as_lists(ids_of("gs://bucket/features", tokenizer(cut))) == WANTED
    assert cut.calls == 2 and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("made", "sentences", "frame"),
    [
        (tokenizer(Cut(), limit=5), SENTENCES, "en"),
        (tokenizer(Cut(), definition=b"another version"), SENTENCES, "en"),
        (tokenizer(Cut()), SENTENCES, "de"),
        (tokenizer(Cut()), SENTENCES, None),
        (tokenizer(Cut()), (*SENTENCES[:4], "3 4 6"), "en"),
        (tokenizer(Cut()), (*SENTENCES[:3], *"34"), "en"),
    ],
)
def test_file_name_depends_on_all_that_determines_the_ids(tmp_path, made, sentences, frame):
    ids_of(tmp_path)
    first = only(tmp_path)
    content = first.read_bytes()
    ids = ids_of(tmp_path, made, corpus(sentences), frame)
    assert as_lists(ids) == as_lists(made.encode(sentences, frame))
    assert len([*tmp_path.iterdir()]) == 2 and first.read_bytes() == content


def test_equal_texts_share_a_file_whatever_their_container(tmp_path):
    cut = Cut()
    for sentences in (SENTENCES, Lines.of(SENTENCES)):
        assert as_lists(ids_of(tmp_path, tokenizer(cut), corpus(sentences))) == WANTED
    assert cut.calls == 1


def truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def emptied(path):
    path.write_bytes(b"")


def flipped(path):
    content = bytearray(path.read_bytes())
    content[content.index(np.int32(WANTED[0]).tobytes()) + 4] ^= 1
    path.write_bytes(bytes(content))


def replaced(**changes):
    def spoil(path):
        with np.load(path) as stored:
            content = {**stored, **changes}
        with path.open("wb") as file:
            np.savez(file, **content)

    return spoil


DAMAGES = {
    "truncated": truncated,
    "emptied": emptied,
    "flipped": flipped,
    "of other sentences": replaced(fingerprint=np.array("f00d")),
    "too short": replaced(ids=np.arange(3, dtype=np.int32)),
    "too long a sentence": replaced(lengths=np.array([99, 1, 1, 1, 1], np.int32)),
    "negative": replaced(lengths=np.array([-1, 17, 0, 0, 0], np.int32)),
    "another type": replaced(ids=np.zeros(16, np.float32)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_reported_and_rewritten(tmp_path, caplog, damage):
    cut = Cut()
    ids_of(tmp_path, tokenizer(cut))
    path = only(tmp_path)
    DAMAGES[damage](path)
    with caplog.at_level(logging.WARNING):
        assert as_lists(ids_of(tmp_path, tokenizer(cut))) == WANTED
    assert f"{path}" in caplog.text and "recomputing the ids" in caplog.text
    assert cut.calls == 2 and only(tmp_path) == path
    ids_of(tmp_path, tokenizer(cut))
    assert cut.calls == 2


def test_ids_stay_in_memory_if_writing_fails(tmp_path, caplog, monkeypatch):
    def full(file, **content):
        file.write(b"some of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays.np, "savez", full)
    assert as_lists(ids_of(tmp_path)) == WANTED
    assert "No space left" in caplog.text and "config.features" in caplog.text
    assert not [*tmp_path.iterdir()]


def test_threads_keep_the_sentence_order(monkeypatch):
    monkeypatch.setattr("cliptrans_jax.data.tokenizers.framing.PART", 2)
    together = threading.Barrier(2)

    class Slow(Cut):
        def __call__(self, texts):
            if texts[0] in (SENTENCES[0], SENTENCES[2]):
                together.wait(timeout=20)  # two parts are cut at the same time
            return super().__call__(texts)

    monkeypatch.setattr("cliptrans_jax.data.tokenizers.framing.os.cpu_count", lambda: 2)
    for texts in (SENTENCES, Lines.of(SENTENCES)):
        assert as_lists(tokenizer(Slow()).encode(texts, "en")) == WANTED


def test_concurrent_processes_get_the_same_ids(tmp_path):
    ready = tmp_path / "ready"
    other = subprocess.Popen(
        [sys.executable, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )

    def cut(texts):
        assert other.stdout.readline() == "cutting\n"  # so that neither finds the other's file
        return Cut()(texts)

    try:
        ids = ids_of(tmp_path / "features", tokenizer(cut))
        ready.touch()
        assert other.communicate(timeout=120)[0] == f"{WANTED}\n"
    finally:
        other.kill()
    assert as_lists(ids) == WANTED  # from a file that the other process has replaced
    assert only(tmp_path / "features").name.endswith(".ids.npz")


def other_process(root):
    """Makes the ids while the test makes them too."""
    tokens.LARGE = len(SENTENCES)

    def cut(texts):
        print("cutting", flush=True)
        while not (root / "ready").exists():
            threading.Event().wait(0.02)
        return Cut()(texts)

    print(as_lists(ids_of(root / "features", tokenizer(cut))))


if __name__ == "__main__":
    other_process(pathlib.Path(sys.argv[1]))
