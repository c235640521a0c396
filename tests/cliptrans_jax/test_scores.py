"""Scores, against numbers worked out by hand, and their signatures."""

import logging
import math

import nltk
import numpy as np
import pytest
from nltk.translate.meteor_score import single_meteor_score
from parity import cases, cliptrans_scores

from cliptrans_jax.evaluators.scores import (
    as_metrics,
    bleu,
    bleu_lower,
    meteor,
    moses,
    score,
    words,
)

TEXTS = ["Zwei Hunde spielen im Schnee.", "Ein Mann fährt auf einem Fahrrad durch die Stadt."]


def test_perfect_translation_scores_100_except_for_meteor():
    metrics = as_metrics(score(TEXTS, TEXTS, language="de"))
    lengths = [6, 10]  # token counts, including the full stop; one chunk each
    penalised = [100 * (1 - 0.5 / length**3) for length in lengths]
    assert metrics.pop("meteor") == pytest.approx(sum(penalised) / 2, abs=1e-9)
    assert metrics == pytest.approx(dict.fromkeys(("bleu", "bleu_lower", "chrf", "exact"), 100))


@pytest.mark.parametrize("shorter", [True, False])
def test_scores_of_shorter_and_longer_outputs_by_hand(shorter):
    """Either "a b c d" or "a b c d e" is the output: it matters which one is the reference."""
    pair = [["a b c d", "z"], ["a b c d e", "z"]]
    found = score(*(pair if shorter else pair[::-1]), language="de")
    # The shorter text has 5, 3, 2, 1 n-grams of orders 1 to 4, and all match. The longer one has
    # 6, 4, 3, 2, of which as many match.
    precision = 1 if shorter else (5 / 6 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    penalty = math.exp(1 - 6 / 5) if shorter else 1
    assert found.bleu == pytest.approx(100 * precision * penalty)
    assert found.bleu_lower == pytest.approx(100 * precision * penalty)
    # Letters: 4, 3, 2, 1 n-grams of orders 1 to 4 match, plus "z"; higher orders are not in both.
    part = (5 / 6 + 3 / 4 + 2 / 3 + 1 / 2) / 4
    chars = (1, part) if shorter else (part, 1)
    assert found.chrf == pytest.approx(100 * 5 * chars[0] * chars[1] / (4 * chars[0] + chars[1]))
    words_ = (1, 4 / 5) if shorter else (4 / 5, 1)
    mean = words_[0] * words_[1] / (0.9 * words_[0] + 0.1 * words_[1])
    first, second = mean * (1 - 0.5 * (1 / 4) ** 3), 1 - 0.5
    assert found.meteor == pytest.approx(100 * (first + second) / 2)
    assert (found.exact, found.count) == (50, 2)


def test_bleu_of_a_truncated_output_is_the_brevity_penalty():
    value, signature = bleu(["a b c d"], ["a b c d e"], language="de")
    assert value.score == pytest.approx(100 * math.exp(1 - 5 / 4), abs=1e-9)
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_sums_counts_over_the_corpus_and_smooths():
    value, _ = bleu(["a b c d", "x y"], ["a b c d", "z y"], language="en")
    assert (value.counts, value.totals) == ([5, 3, 2, 1], [6, 4, 2, 1])
    assert value.score == pytest.approx(100 * (5 / 6 * 3 / 4) ** 0.25, abs=1e-9)
    unmatched, _ = bleu(["a b c x"], ["a b c d"], language="en")
    # No 4-gram matches: it counts as half a match.
    assert unmatched.score == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25, abs=1e-9)


def test_only_bleu_and_exact_match_are_case_sensitive():
    lowered = [text.lower() for text in TEXTS]
    scores = score(lowered, TEXTS, language="de_DE")
    assert scores.bleu < 70
    assert scores.exact == 0
    assert scores.bleu_lower == pytest.approx(100)
    assert scores.meteor == pytest.approx(score(TEXTS, TEXTS, language="de").meteor)


@pytest.mark.parametrize(
    ("language", "text", "tokens"),
    [
        (
            "de_DE",
            "Er sagt „Hallo“ – z.B. um 3,5 Uhr.",
            "er sagt &quot; hallo &quot; - z.b. um 3,5 uhr .",
        ),
        ("fr", "L’homme dort « bien » ici !", "l&apos; homme dort &quot; bien &quot; ici !"),
        ("en", "The dog's ball… is  red", "the dog &apos;s ball ... is red"),
        ("cs", "Muž, žena (a pes)", "muž , žena ( a pes )"),
    ],
)
def test_preprocessing_matches_the_moses_scripts(language, text, tokens):
    assert moses([text], language=language) == [tokens]


def test_bleu_lower_uses_moses_tokens():
    pair = ["Er sagt „Hallo“ – und geht heim."], ['er sagt "Hallo" - und geht heim.']
    assert bleu(*pair, language="de")[0].score < 99
    value, signature = bleu_lower(*pair, language="de")
    assert value.score == pytest.approx(100)
    assert value.sys_len == 10
    assert signature.startswith("prep:moses-lc-norm-tok-de|prefixes:de|sacremoses:")
    assert "|case:lc|eff:no|tok:none|smooth:exp|" in signature


def test_signature_shows_fallback_to_english_abbreviations():
    assert "tok-gl_ES" not in (signature := bleu_lower(TEXTS, TEXTS, language="gl_ES")[1])
    assert signature.startswith("prep:moses-lc-norm-tok-gl|prefixes:en|")


@pytest.mark.parametrize(
    ("language", "tokenizer", "texts"),
    [
        ("zh_CN", "zh", ("两只狗在雪地里玩耍", "两只狗在雪地里跑")),
        ("zh-Hant", "zh", ("两只狗在雪地里玩耍", "两只狗在雪地里跑")),
        ("CMN", "zh", ("两只狗在雪地里玩耍", "两只狗在雪地里跑")),
        ("lao_Laoo", "char", ("ໝາສອງໂຕຫຼິ້ນຫິມະ", "ໝາສອງໂຕແລ່ນຫິມະ")),
        ("ja", "char", ("二匹の犬が雪の中で遊ぶ", "二匹の犬が雪の中で走る")),
        ("ko", "char", ("개 두 마리가 눈밭에서 논다", "개 두 마리가 눈밭에서 뛴다")),
        ("th", "char", ("สุนัขสองตัวเล่นหิมะ", "สุนัขสองตัววิ่ง")),
        ("my_MM", "char", ("ခွေးနှစ်ကောင်ကစား", "ခွေးနှစ်ကောင်ပြေး")),
        ("km", "char", ("ឆ្កែពីរក្បាលលេង", "ឆ្កែពីរក្បាលរត់")),
    ],
)
def test_languages_without_spaces_are_scored_by_characters(language, tokenizer, texts):
    scores = score(texts[:1], texts[1:], language=language)
    for name in ("bleu", "bleu_lower"):
        assert f"|tok:{tokenizer}|" in scores.signatures[name]
    assert "|tok:char|" in scores.signatures["meteor"]
    assert 30 < scores.bleu < 100
    assert 30 < scores.meteor < 100


def test_lower_case_bleu_ignores_case_in_every_language():
    for language in ("zh", "ja", "de"):
        pair = ["A Dog runs and plays"], ["a dog runs and plays"]
        assert bleu_lower(*pair, language=language)[0].score == pytest.approx(100)
        assert bleu(*pair, language=language)[0].score < 90


# METEOR.


def test_meteor_matches_its_formula():
    # 4 of 5 and of 6 words match, in 2 chunks.
    hypothesis, reference = list("abxcd"), list("cdyzab")
    precision, recall = 4 / 5, 4 / 6
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    assert meteor(hypothesis, reference) == pytest.approx(
        mean * (1 - 0.5 * (2 / 4) ** 3), abs=1e-12
    )


def test_meteor_matches_ignoring_case_and_by_stem_not_synonym():
    one = 1 - 0.5  # one word matched, one chunk of one
    assert meteor(["Dogs"], ["dogs"]) == pytest.approx(one)
    assert meteor(["playing"], ["plays"]) == pytest.approx(one)
    assert meteor(["car"], ["automobile"]) == 0
    # An equal word is matched before one with the same stem, wherever it is.
    assert meteor(["plays", "x", "play"], ["play"]) == pytest.approx(meteor(list("yxp"), ["p"]))
    pair = ["play", "ran", "plays"], ["plays", "ran", "z"]  # by stem first: one chunk of two
    assert meteor(*pair) == pytest.approx(2 / 3 * (1 - 0.5 * (2 / 2) ** 3))


@pytest.mark.parametrize("pair", [([], ["a"]), (["a"], []), ([], []), (["a"], ["b"])])
def test_meteor_without_a_match_is_zero(pair):
    assert meteor(*pair) == 0


def test_scoring_needs_no_nltk_data(monkeypatch):
    def missing(name, *arguments):
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", missing)
    with pytest.raises(LookupError):  # as nltk alone does, which this test relies on
        single_meteor_score(["a"], ["b"])
    assert score(TEXTS, TEXTS[::-1], language="de").meteor > 0


def test_words_are_those_of_nltk():
    assert words(['He said: "don\'t go", ok.'], language="en") == [
        ["He", "said", ":", "``", "do", "n't", "go", "''", ",", "ok", "."]
    ]
    assert words(["两 只狗"], language="zh") == [["两", "只", "狗"]]


def test_signatures_cover_every_score_and_version():
    scores = score(TEXTS, TEXTS, language="de")
    assert set(scores.signatures) == set(as_metrics(scores))
    assert scores.signatures["meteor"] == (
        "nrefs:1|case:lc|tok:nltk-word|stages:exact+porter|alpha:0.9|beta:3|gamma:0.5"
        f"|mean:sentences|nltk:{nltk.__version__}"
    )
    assert "|nc:6|nw:0|" in scores.signatures["chrf"]


# Whole sets.


def test_exact_match_ignores_spaces_and_unicode_forms():
    composed, decomposed = "f\u00e4hrt  weg", "fa\u0308hrt weg "
    scores = score([composed, "Weg", "weg", ""], [decomposed, "weg", "weg", ""], language="de")
    assert (scores.exact, scores.count) == (75, 4)


def test_empty_outputs_are_scored(caplog):
    with caplog.at_level(logging.WARNING):
        scores = score(["", ""], TEXTS, language="de")
    assert set(as_metrics(scores).values()) == {0}
    assert not caplog.records


def test_mismatched_sets_are_refused_with_their_counts():
    with pytest.raises(ValueError, match=r"2 outputs .* 1 references"):
        score(TEXTS, TEXTS[:1], language="de")
    with pytest.raises(ValueError, match="0 outputs"):
        score([], [], language="de")


# Golden cases.


def case_of(config, outputs):
    arrays = {f"outputs/{name}": np.asarray(value) for name, value in outputs.items()}
    held = {"config": config, "tolerance": 1e-6}
    return cases.Case("cliptrans/case", held, cases.Arrays(arrays))


@pytest.mark.parametrize("wrong", [False, True])
def test_conformance_runner_compares_every_expected_value(wrong):
    error = 1e-3 if wrong else 0
    sentences = {"hypotheses": ["a b c d", "x y"], "references": ["a b c d", "z y"]}
    value = 100 * (5 / 6 * 3 / 4) ** 0.25
    outputs = {
        "score": value + error,
        "counts": [5, 3, 2, 1],
        "totals": [6, 4, 2, 1],
        "sys_ref_len": [6, 6],
        "bp": 1.0,
        "precisions": [500 / 6, 75, 100, 100],
        "score_first_only": 100.0,
    }
    run = cliptrans_scores.run_bleu
    checks = cases.run_case(case_of(sentences, outputs), run)
    assert [check.name for check in checks if not check.passed] == ["score"] * wrong
    assert len(checks) == len(outputs)

    tokens = {"hypothesis_tokens": [["a"], ["b"]], "reference_tokens": [["a"], ["c"]]}
    outputs = {"sentence_scores": [0.5 + error, 0], "mean": 0.25}
    run = cliptrans_scores.run_meteor
    checks = cases.run_case(case_of(tokens, outputs), run)
    assert [check.name for check in checks if not check.passed] == ["sentence_scores"] * wrong
    assert len(checks) == len(outputs)
