"""LaBSE's tokenizer: BERT's word pieces, case-sensitive."""

import json

import numpy as np
import pytest

from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, load_tokenizer
from cliptrans_jax.export.tokenizers import write_tokenizer

WORDS = [
    "[PAD]",
    "a",
    "A",
    "man",
    "##ly",
    "é",
    "[",
    "]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "CLS",
]
VOCAB = {word: place for place, word in enumerate(WORDS)}
RECORD = {
    "added_tokens": [{"id": 9, "content": "[CLS]", "special": True}],
    "normalizer": {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": False,
    },
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "model": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": VOCAB,
    },
    "post_processor": {
        "type": "BertProcessing",
        "sep": ["[SEP]", VOCAB["[SEP]"]],
        "cls": ["[CLS]", VOCAB["[CLS]"]],
    },
}


def load(folder, **settings):
    return load_tokenizer(TokenizerConfig("labse", str(folder), **settings))


def write(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(RECORD | changes))
    return folder


@pytest.fixture(params=["tokenizer.json", "vocab.txt"])
def folder(request, tmp_path):
    if request.param == "vocab.txt":
        (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        return tmp_path
    return write(tmp_path / "json")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("A manly man", ["A", "man", "##ly", "man"]),
        ("a é", ["a", "é"]),
        ("Man", ["[UNK]"]),
        ("[CLS]", ["[", "CLS", "]"]),  # text, not a control token
        ("", []),
    ],
)
def test_pieces_keep_their_case(folder, text, pieces):
    tokenizer = load(folder)
    (row,) = tokenizer.encode([text], None)
    np.testing.assert_array_equal(row, [VOCAB[x] for x in ("[CLS]", *pieces, "[SEP]")])
    assert (tokenizer.vocab, tokenizer.pad, tokenizer.limit) == (len(WORDS), 0, 512)


def test_truncated_sentence_keeps_its_special_tokens(folder):
    (row,) = load(folder, max_length=4).encode(["man a a a"], None)
    np.testing.assert_array_equal(row, [9, 3, 1, 10])
    assert load(folder).decode(row) == "man a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"not LaBSE's tokenizer\.json"),
        ({"model": {"type": "BPE", "vocab": VOCAB}}, "its model is 'BPE', and .*'WordPiece'"),
        ({"model": RECORD["model"] | {"continuing_subword_prefix": "@@"}}, "prefix='@@'"),
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer is 'Lowercase'"),
        ({"normalizer": {"type": "BertNormalizer", "lowercase": True}}, "lowercase=True"),
        ({"normalizer": RECORD["normalizer"] | {"clean_text": False}}, "clean_text=False, and"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre_tokenizer is 'Whitespace'"),
        (
            {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "added_tokens": []},
            r"lacks \[CLS\], \[SEP\], \[PAD\]",
        ),
        ({"model": {"type": "WordPiece", "vocab": {"a": 1}}}, "are not 0 to 0"),
        ({"added_tokens": [{"content": "[new]"}]}, r"lacks: \[new\]"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        load(write(tmp_path / "x", **changes))
    assert f"config.tokenizer.path={str(tmp_path / 'x')!r}" in str(raised.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_git_lfs_pointer_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(ValueError, match=rf"{name} is a git-lfs pointer .*; run `git lfs pull`"):
        load(tmp_path)


def test_setting_that_lower_cases_is_refused(folder):
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 9}')
    assert load(folder).vocab == len(WORDS)
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    message = r"tokenizer_config\.json .* do_lower_case=True, and the published one's is False"
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_line_breaks_at_the_end_are_no_words(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\r\n".join([*WORDS, "", ""]).encode())
    assert load(tmp_path).vocab == len(WORDS)


def test_ids_match_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    out = tmp_path / "out"
    out.mkdir()
    config = TokenizerConfig("labse", str(folder))
    write_tokenizer(out, config, tmp_path / "none", (), limit=8, pair=None)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    texts = ["A manly man", "a é", "Man", "", "a " * 20]
    want = theirs(texts, truncation=True)["input_ids"]
    assert [row.tolist() for row in load(folder, max_length=8).encode(texts, None)] == want
