"""SigLIP 2's tokenizer: Gemma's pieces of lower-cased text, without a start token."""

import json

import numpy as np
import pytest
from gemma_files import RECORD, VOCAB

from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, load_tokenizer
from cliptrans_jax.export.tokenizers import write_tokenizer


def write(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(RECORD | changes))
    return folder


def load(folder, **settings):
    return load_tokenizer(TokenizerConfig("siglip2", str(folder), **settings))


@pytest.fixture
def tokenizer(tmp_path):
    return load(write(tmp_path / "gemma"))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("A Man", ["a", "▁man"]),
        ("man  man", ["man", "▁", "▁man"]),
        ("", []),
        ("É", ["<0xC3>", "<0xA9>"]),
        ("ΟΔΟΣ", ["<0xCE>", "<0xBF>", "<0xCE>", "<0xB4>", "<0xCE>", "<0xBF>", "σ"]),
        ("an <table>", ["an", "▁", "<table>"]),
        ("an <bos>", ["an", "▁", "<b", "os>"]),  # text, not a control token
        ("<TABLE>", ["<", "t", "a", "b", "l", "e", ">"]),
    ],
)
def test_pieces_are_those_of_lower_cased_text(tokenizer, text, pieces):
    (row,) = tokenizer.encode([text], None)
    np.testing.assert_array_equal(row, [*(VOCAB[piece] for piece in pieces), 1])
    assert tokenizer.decode(row) == (text if "<table>" in text else text.casefold())


def test_sentence_has_no_start_token_and_keeps_its_end(tmp_path):
    whole, cut = load(write(tmp_path / "x")), load(tmp_path / "x", max_length=3)
    assert (whole.vocab, whole.pad, whole.eos, whole.limit) == (len(VOCAB), 0, 1, 64)
    (row,) = whole.encode(["man" * 70], None)
    assert len(row) == 64 and row[-1] == 1 and row[0] == row[62] == VOCAB["man"]
    (row,) = cut.encode(["a man an"], None)
    np.testing.assert_array_equal(row, [VOCAB["a"], VOCAB["▁man"], 1])
    with pytest.raises(ValueError, match="max_length=65 must be from 3"):
        TokenizerConfig("siglip2", "x", max_length=65)


def model(**changes):
    return {"model": RECORD["model"] | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"not Gemma's tokenizer\.json .* no model of type BPE"),
        (model(type="Unigram"), "no model of type BPE"),  # of SigLIP, not SigLIP 2
        (model(merges=["a"]), "a merge is 'a' and not two tokens"),
        (model(merges=["b c"]), "vocabulary lacks tokens of the merge"),
        (model(vocab=VOCAB | {"<pad>": 1, "<eos>": 0}), "does not begin with <pad>, <eos>"),
        (model(vocab={k: v for k, v in VOCAB.items() if v < 100}, merges=[]), " 95 tokens of byt"),
        ({"normalizer": None}, "not Gemma's"),
        ({"normalizer": {"type": "NFKC"}}, "its normalizer is 'NFKC', and .*'Replace'"),
        ({"normalizer": RECORD["normalizer"] | {"content": "_"}}, "content='_', and .*'▁'"),
        ({"pre_tokenizer": {"type": "Digits"}}, "its pre_tokenizer is 'Digits'"),
        (model(end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
        ({"added_tokens": [{"content": "<new>", "id": 400}]}, "tokens that .* lacks: <new>"),
        ({"added_tokens": [7]}, "not Gemma's"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        load(write(tmp_path / "x", **changes))
    assert f"config.tokenizer.path={str(tmp_path / 'x')!r}" in str(raised.value)


def test_files_of_all_versions_of_transformers_have_the_same_ids(tokenizer, tmp_path):
    lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, RECORD["normalizer"]]}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    other = load(write(tmp_path / "x", normalizer=lower, pre_tokenizer=split | {"invert": False}))
    assert other.fingerprint(None) == tokenizer.fingerprint(None)


def test_missing_tokenizer_file_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks tokenizer\.json; fetch .*google/siglip2"):
        load(tmp_path)


def test_ids_match_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "Siglip2Tokenizer"):
        pytest.skip("this version of transformers does not lower-case SigLIP 2's texts")
    folder = tmp_path / "out"
    folder.mkdir()
    config = TokenizerConfig("siglip2", str(tmp_path / "gemma"))
    write_tokenizer(folder, config, tmp_path / "none", (), limit=16, pair=None)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A Man", "man  man.", "", "É", "an <table>", "man " * 40]
    want = theirs(texts, padding="max_length", truncation=True)["input_ids"]
    ours = load(tmp_path / "gemma", max_length=16).encode(texts, None)
    found = [[*row.tolist(), *[0] * (16 - len(row))] for row in ours]
    assert found == want
