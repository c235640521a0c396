"""Published tokenizers: ids equal SentencePiece's, text survives a round trip, and broken files are
refused."""

import base64
import dataclasses
import json
import re
import unicodedata

import numpy as np
import pytest
import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2
from tiny_cliptrans import tiny_config

from cliptrans_jax.config import SourcesConfig
from cliptrans_jax.data.tokenizers import token_files
from cliptrans_jax.data.tokenizers.framing import require_fits
from cliptrans_jax.data.tokenizers.published import MBART50_CODES, PUBLISHED
from cliptrans_jax.data.tokenizers.sentencepieces import PieceModel
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, load_tokenizer
from cliptrans_jax.encoders import TextTower, published_text
from cliptrans_jax.runs.run_data import RunData
from cliptrans_jax.towers.clip import ClipTextConfig
from cliptrans_jax.towers.mclip import MClipConfig
from common_jax import checkpoint
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.weights import Account
from common_jax.weights.table import Pretrained

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
LINES = (
    "two young men are outside near many bushes, and a man is in a blue shirt",
    "a man in a blue shirt is standing on a ladder, cleaning a window of the house",
    "two dogs are running through the green grass; some people watch them from the road",
    "키 캡 한국어 문장 カーブ ブ ボード ガ ゼ é è ô ABC123 / </s> <mask> de_DE <s>",
)
# Texts that implementations other than SentencePiece's library cut differently.
TRAPS = (
    *(unicodedata.normalize("NFD", text) for text in ("키 캡 한국어", "カーブ ボード", "é è ô")),
    "ａ\u0301 ＡＢＣ１２３ ﬁ ㎏",
    "  two  men \n",
    "men\u200b\u200d\u2060 in\ufeff \u00a0a\u3000shirt\u2028\x85\t\x00",
    "two▁men ▁",
    "x" * 3000,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "مرحبا שלום",
    "",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small SentencePiece model, trained by its library."""
    prefix = tmp_path_factory.mktemp("model") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4),
        model_prefix=str(prefix),
        vocab_size=85,
        character_coverage=1.0,
        minloglevel=2,
    )
    return sentencepiece_model_pb2.ModelProto.FromString(prefix.with_suffix(".model").read_bytes())


def unigram_json(model, last):
    """The same model as a tokenizer.json."""
    pieces = [[piece.piece, piece.score] for piece in model.pieces[3:]]
    vocab = [[token, 0.0] for token in SPECIAL] + pieces + [[token, 0.0] for token in last]
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    return {
        "added_tokens": [{"id": len(vocab) - 1, "content": "<mask>"}],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab},
    }


def write(folder, record, name="tokenizer.json"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(record))
    return folder


def load(kind, folder):
    return load_tokenizer(TokenizerConfig(kind, str(folder)), key="config.clip_tokenizer")


def refuse(kind, folder, *said):
    """Requires a short error that names the folder and contains all of `said`."""
    with pytest.raises(ValueError) as error:
        load(kind, folder)
    message = str(error.value)
    assert f"config.clip_tokenizer.path={str(folder)!r}" in message and len(message) < 2000
    for text in said:
        assert re.search(text, message), message


@pytest.mark.parametrize("kind", ["xlmr", "mbart50"])
@pytest.mark.parametrize("name", ["tokenizer.json", "sentencepiece.bpe.model"])
def test_ids_are_sentencepiece_ids_plus_one(model, tmp_path, kind, name):
    if name == "tokenizer.json":
        write(tmp_path, unigram_json(model, PUBLISHED[kind].last))
    else:
        (tmp_path / name).write_bytes(model.SerializeToString())
    tokenizer = load(kind, tmp_path)
    assert tokenizer.vocab == len(model.pieces) + 1 + {"xlmr": 1, "mbart50": 53}[kind]
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    language = "de" if kind == "mbart50" else None
    for text, row in zip(TRAPS, tokenizer.encode(TRAPS, language), strict=True):
        expected = [i + 1 if i else 3 for i in theirs.encode(text)][:510]
        np.testing.assert_array_equal(row[1 : 1 + len(expected)], expected)
    # Decomposed text equals composed text, and trailing white space is dropped.
    for one, other in (
        ("키 캡", unicodedata.normalize("NFD", "키 캡")),
        ("men", "men \n"),
        ("A", "Ａ"),
    ):
        first, second = tokenizer.encode([one, other], language)
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("score", "ids"), [(-1.0, [5]), (-10.0, [3, 4])])
def test_most_probable_pieces_are_chosen(model, tmp_path, score, ids):
    """The whole word, or its parts with scores -1 and -2; piece i is id i + 3."""
    pieces = (("▁a", -1.0), ("b", -2.0), ("▁ab", score))
    charsmap = model.normalizer_spec.precompiled_charsmap
    assert PieceModel(tmp_path, pieces, (), charsmap).processor().encode("ab") == ids


@pytest.mark.parametrize("kind", ["xlmr", "mbart50"])
@pytest.mark.parametrize("token", ["</s>", "<s>", "<mask>", "<pad>", "<unk>", "de_DE"])
def test_special_tokens_in_a_sentence_are_text(model, tmp_path, kind, token):
    tokenizer = load(kind, write(tmp_path, unigram_json(model, PUBLISHED[kind].last)))
    language = "en" if kind == "mbart50" else None
    (row,) = tokenizer.encode([f"a {token} man"], language)
    frame = {0, 1, 2, *range(len(model.pieces) + 1, tokenizer.vocab)}
    assert not frame & set(row[1:-1].tolist())
    if token in LINES[-1]:  # every character of that line has a piece
        assert tokenizer.decode(row) == f"a {token} man"


def test_tokenizer_file_of_another_kind_is_refused(model, tmp_path):
    for kind, other in (("xlmr", "mbart50"), ("mbart50", "xlmr")):
        folder = write(tmp_path / kind, unigram_json(model, PUBLISHED[other].last))
        refuse(kind, folder, r"tokenizer\.json", f"tokenizer of kind '{other}'")
        # Also next to SentencePiece's file, which is the same for both.
        (folder / "sentencepiece.bpe.model").write_bytes(model.SerializeToString())
        refuse(kind, folder, f"tokenizer of kind '{other}'")


def test_added_tokens_are_reported(model, tmp_path):
    record = unigram_json(model, PUBLISHED["mbart50"].last)
    size = len(record["model"]["vocab"])
    record["added_tokens"] += [{"id": size + i, "content": f"<new{i}>"} for i in range(2)]
    said = (r"<new0>, <new1>", r"use the folder of the published tokenizer")
    refuse("mbart50", write(tmp_path / "a", record), *said)
    for name, content in (
        ("added_tokens.json", {"<mask>": 9, "<new0>": size, "<new1>": size + 1}),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {str(i): {"content": f"<new{i}>"} for i in range(2)}},
        ),
    ):
        folder = write(tmp_path / name, content, name)
        (folder / "sentencepiece.bpe.model").write_bytes(model.SerializeToString())
        refuse("mbart50", folder, *said)


def test_file_without_nfkc_is_refused(model, tmp_path):
    record = unigram_json(model, ["<mask>"])
    said = (
        r"'ＡＢＣ１２３' becomes '▁ＡＢＣ１２３'",
        r"transformers 5\.0 to 5\.2 write such files",
    )
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    for normalizer in (None, {"type": "Sequence", "normalizers": [spaces]}):
        folder = write(tmp_path, record | {"normalizer": normalizer})
        refuse("xlmr", folder, *said)
    # SentencePiece's own file next to it has one.
    (tmp_path / "sentencepiece.bpe.model").write_bytes(model.SerializeToString())
    assert load("xlmr", tmp_path).vocab == len(model.pieces) + 2


def broken_records(model):
    """Name -> a tokenizer.json that does not fit XLM-R."""
    good = unigram_json(model, ["<mask>"])
    vocab = good["model"]["vocab"]
    charsmap = model.normalizer_spec.precompiled_charsmap
    size = int.from_bytes(charsmap[:4], "little")
    far = charsmap[:4] + b"\xff\xff\xff\x7f" * (size // 4) + charsmap[4 + size :]

    def with_model(**fields):
        return good | {"model": good["model"] | fields}

    def with_charsmap(value):
        return good | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": value}}

    return {
        "no model": {},
        "a list": [],
        "another type": with_model(type="BPE"),
        "bytes for what is unknown": with_model(byte_fallback=True),
        "vocab of numbers": with_model(vocab=[1, 2]),
        "vocab of three": with_model(vocab=[["a", 0.0, 1]]),
        "no vocab": with_model(vocab=[]),
        "number as a piece": with_model(vocab=[*vocab[:9], [7, 0.0], *vocab[9:]]),
        "empty piece": with_model(vocab=[*vocab[:9], ["", 0.0], *vocab[9:]]),
        "piece twice": with_model(vocab=[*vocab[:9], vocab[8], *vocab[9:]]),
        "control token as a piece": with_model(vocab=[*vocab[:9], ["</s>", 0.0], *vocab[9:]]),
        "no score": with_model(vocab=[*vocab[:9], ["x", None], *vocab[9:]]),
        "infinite score": with_model(vocab=[*vocab[:9], ["zz", 1e999], *vocab[9:]]),
        "half a surrogate pair": with_model(vocab=[*vocab[:9], ["\ud800", 0.0], *vocab[9:]]),
        "another order": with_model(vocab=vocab[1:]),
        "another unknown": with_model(unk_id=0),
        "added beyond": good | {"added_tokens": [{"id": 10**30, "content": "a"}]},
        "added below": good | {"added_tokens": [{"id": -1, "content": "<mask>"}]},
        "added without an id": good | {"added_tokens": [{"content": "a"}]},
        "lower case": good | {"normalizer": {"type": "Lowercase"}},
        "normalizer of text": good | {"normalizer": "NFKC"},
        "charsmap that is no base64": with_charsmap("@"),
        "charsmap cut": with_charsmap(base64.b64encode(charsmap[:5000]).decode()),
        "charsmap that points far": with_charsmap(base64.b64encode(far).decode()),
    }


def test_broken_tokenizer_json_is_refused(model, tmp_path):
    for name, record in broken_records(model).items():
        folder = write(tmp_path / name, record)
        refuse("xlmr", folder, r"tokenizer\.json")
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"):
        (tmp_path / "tokenizer.json").write_bytes(content)
        refuse(
            "xlmr", tmp_path, r"tokenizer\.json is (not JSON|JSON that|not UTF-8|not a tokenizer)"
        )


def test_broken_sentencepiece_model_is_refused(model, tmp_path):
    def changed(**fields):
        copy = sentencepiece_model_pb2.ModelProto()
        copy.CopyFrom(model)
        for name, value in fields.items():
            section, field = name.split("__")
            setattr(getattr(copy, section), field, value)
        return copy.SerializeToString()

    whole = model.SerializeToString()
    for content in (
        b"",
        b"no model",
        whole[: len(whole) // 2],
        changed(trainer_spec__model_type=2),
        changed(trainer_spec__treat_whitespace_as_suffix=True),
        changed(normalizer_spec__remove_extra_whitespaces=False),
        changed(normalizer_spec__precompiled_charsmap=b"\xff\xff\xff\xff" * 500),
    ):
        (tmp_path / "sentencepiece.bpe.model").write_bytes(content)
        refuse("mbart50", tmp_path, r"sentencepiece\.bpe\.model")


def test_oversized_tokenizer_file_is_not_read(model, tmp_path, monkeypatch):
    write(tmp_path, unigram_json(model, ["<mask>"]))
    monkeypatch.setattr(token_files, "MAX_BYTES", 100)
    refuse("xlmr", tmp_path, "bytes, more than any tokenizer's 100")


LETTERS = [*"abcdefghijklmnopqrstuvwxyz<|>!"]
CLIP_VOCAB = [
    *LETTERS,
    *(f"{x}</w>" for x in LETTERS),
    "an",
    "an</w>",
    "<|",
    "<|</w>",
    "<|startoftext|>",
    "<|endoftext|>",
]
CLIP_MERGES = ["a n", "a n</w>", "< |", "< |</w>"]


def write_clip(folder, vocab=None, merges=CLIP_MERGES):
    vocab = {token: i for i, token in enumerate(CLIP_VOCAB)} if vocab is None else vocab
    write(folder, vocab, "vocab.json")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return folder


def test_clip_special_tokens_in_a_sentence_are_text(tmp_path):
    tokenizer = load("clip", write_clip(tmp_path / "files"))
    record = {
        "model": {
            "type": "BPE",
            "vocab": {x: i for i, x in enumerate(CLIP_VOCAB)},
            "merges": CLIP_MERGES,
        }
    }
    same = load("clip", write(tmp_path / "json", record))
    for one in (tokenizer, same):
        (row,) = one.encode(["An <|endoftext|> man"], None)
        names = [CLIP_VOCAB[i] for i in row]
        assert names == [
            "<|startoftext|>", "an</w>", "<|</w>",
            *"endoftex", "t</w>", "|", "></w>", "m", "an</w>", "<|endoftext|>",
        ]  # fmt: skip
    with pytest.raises(ValueError, match="vocabulary lacks characters of 'a 7'"):
        tokenizer.encode(["a 7"], None)


def test_broken_clip_vocabulary_is_refused(tmp_path):
    vocab = {token: i for i, token in enumerate(CLIP_VOCAB)}
    for place, (bad, merges, said) in enumerate(
        (
            ({}, CLIP_MERGES, "no vocabulary"),
            (vocab | {"a": "0"}, CLIP_MERGES, "not integers"),
            (vocab | {"a": 1}, CLIP_MERGES, "are not 0 to"),
            (vocab | {"a": 10**20}, CLIP_MERGES, "are not 0 to"),
            (vocab | {"new": len(vocab)}, CLIP_MERGES, "does not end with"),
            (vocab, ["a n x"], r"merges\.txt .* not two tokens"),
            (vocab, ["b c"], "lacks tokens of the merge"),
        )
    ):
        refuse("clip", write_clip(tmp_path / str(place), bad, merges), said)
    record = {"model": {"type": "BPE", "vocab": vocab, "merges": CLIP_MERGES}}
    for place, (changes, said) in enumerate(
        (
            ({"model": None}, "no model of type BPE"),
            ({"model": record["model"] | {"type": "Unigram"}}, "no model of type BPE"),
            ({"model": record["model"] | {"merges": None}}, "no list of merges"),
            ({"added_tokens": [{"content": "<new>"}]}, "tokens that .* lacks: <new>"),
            ({"added_tokens": [7]}, r"tokenizer\.json"),
        )
    ):
        refuse("clip", write(tmp_path / f"json{place}", record | changes), said)
    (tmp_path / "0" / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"without merges\.txt"):
        load("clip", tmp_path / "0")


TOWERS = {
    "mclip": MClipConfig(vocab=87, width=8, layers=1, heads=1, hidden=8, positions=20, features=4),
    "clip_text": ClipTextConfig(
        vocab=len(CLIP_VOCAB), width=8, layers=1, heads=1, hidden=8, positions=9, features=4
    ),
}


def published(kind, tokenizer, folder):
    """A tower of one kind, without weights, and the tokenizer in a folder."""
    found = Pretrained(kind, TOWERS[kind], {}, Account(()), f"{kind}s")
    return published_text(found, TokenizerConfig(tokenizer, str(folder)), dtype=np.float32)


def test_published_tower_requires_its_own_tokenizer(model, tmp_path):
    xlmr = write(tmp_path / "xlmr", unigram_json(model, ["<mask>"]))
    clip = write_clip(tmp_path / "clip")
    for kind, folder, tower in (("xlmr", xlmr, "mclip"), ("clip", clip, "clip_text")):
        found = published(tower, kind, folder)
        # Sentences are cut to the tower's positions.
        (row,) = found.tokenizer.encode(["a man " * 50], None)
        assert len(row) == found.longest == {"xlmr": 18, "clip": 9}[kind]
    message = r"config\.clip_tokenizer\.kind='clip' is not for .*'mclips'.*set it to 'xlmr'"
    with pytest.raises(ValueError, match=message):
        published("mclip", "clip", clip)
    longer = write(tmp_path / "longer", unigram_json(model, ["extra", "<mask>"]))
    with pytest.raises(ValueError, match=r"has 88 tokens, but the table .* 87 rows"):
        published("mclip", "xlmr", longer)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no sentences"),
        ([[0, 2], [0, 87, 2]], r"ids\[1\] has ids from 0 to 87, but the tower has 0 to 86"),
        ([[0, -1, 2]], r"ids\[0\] has ids from -1"),
        ([[0] * 19], r"ids\[0\] has 19 tokens, but the tower takes 1 to 18"),
        ([np.zeros(0, np.int32)], r"ids\[0\] has 0 tokens"),
        ([[0.0, 2.0]], r"ids\[0\] must be .* float64"),
        ([[[0, 2]]], r"ids\[0\] must be"),
    ],
)
def test_ids_outside_the_tower_embedding_are_refused(ids, message):
    tower = TextTower(TOWERS["mclip"], {}, None, np.float32)
    with pytest.raises(ValueError, match=message):
        tower.encode([np.asarray(row) for row in ids], mesh=make_mesh(MeshConfig()))


def test_vocabulary_and_special_ids_must_match_the_tokenizer(model, tmp_path):
    tokenizer = load("xlmr", write(tmp_path, unigram_json(model, ["<mask>"])))
    require_fits(tokenizer, vocab=87, special={"pad": 1, "eos": 2}, key="config.x")
    with pytest.raises(ValueError, match=r"config\.x\.vocab=86 is less than the 87 tokens"):
        require_fits(tokenizer, vocab=86, special={}, key="config.x")
    with pytest.raises(ValueError, match=r"config\.x\.eos=3 must be the tokenizer's, 2"):
        require_fits(tokenizer, vocab=87, special={"pad": 1, "eos": 3}, key="config.x")


def test_language_codes_are_those_of_mbart():
    last = PUBLISHED["mbart50"].last
    assert (
        len(last) == len(set(last)) == 53
        and last[0] == "ar_AR"
        and last[51:] == ("sl_SI", "<mask>")
    )
    # Ids in the published vocabulary: 250001 is Arabic, 250004 English, 250053 the mask.
    assert [250001 + last.index(MBART50_CODES[code]) for code in ("ar", "de", "en", "zh")] == [
        250001, 250003, 250004, 250025,
    ]  # fmt: skip


def test_translator_tokenizer_must_have_its_languages(model, tmp_path):
    folder = write(tmp_path / "files", unigram_json(model, ["<mask>"]))
    config = dataclasses.replace(
        tiny_config("translate", None),
        tokenizer=TokenizerConfig("xlmr", str(folder), max_length=20),
    )
    message = r"config\.tokenizer\.kind='xlmr' has no token for the language 'en'.*'mbart50' or"
    with pytest.raises(ValueError, match=message):
        RunData(config, epath.Path(tmp_path), make_mesh(MeshConfig())).tokenizer  # noqa: B018


@pytest.mark.parametrize("name", ["model", "clip"])
def test_weights_of_a_run_with_another_tokenizer_kind_are_refused(
    model, tmp_path, monkeypatch, name
):
    folder = write(tmp_path / "files", unigram_json(model, PUBLISHED["mbart50"].last))
    tokenizer = TokenizerConfig("mbart50", str(folder), max_length=20)
    sources = SourcesConfig(**{name: "runs/other"})
    config = dataclasses.replace(
        tiny_config("translate", None), tokenizer=tokenizer, sources=sources
    )
    step = epath.Path(tmp_path / "runs" / "checkpoints" / "6")
    monkeypatch.setattr(checkpoint, "find_step", lambda source: step)
    found = RunData(config, epath.Path(tmp_path), make_mesh(MeshConfig()))
    monkeypatch.setattr(checkpoint, "load_config", lambda path: {"tokenizer": {"kind": "trained"}})
    message = rf"config\.sources\.{name}='runs/other' .*kind='trained'.*kind='mbart50'"
    with pytest.raises(ValueError, match=message):
        found.tokenizer  # noqa: B018
    monkeypatch.setattr(checkpoint, "load_config", lambda path: {"tokenizer": {"kind": "mbart50"}})
    assert found.tokenizer.vocab == 87 - 1 + 53
