"""Tokenizers: special tokens, round trips, and reproducible training."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers

from cliptrans_jax.data import emoji_set
from cliptrans_jax.data.tokenizers import byte_pairs
from cliptrans_jax.data.tokenizers.framing import BOS, EOS, PAD, SPECIAL, FramedTokenizer, Tokenizer
from cliptrans_jax.data.tokenizers.published import MBART50_CODES, PUBLISHED
from cliptrans_jax.data.tokenizers.tokens import (
    TokenizerConfig,
    load_or_train_tokenizer,
    load_tokenizer,
)
from cliptrans_jax.export.tokenizers import write_tokenizer
from common_jax.config import freeze

SENTENCES = (
    "Two young, White males are outside near many bushes.",
    "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    "Deux jeunes hommes blancs sont dehors près de buissons.",
    "Dva mladí bílí muži jsou venku v blízkosti mnoha keřů.",
    "A man in a blue shirt is standing on a ladder cleaning a window.",
    "Ein Mann in einem blauen Hemd steht auf einer Leiter und putzt ein Fenster.",
    "Un homme en t-shirt bleu, debout sur une échelle, nettoie une fenêtre.",
    "Muž v modré košili stojí na žebříku a čistí okno.",
)
LANGUAGES = ("en", "de", "fr", "cs")
CONFIG = TokenizerConfig(vocab=420)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    return load_tokenizer(CONFIG, sentences=SENTENCES, languages=LANGUAGES, path=path)


def test_ids_are_special_then_pieces_then_languages_then_mask(trained):
    assert isinstance(trained, Tokenizer)
    assert (trained.pad, trained.eos, trained.bos) == (1, 2, 0)
    assert trained.vocab == 420
    assert [trained.language_id(language) for language in LANGUAGES] == [415, 416, 417, 418]
    assert trained.languages == LANGUAGES
    ids = np.concatenate([row[1:-1] for row in trained.encode(SENTENCES, "en")])
    assert ids.min() >= len(SPECIAL) and ids.max() < 415 and ids.max() > 300


@pytest.mark.parametrize(("language", "first"), [("de", 416), (None, BOS)])
def test_sentences_have_language_and_end_tokens(trained, language, first):
    for row in trained.encode(SENTENCES, language):
        assert row.dtype == np.int32
        assert row[0] == first and row[-1] == EOS and len(row) > 3
        assert EOS not in row[:-1] and PAD not in row


@pytest.mark.parametrize(
    "text",
    [
        *SENTENCES,
        "",
        "Q: never seen? «ÇéØ» 12,345.67 €",
        "  two  spaces\tand a tab ",
        "漢字とかな, العربية, русский, 한국어 👩🏽‍🚀",
        "<s> text that looks </s> like <pad> tokens <mask>",
    ],
)
def test_every_text_round_trips(trained, text):
    (row,) = trained.encode([text], "fr")
    assert trained.decode(row) == text
    assert row[0] == 417 and row[-1] == EOS and not set(row[1:-1]) & {0, 1, 2, 3}


def test_first_word_is_tokenized_as_inside_a_sentence(trained):
    inside, first = (row.tolist() for row in trained.encode(["in a blue shirt", "blue"], "en"))
    assert any(
        inside[place : place + len(first) - 2] == first[1:-1] for place in range(1, len(inside))
    )


def test_empty_text_has_only_special_tokens(trained):
    np.testing.assert_array_equal(trained.encode([""], "en")[0], [415, EOS])
    assert len(trained.encode([], "en")) == 0


def test_decoding_drops_special_tokens(trained):
    (row,) = trained.encode(["a man"], "de")
    pieces = row[1:-1].tolist()
    generated = [EOS, 416, *pieces, EOS, PAD, PAD]
    assert trained.decode(generated) == trained.decode(np.array(generated)) == "a man"
    assert trained.decode([BOS, *pieces, 419, 3]) == "a man"  # mask and unknown token
    assert trained.decode([EOS, 416, *pieces, EOS, *pieces]) == "a man"
    assert trained.decode([EOS, EOS, PAD]) == trained.decode([]) == ""


def test_truncated_sentences_keep_the_end_token(tmp_path):
    path = tmp_path / "t.json"
    full = load_or_train_tokenizer(CONFIG, SENTENCES, LANGUAGES, path)
    short = load_or_train_tokenizer(
        dataclasses.replace(CONFIG, max_length=6), SENTENCES, LANGUAGES, path
    )
    for long_row, row in zip(
        full.encode(SENTENCES, "en"), short.encode(SENTENCES, "en"), strict=True
    ):
        np.testing.assert_array_equal(row, [*long_row[:5], EOS])


def test_lower_casing_ignores_the_case_of_training_texts(tmp_path):
    config = dataclasses.replace(CONFIG, lower=True)
    raised = [text.upper() for text in SENTENCES]
    lowered = [text.lower() for text in raised]
    low, high = (
        load_or_train_tokenizer(config, texts, LANGUAGES, tmp_path / name)
        for name, texts in (("low", lowered), ("high", raised))
    )
    assert low.decode(low.encode(["Ein MÄNNCHEN, İ"], "de")[0]) == "ein männchen, i̇"
    for a, b in zip(low.encode(raised, "en"), high.encode(lowered, "en"), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"lower True not False"):
        load_or_train_tokenizer(CONFIG, None, LANGUAGES, tmp_path / "low")
    load_or_train_tokenizer(CONFIG, SENTENCES, LANGUAGES, tmp_path / "any")
    made = json.loads((tmp_path / "any").read_text())["made_from"]
    assert set(made) == {"vocab", "languages", "sentences"}  # as in earlier versions
    with pytest.raises(ValueError, match=r"^lower=True is for kind='trained': 'mbart50'"):
        TokenizerConfig(kind="mbart50", path="x", lower=True)


def test_exported_tokenizer_lower_cases_too(tmp_path):
    config, file = dataclasses.replace(CONFIG, lower=True), tmp_path / "t.json"
    trained = load_or_train_tokenizer(config, SENTENCES, LANGUAGES, file)
    write_tokenizer(tmp_path, config, file, LANGUAGES, limit=64, pair=("en", "de"))
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text, ids in zip(SENTENCES, trained.encode(SENTENCES, "en"), strict=True):
        np.testing.assert_array_equal(exported.encode(text.title()).ids, ids)


def test_tokenizer_training_is_deterministic(tmp_path):
    sentences = emoji_set.load_emoji("test", ("en", "de")).texts
    sentences = [*sentences["en"], *sentences["de"]]
    files = [tmp_path / "a" / "t.json", tmp_path / "b" / "t.json"]
    for path in files:
        load_or_train_tokenizer(TokenizerConfig(vocab=900), sentences, ("en", "de"), path)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["t.json"]


def test_emoji_names_round_trip_in_every_language(tmp_path):
    languages = emoji_set.LANGUAGES
    train, test = (emoji_set.load_emoji(s, languages).texts for s in ("train", "test"))
    tokenizer = load_or_train_tokenizer(
        TokenizerConfig(vocab=2000),
        [name for language in languages for name in train[language]],
        languages,
        tmp_path / "t.json",
    )
    assert tokenizer.vocab == 2000
    for language in languages:
        rows = tokenizer.encode(test[language], language)
        assert tuple(map(tokenizer.decode, rows)) == test[language]
        assert max(map(len, rows)) < 64


def test_trained_tokenizer_is_read_from_its_file(tmp_path, trained):
    path = tmp_path / "t.json"
    load_or_train_tokenizer(CONFIG, SENTENCES, LANGUAGES, path)
    before = path.stat().st_mtime_ns
    again = load_tokenizer(CONFIG, languages=LANGUAGES, path=path)
    assert path.stat().st_mtime_ns == before
    for row, expected in zip(
        again.encode(SENTENCES, "cs"), trained.encode(SENTENCES, "cs"), strict=True
    ):
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize(
    ("config", "sentences", "languages", "message"),
    [
        (CONFIG, SENTENCES[1:], LANGUAGES, r"t\.json was made from other input: sentences \d+ not"),
        (CONFIG, None, ("en", "de"), r"languages \['en', 'de', 'fr', 'cs'\] not \['en', 'de'\]"),
        (TokenizerConfig(vocab=400), None, LANGUAGES, r"vocab 420 not 400; remove it"),
        (dataclasses.replace(CONFIG, lower=True), None, LANGUAGES, r"lower False not True"),
    ],
)
def test_tokenizer_file_of_other_inputs_is_refused(tmp_path, config, sentences, languages, message):
    path = tmp_path / "t.json"
    load_or_train_tokenizer(CONFIG, SENTENCES, LANGUAGES, path)
    with pytest.raises(ValueError, match=message):
        load_or_train_tokenizer(config, sentences, languages, path)


def test_missing_or_broken_tokenizer_file_is_reported(tmp_path):
    path = tmp_path / "t.json"
    with pytest.raises(FileNotFoundError, match=r"t\.json is missing and there is nothing"):
        load_or_train_tokenizer(CONFIG, None, LANGUAGES, path)
    load_or_train_tokenizer(CONFIG, SENTENCES, LANGUAGES, path)
    good = json.loads(path.read_text())
    bpe = json.loads(good["bpe"])
    vocab = bpe["model"]["vocab"]

    def with_vocab(changed):
        model = bpe["model"] | {"vocab": changed}
        return json.dumps(good | {"bpe": json.dumps(bpe | {"model": model})})

    for content in (
        "{",
        "[]",
        json.dumps({"made_from": {}, "bpe": "{}"}),
        json.dumps(good | {"made_from": []}),
        json.dumps(good | {"bpe": "[" * 100_000}),
        json.dumps(good | {"bpe": json.dumps(bpe | {"model": None})}),
        with_vocab({token: i for i, token in enumerate(reversed(vocab))}),
        with_vocab(vocab | {"x y": 10**6}),
        with_vocab({token: i for token, i in vocab.items() if token != "!"}),
    ):
        path.write_text(content)
        with pytest.raises(
            ValueError, match=r"t\.json is not a tokenizer of this project .*remove"
        ):
            load_or_train_tokenizer(CONFIG, SENTENCES, LANGUAGES, path)


def test_unknown_language_is_refused_listing_the_known(trained):
    with pytest.raises(ValueError, match=r"no language 'eng' \(did you mean 'en'\?\); it has en, "):
        trained.language_id("eng")
    with pytest.raises(ValueError, match="no language 'es'"):
        trained.encode(["x"], "es")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "mbart"}, r"config\.clip_tokenizer\.kind='mbart'.*did you mean 'mbart50'"),
        ({"kind": "xlmr"}, r"config\.clip_tokenizer\.path='' must be its folder"),
        ({"path": "/x"}, r"config\.clip_tokenizer\.path='/x' must be empty"),
        ({"vocab": 261}, r"config\.clip_tokenizer\.vocab=261 must be above 261"),
        ({"max_length": 2}, r"config\.clip_tokenizer\.max_length=2 must be from 3"),
        ({"kind": "clip", "path": "x", "max_length": 78}, r"max_length=78 .* to 77"),
    ],
)
def test_invalid_config_is_refused_by_key(fields, message):
    with pytest.raises(ValueError, match=message):
        freeze(TokenizerConfig, fields, "config.clip_tokenizer")


def test_vocabulary_must_have_room_for_the_languages(tmp_path):
    with pytest.raises(ValueError, match=r"vocab=263 is too small for 256 bytes, 4 .* 4 languages"):
        load_or_train_tokenizer(TokenizerConfig(vocab=263), SENTENCES, LANGUAGES, tmp_path / "t")


@pytest.mark.parametrize("kind", PUBLISHED)
def test_missing_folder_is_reported_with_what_to_fetch(tmp_path, kind):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"lacks .*huggingface_hub") as error:
        load_tokenizer(TokenizerConfig(kind, str(tmp_path)))
    for name in (*PUBLISHED[kind].files, PUBLISHED[kind].order, PUBLISHED[kind].repository):
        assert name in str(error.value)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model like those of mBART-50 and XLM-R, and its folder."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="it trains the model to read")
    folder = tmp_path_factory.mktemp("published")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=120,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    return folder, model


# In the order of their ids, starting at 250001.
CODES = """ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT
lv_LV my_MM ne_NP nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN af_ZA az_AZ bn_IN fa_IR he_IL hr_HR
id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX
uk_UA ur_PK xh_ZA gl_ES sl_SI"""


def test_mbart50_codes_are_the_published_ones():
    assert list(MBART50_CODES.items()) == [(code[:2], code) for code in CODES.split()]
    assert PUBLISHED["mbart50"].last == (*CODES.split(), "<mask>")


def test_token_limit_of_each_kind_matches_the_network_positions():
    wanted = {"trained": 1024, "mbart50": 1024, "nllb": 1024, "xlmr": 512, "clip": 77}
    for kind, limit in wanted.items():
        path = "" if kind == "trained" else "folder"
        assert TokenizerConfig(kind, path).limit == limit
        assert TokenizerConfig(kind, path, max_length=limit).limit == limit
        assert TokenizerConfig(kind, path, max_length=3).limit == 3


def framed(*, limit=6, unknown=3):
    """A tokenizer with 10 ids, each written as its number."""
    return FramedTokenizer(
        cut=lambda texts: [[int(word) for word in text.split()] for text in texts],
        join=lambda ids: " ".join(map(str, ids)),
        definition=lambda: b"words are ids",
        vocab=10,
        language_ids={"en": 8, "de": 9},
        special=frozenset({0, 1, 2, unknown, 8, 9}),
        limit=limit,
    )


def test_special_tokens_count_towards_the_length_limit(caplog):
    rows = framed().encode(["4 5 6 7", "4 5 6 7 4", "3", ""], "de")
    assert [row.tolist() for row in rows] == [
        [9, 4, 5, 6, 7, 2],
        [9, 4, 5, 6, 7, 2],
        [9, 3, 2],
        [9, 2],
    ]
    assert "1 of 4 sentences in de have more than 4 tokens" in caplog.text
    assert framed().encode(["5"], None)[0].tolist() == [0, 5, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [("4 10", "beyond the tokenizer's 10"), ("-1", "beyond"), ("4 2", "lacks"), ("9 4", "lacks")],
)
def test_pieces_must_be_in_the_vocabulary_and_not_special(text, said):
    with pytest.raises(ValueError, match=said):
        framed().encode(["4 5", text], "en")


def test_clip_splits_words_as_published():
    """Contractions, letters of any script, single digits, and runs of anything else."""
    letters = {letter: place for place, letter in enumerate("abc")}
    tokenizer = byte_pairs.clip_tokenizer({**letters, byte_pairs.CLIP_EOS: 3}, [])

    def words(text):
        normal = tokenizer.normalizer.normalize_str(text)
        cut = tokenizer.pre_tokenizer.pre_tokenize_str(normal)
        return [normal[first:last] for _, (first, last) in cut]

    assert words("It's  1970:\tWe'LL go,\nÉté!?") == [
        "it", "'s", "1", "9", "7", "0", ":", "we", "'ll", "go", ",", "été", "!?",
    ]  # fmt: skip
    assert words("e\u0301") == words("é") == ["é"]


def test_mbart50_ids_are_sentencepiece_ids_plus_one(pieces):
    folder, model = pieces
    tokenizer = load_tokenizer(TokenizerConfig("mbart50", str(folder)))
    # 4 special tokens in place of SentencePiece's 3, 52 languages, a mask.
    assert tokenizer.vocab == 120 + 1 + 52 + 1
    assert (tokenizer.bos, tokenizer.pad, tokenizer.eos) == (0, 1, 2)
    assert tokenizer.languages == tuple(MBART50_CODES) and len(MBART50_CODES) == 52
    found = [tokenizer.language_id(language) for language in MBART50_CODES]
    assert found == list(range(121, 121 + 52))  # starting at 250001 with the real 250000 pieces
    unknown = "漢"
    for text in (*SENTENCES, f"men {unknown}"):
        expected = [i + 1 if i else 3 for i in model.encode(text)]
        for language, code in (("en", 124), ("af", 146), (None, 0)):
            (row,) = tokenizer.encode([text], language)
            np.testing.assert_array_equal(row, [code, *expected, 2])
        assert tokenizer.decode([2, code, *expected, 2, 1]) == text.replace(unknown, "")
    assert len(tokenizer.encode([], "en")) == 0
    with pytest.raises(ValueError, match="no language 'la'"):
        tokenizer.language_id("la")


def test_xlmr_special_tokens_match_mclip(pieces):
    folder, model = pieces
    tokenizer = load_tokenizer(TokenizerConfig("xlmr", str(folder), max_length=8))
    (row,) = tokenizer.encode(SENTENCES[:1], None)
    np.testing.assert_array_equal(row, [0, *(i + 1 for i in model.encode(SENTENCES[0])[:6]), 2])
    with pytest.raises(ValueError, match="no language 'en'; it has none; encode for language None"):
        tokenizer.encode(SENTENCES, "en")


def test_clip_uses_its_own_special_tokens(tmp_path):
    merges = ["a n</w>", "r u"]
    letters = sorted("abcdefghijklmnopqrstuvwxyz")
    vocab = ["!", '"', *letters, *(f"{c}</w>" for c in letters)]
    vocab += [merge.replace(" ", "") for merge in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    tokenizer = load_tokenizer(TokenizerConfig("clip", str(tmp_path)))
    (row,) = tokenizer.encode(["A man  Run"], None)
    names = [vocab[i] for i in row]
    assert names == ["<|startoftext|>", "a</w>", "m", "an</w>", "ru", "n</w>", "<|endoftext|>"]
    assert tokenizer.pad == 1 and tokenizer.eos == len(vocab) - 1 == tokenizer.vocab - 1
    assert tokenizer.decode([*row, 1, 1]).strip() == "a man run"
    (long_row,) = tokenizer.encode(["a " * 100], None)
    assert len(long_row) == PUBLISHED["clip"].limit == 77 and long_row[-1] == tokenizer.eos


def test_folder_of_another_tokenizer_is_refused(pieces, tmp_path):
    transformers = pytest.importorskip("transformers", reason="it writes a folder to read")
    folder, _ = pieces
    transformers.XLMRobertaTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert load_tokenizer(TokenizerConfig("xlmr", str(tmp_path))).vocab == 122
    message = r"config\.tokenizer\.path=.*facebook/mbart-large-50.*tokenizer of kind 'xlmr'"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(TokenizerConfig("mbart50", str(tmp_path)))


@pytest.mark.parametrize("lower", [False, True])
def test_long_words_are_left_out_of_training_alone(tmp_path, caplog, lower):
    """The pieces are those of the same texts without them, and the word still has its ids."""
    config = dataclasses.replace(CONFIG, lower=lower)
    long, short = "Ü" * 501, "ß" * 499  # with its space, the second has 999 bytes
    text = f"Größe!{long}? Ende,{long}! ein {short}"
    # A word of one byte has nothing to merge, but keeps the marks beside it apart.
    texts = {"with": text, "without": text.replace(long, "x")}
    pieces = {}
    for name, text in texts.items():
        caplog.clear()
        path = tmp_path / name
        trained = load_or_train_tokenizer(config, [*SENTENCES, text], LANGUAGES, path)
        pieces[name] = json.loads(path.read_text())["bpe"]
        assert ("config.data has 2 of them" in caplog.text) == (name == "with")
        (ids,) = trained.encode([text], "en")
        start = trained.decode(ids)[:200]  # the rest is cut off
        assert len(start) == 200 and (text.lower() if lower else text).startswith(start)
    assert pieces["with"] == pieces["without"]


def test_one_process_trains_on_the_same_sentences_once(tmp_path, caplog):
    caplog.set_level("INFO")
    texts = ["one text", "another"]
    for number in range(3):
        load_or_train_tokenizer(CONFIG, texts, LANGUAGES, tmp_path / f"{number}")
    assert caplog.text.count("training the tokenizer on 2 sentences") == 1
    assert len({(tmp_path / f"{number}").read_text() for number in range(3)}) == 1
    for number, (config, sentences, languages) in enumerate(
        (
            (dataclasses.replace(CONFIG, lower=True), texts, LANGUAGES),
            (dataclasses.replace(CONFIG, vocab=430), texts, LANGUAGES),
            (CONFIG, texts[::-1], LANGUAGES),
            (CONFIG, texts, LANGUAGES[::-1]),
        ),
        start=2,
    ):
        load_or_train_tokenizer(config, sentences, languages, tmp_path / f"other {number}")
        assert caplog.text.count("training the tokenizer on 2 sentences") == number
