"""The tokenizers of NLLB-200 and M2M-100: ids equal SentencePiece's, and each language has its
own."""

import base64
import dataclasses
import json

import numpy as np
import pytest
import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2
from tiny_cliptrans import tiny_config

from cliptrans_jax.config import SourcesConfig
from cliptrans_jax.data.tokenizers.published import PUBLISHED, language_problem
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, load_tokenizer
from cliptrans_jax.evaluators import scores
from cliptrans_jax.export.tokenizers import write_tokenizer
from cliptrans_jax.runs.run_data import RunData
from cliptrans_jax.translators.nllb_languages import (
    CODE_BY_TOKEN,
    NLLB_CODES,
    NLLB_TOKENS,
    TOKEN_BY_CODE,
)
from common_jax.mesh import MeshConfig, make_mesh

LINES = (
    "two young men are outside near many bushes, and a man is in a blue shirt",
    "two dogs are running through the green grass; some people watch them from the road",
    "zwei junge Männer stehen draußen neben vielen Büschen ABC123 / </s> eng_Latn",
)
TEXTS = (*LINES, "men  \n in\u00a0shirts", "ＡＢＣ１２３", "漢 men 漢", "</s>", "")
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
METASPACE = {"type": "Metaspace", "replacement": "▁"}
NO_TRANSFORMERS = "the reference is transformers, which is not installed"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small BPE model, trained by SentencePiece's library."""
    prefix = tmp_path_factory.mktemp("model") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=120,
        character_coverage=1.0,
        minloglevel=2,
    )
    return sentencepiece_model_pb2.ModelProto.FromString(prefix.with_suffix(".model").read_bytes())


def bpe_json(model):
    """NLLB's tokenizer.json: pieces and merges in one order, followed by languages as added
    tokens."""
    pieces = [piece.piece for piece in model.pieces[3:]]
    vocab = {token: place for place, token in enumerate([*SPECIAL, *pieces])}
    merges = [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in pieces
        for cut in range(1, len(piece))
        if {piece[:cut], piece[cut:]} <= vocab.keys()
    ]
    charsmap = base64.b64encode(model.normalizer_spec.precompiled_charsmap).decode()
    precompiled = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    added = [*SPECIAL, *PUBLISHED["nllb"].last]
    places = [*range(4), *range(len(vocab), len(vocab) + len(added) - 4)]
    return {
        "added_tokens": [
            {"id": place, "content": token} for place, token in zip(places, added, strict=True)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [precompiled, SPACES]},
        "pre_tokenizer": METASPACE | {"prepend_scheme": "always"},
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": merges},
    }


def write(folder, kind, model, form):
    """A folder with a published tokenizer; for NLLB, `form` selects which of its two files it
    has."""
    folder.mkdir(exist_ok=True)
    if form == "json":
        (folder / "tokenizer.json").write_text(json.dumps(bpe_json(model)))
        return folder
    (folder / "sentencepiece.bpe.model").write_bytes(model.SerializeToString())
    if kind == "m2m100":
        # The order differs from the model's, and one of its pieces has no id.
        pieces = sorted(piece.piece for piece in model.pieces[3:] if piece.piece != "▁m")
        vocab = {token: place for place, token in enumerate([*SPECIAL, *pieces])}
        (folder / "vocab.json").write_text(json.dumps(vocab))
    return folder


def load(kind, folder):
    return load_tokenizer(TokenizerConfig(kind, str(folder)))


@pytest.mark.parametrize("form", ["json", "sentencepiece"])
def test_nllb_ids_are_sentencepiece_ids_plus_one(model, tmp_path, form):
    tokenizer = load("nllb", write(tmp_path, "nllb", model, form))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    first = len(model.pieces) + 1
    assert tokenizer.vocab == first + 202 + 1
    assert tokenizer.language_id("ace_Arab") == first
    assert tokenizer.language_id("en") == tokenizer.language_id("eng_Latn") == first + 46
    for text, row in zip(TEXTS, tokenizer.encode(TEXTS, "de"), strict=True):
        pieces = [i + 1 if i else 3 for i in theirs.encode(text)]
        assert row.tolist() == [tokenizer.language_id("deu_Latn"), *pieces, 2]
    assert tokenizer.decode(tokenizer.encode(LINES[:1], "en")[0]) == LINES[0]


def test_m2m100_ids_are_those_of_its_vocabulary(model, tmp_path):
    folder = write(tmp_path, "m2m100", model, "sentencepiece")
    tokenizer = load("m2m100", folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    # 128,112 rows: 128,004 in the vocabulary, 100 languages and 8 unused.
    assert tokenizer.vocab == len(vocab) + 108
    assert tokenizer.language_id("af") == len(vocab)
    assert tokenizer.language_id("en") == len(vocab) + 18
    for text, row in zip(TEXTS, tokenizer.encode(TEXTS, "en"), strict=True):
        pieces = [vocab.get(piece, 3) for piece in theirs.encode(text, out_type=str)]
        assert row[1:-1].tolist() == pieces
    assert any(3 in row for row in tokenizer.encode(LINES, "en"))  # the piece without an id
    (folder / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks vocab\.json; fetch .*m2m100_418M"):
        load("m2m100", folder)


def test_vocabulary_of_another_model_is_refused(model, tmp_path):
    folder = write(tmp_path, "m2m100", model, "sentencepiece")
    vocab = {token: place for place, token in enumerate([*SPECIAL, "two", "men"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(ValueError, match=r"vocab\.json lacks many of .*sentencepiece\.bpe\.model"):
        load("m2m100", folder)


@pytest.mark.parametrize("sources", [{"mbart": "published"}, {"model": "released.pth"}])
def test_published_weights_of_another_vocabulary_are_refused(model, tmp_path, sources):
    """Of one with the same languages at other ids; a network from scratch may have any size."""
    folder = write(tmp_path, "nllb", model, "json")
    small = load("nllb", folder).vocab
    config = tiny_config("translate", None)
    for rows, fits in ((small + 127, True), (small + 128, False)):
        sizes = dataclasses.replace(config.model.mbart, vocab=rows)
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, mbart=sizes),
            tokenizer=TokenizerConfig("nllb", str(folder), max_length=20),
            sources=SourcesConfig(**sources),
        )
        found = RunData(config, epath.Path(tmp_path), make_mesh(MeshConfig()))
        if fits:
            assert found.tokenizer.vocab == small
            continue
        message = rf"config\.model\.mbart\.vocab={rows} is far above the {small} tokens"
        with pytest.raises(ValueError, match=message):
            found.tokenizer  # noqa: B018
        scratch = dataclasses.replace(config, sources=SourcesConfig())
        found = RunData(scratch, epath.Path(tmp_path), make_mesh(MeshConfig()))
        assert found.tokenizer.vocab == small


def write_steps(folder, model, **sections):
    """NLLB's tokenizer.json with other sections; the normaliser's first step stays."""
    record = bpe_json(model)
    first = record["normalizer"]["normalizers"][0]
    if "normalizer" in sections:
        steps = {"type": "Sequence", "normalizers": [first, *sections["normalizer"]]}
        sections["normalizer"] = steps
    (folder / "tokenizer.json").write_text(json.dumps(record | sections))
    return folder


@pytest.mark.parametrize(
    "sections",
    [
        {"normalizer": [{"type": "Strip"}, {**SPACES, "content": "▁"}]},
        {"normalizer": []},
        {"pre_tokenizer": METASPACE | {"add_prefix_space": True, "str_rep": "▁"}},
        {"pre_tokenizer": METASPACE | {"prepend_scheme": "first", "split": True}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "WhitespaceSplit"}, METASPACE],
            }
        },
    ],
)
def test_files_of_all_versions_of_transformers_have_the_same_ids(model, tmp_path, sections):
    (tmp_path / "usual").mkdir()
    usual = load("nllb", write_steps(tmp_path / "usual", model))
    found = load("nllb", write_steps(tmp_path, model, **sections))
    assert found.fingerprint("en") == usual.fingerprint("en")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"normalizer": [{"type": "Lowercase"}]}, "its normalizer is 'Lowercase', and .*'Replace'"),
        ({"normalizer": [{**SPACES, "pattern": {"String": "e"}}]}, "pattern={'String': 'e'}"),
        ({"normalizer": [{**SPACES, "content": ""}]}, "content='', and the published one's is ' '"),
        ({"pre_tokenizer": None}, "its pre_tokenizer is None, and .*'Metaspace'"),
        ({"pre_tokenizer": {"type": "Digits"}}, "its pre_tokenizer is 'Digits'"),
        ({"pre_tokenizer": METASPACE | {"prepend_scheme": "never"}}, "prepend_scheme='never'"),
        ({"pre_tokenizer": METASPACE | {"add_prefix_space": False}}, "add_prefix_space=False"),
    ],
)
def test_steps_that_sentencepiece_lacks_are_refused(model, tmp_path, sections, said):
    with pytest.raises(ValueError, match=rf"tokenizer\.json .*{said}.*fetch it again"):
        load("nllb", write_steps(tmp_path, model, **sections))


def test_model_of_another_type_is_refused(model, tmp_path):
    folder = write(tmp_path / "a", "nllb", model, "sentencepiece")
    with pytest.raises(ValueError, match="is not a Unigram model that begins with <unk>"):
        load("mbart50", folder)
    record = bpe_json(model)
    record["model"]["merges"] = record["model"]["merges"][::-1]
    for name, changed, said in (
        ("b", record, "merges are not in the order of its vocabulary"),
        ("c", bpe_json(model) | {"model": {"type": "Unigram"}}, "model is of type 'Unigram'"),
        ("d", bpe_json(model) | {"normalizer": None}, "does not normalise text"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"config\.tokenizer\.path=.*{said}"):
            load("nllb", tmp_path / name)
    folder = write(tmp_path / "e", "m2m100", model, "sentencepiece")
    (folder / "vocab.json").write_text('{"a": 0}')
    with pytest.raises(ValueError, match=r"vocab\.json is not a vocabulary: it does not begin"):
        load("m2m100", folder)


@pytest.mark.parametrize(
    ("kind", "form", "source"),
    [("nllb", "json", "eng_Latn"), ("m2m100", "sentencepiece", "en")],
)
def test_transformers_loads_exported_tokenizers(model, tmp_path, kind, form, source):
    transformers = pytest.importorskip("transformers", reason=NO_TRANSFORMERS)
    folder, out = write(tmp_path / "a", kind, model, form), tmp_path / "out"
    out.mkdir()
    config = TokenizerConfig(kind, str(folder))
    write_tokenizer(out, config, tmp_path / "none", (), limit=20, pair=("en", "cs"))
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["src_lang"] == source
    theirs, ours = transformers.AutoTokenizer.from_pretrained(out), load_tokenizer(config)
    texts = ["two men", "many men are near"]
    assert theirs(texts)["input_ids"] == [ids.tolist() for ids in ours.encode(texts, "en")]
    targets = theirs(text_target=texts)["input_ids"]
    assert targets == [ids.tolist() for ids in ours.encode(texts, "cs")]


def test_nllb_without_tokenizer_json_is_not_exported(model, tmp_path):
    """From the other file, transformers 5 numbers the mask before the languages."""
    config = TokenizerConfig("nllb", str(write(tmp_path, "nllb", model, "sentencepiece")))
    with pytest.raises(FileNotFoundError, match=r"lacks tokenizer\.json, without which"):
        write_tokenizer(tmp_path, config, tmp_path / "none", (), limit=20, pair=("en", "cs"))


def test_languages_are_the_published_ones():
    assert len(NLLB_TOKENS) == len(set(NLLB_TOKENS)) == 202
    # Positions in the published vocabulary, after 256,001 special tokens and pieces.
    places = [256001 + NLLB_TOKENS.index(NLLB_CODES[code]) for code in ("en", "fr", "zh")]
    assert places == [256047, 256057, 256200]
    assert set(TOKEN_BY_CODE.values()) <= set(NLLB_TOKENS)
    # Every language of mBART-50 is available here too.
    assert set(PUBLISHED["mbart50"].codes) <= set(NLLB_CODES)
    assert (
        language_problem("nllb", "gsw") is not None and language_problem("nllb", "lus_Latn") is None
    )


def test_scoring_follows_the_language_of_the_token():
    assert set(CODE_BY_TOKEN) <= set(NLLB_TOKENS)
    outputs = references = ["早上 好 。", "他 来 了 吗 ?"]
    for language, other in (("zho_Hans", "zh"), ("zho_Hant", "zh"), ("deu_Latn", "de")):
        found = scores.score(outputs, references, language=language)
        assert found == scores.score(outputs, references, language=other)
    assert np.isclose(found.bleu, 100)
