"""Scores of translations against one reference each: BLEU, chrF, METEOR and exact matches.

All are computed over a whole set, from 0 to 100, with a signature that names the variant. Nothing
is downloaded: a tokenizer that would need data is replaced, as its signature says. nltk and
sacremoses are imported only by the functions that use them: the imports take seconds, and most
commands compute no such score.
"""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from sacrebleu.metrics.bleu import BLEU, BLEUScore
from sacrebleu.metrics.chrf import CHRF

from cliptrans_jax.translators.nllb_languages import CODE_BY_TOKEN

# sacrebleu's tokenizers for languages written without spaces. Its better ones for Japanese and
# Korean need packages with dictionaries.
TOKENIZERS = {"zh": "zh"} | dict.fromkeys(
    ("ja", "ko", "th", "my", "km", "lo", "bo", "dz", "shn"), "char"
)
# Other codes of languages in TOKENIZERS.
SAME_AS = {"cmn": "zh", "yue": "zh", "lao": "lo", "bod": "bo", "dzo": "dz"}
DEFAULT_TOKENIZER = "13a"

METRICS = ("bleu", "bleu_lower", "chrf", "meteor", "exact")  # logged fields of `Scores`
ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5  # METEOR's recall weight, penalty shape, penalty weight


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of a set, 0 to 100.

    Attributes:
      bleu: sacrebleu's corpus BLEU with its defaults, case-sensitive.
      bleu_lower: corpus BLEU of lower-cased, Moses-tokenised text, as reported for text-only models
        on Multi30k.
      chrf: sacrebleu's corpus chrF2.
      meteor: METEOR with the stages exact and stem, averaged over sentences.
      exact: share of outputs that equal their reference up to white space and Unicode
        normalisation.
      count: number of sentences.
      signatures: name of a score -> its signature.
    """

    bleu: float
    bleu_lower: float
    chrf: float
    meteor: float
    exact: float
    count: int
    signatures: Mapping[str, str]


def score(hypotheses: Sequence[str], references: Sequence[str], *, language: str) -> Scores:
    """Scores detokenised outputs against raw target lines (CLIPTrans, evaluation).

    Args:
      hypotheses: the outputs.
      references: one per output.
      language: language of both. Here and below: a code such as "de", "de_DE" with a country, or
        NLLB's "deu_Latn".

    Raises:
      ValueError: if there are no sentences, or the numbers of outputs and references differ.
    """
    if len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} outputs cannot be scored against {len(references)} references; "
            "there must be one for each"
        )
    if not hypotheses:
        raise ValueError("there is nothing to score: 0 outputs and 0 references")
    cased, cased_signature = bleu(hypotheses, references, language=language)
    lower, lower_signature = bleu_lower(hypotheses, references, language=language)
    chrf = CHRF()
    chrf_score = chrf.corpus_score(hypotheses, [references])
    pairs = zip(
        words(hypotheses, language=language), words(references, language=language), strict=True
    )
    meteors = [meteor(hypothesis, reference) for hypothesis, reference in pairs]
    same = [_plain(x) == _plain(y) for x, y in zip(hypotheses, references, strict=True)]
    count = len(hypotheses)
    return Scores(
        bleu=cased.score,
        bleu_lower=lower.score,
        chrf=chrf_score.score,
        meteor=100 * sum(meteors) / count,
        exact=100 * sum(same) / count,
        count=count,
        signatures={
            "bleu": cased_signature,
            "bleu_lower": lower_signature,
            "chrf": str(chrf.get_signature()),
            "meteor": _meteor_signature(language),
            "exact": "case:mixed|form:NFC|space:one",
        },
    )


def as_metrics(scores: Scores) -> dict[str, float]:
    """The scores as metrics for a run to log."""
    return {name: getattr(scores, name) for name in METRICS}


def bleu(
    hypotheses: Sequence[str], references: Sequence[str], *, language: str
) -> tuple[BLEUScore, str]:
    """sacrebleu's corpus BLEU with its defaults (13a tokens unless `TOKENIZERS` has the language,
    exponential smoothing, case-sensitive), and the signature."""
    metric = BLEU(tokenize=TOKENIZERS.get(_code(language), DEFAULT_TOKENIZER))
    return metric.corpus_score(hypotheses, [references]), str(metric.get_signature())


def bleu_lower(
    hypotheses: Sequence[str], references: Sequence[str], *, language: str
) -> tuple[BLEUScore, str]:
    """Corpus BLEU of texts tokenised by `moses`, and the signature. Languages in `TOKENIZERS`,
    which Moses cannot segment, are lower-cased but keep their tokenizer."""
    language = _code(language)
    if language in TOKENIZERS:
        metric = BLEU(lowercase=True, tokenize=TOKENIZERS[language])
        return metric.corpus_score(hypotheses, [references]), str(metric.get_signature())
    # force: sacrebleu would warn about tokenised input, which is intended here.
    metric = BLEU(lowercase=True, tokenize="none", force=True)
    value = metric.corpus_score(
        moses(hypotheses, language=language), [moses(references, language=language)]
    )
    import sacremoses
    from sacremoses.corpus import NonbreakingPrefixes

    # Moses falls back to English abbreviations for languages without a list of their own.
    prefixes = language if language in NonbreakingPrefixes().available_langs else "en"
    prepared = f"prep:moses-lc-norm-tok-{language}|prefixes:{prefixes}"
    return value, f"{prepared}|sacremoses:{sacremoses.__version__}|{metric.get_signature()}"


def moses(texts: Iterable[str], *, language: str) -> list[str]:
    """Texts in the form of Multi30k's tokenised files: lower-cased, with normalised punctuation and
    spaces between tokens, by sacremoses' ports of Moses' scripts."""
    import sacremoses

    normalizer = sacremoses.MosesPunctNormalizer(_code(language), perl_parity=True)
    tokenizer = sacremoses.MosesTokenizer(_code(language))
    normalized = (normalizer.normalize(text.lower()) for text in texts)
    return [tokenizer.tokenize(text, return_str=True) for text in normalized]


def words(texts: Iterable[str], *, language: str) -> list[list[str]]:
    """METEOR's tokens of each text: from nltk's word tokenizer, with the text as one sentence, or
    single characters for languages in `TOKENIZERS`."""
    if _code(language) in TOKENIZERS:
        return [list("".join(text.split())) for text in texts]
    from nltk.tokenize import NLTKWordTokenizer

    tokenizer = NLTKWordTokenizer()
    return [tokenizer.tokenize(text) for text in texts]


def meteor(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """METEOR of one tokenised sentence, from 0 to 1; tokens are lower-cased here:

    (1 - gamma (chunks / m)^beta) P R / (alpha P + (1 - alpha) R),  P = m / |hypothesis|,
    R = m / |reference|

    m = matched tokens, first equal ones, then those with equal Porter stems; chunks = runs of
    matches that are adjacent in both. METEOR's third stage, WordNet synonyms, is left out: its data
    needs a download and covers only English. Without a match the score is 0.
    """
    from nltk.translate import meteor_score

    return meteor_score.single_meteor_score(
        reference,
        hypothesis,
        stemmer=_stemmer(),
        wordnet=_NoSynonyms(),
        alpha=ALPHA,
        beta=BETA,
        gamma=GAMMA,
    )


def _code(language: str) -> str:
    """The "de" of "de_DE", of "de-AT" and of "deu_Latn"; the "ace" of "ace_Latn", which has no
    shorter code."""
    code = CODE_BY_TOKEN.get(language, re.split("[-_]", language)[0].lower())
    return SAME_AS.get(code, code)


class _NoSynonyms:
    """Stands in for nltk's WordNet: no word has a synonym."""

    def synsets(self, word: str) -> tuple[()]:
        return ()


@functools.cache
def _stemmer():
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()


def _meteor_signature(language: str) -> str:
    import nltk

    tokens = "char" if _code(language) in TOKENIZERS else "nltk-word"
    weights = f"alpha:{ALPHA:g}|beta:{BETA:g}|gamma:{GAMMA:g}"
    return (
        f"nrefs:1|case:lc|tok:{tokens}|stages:exact+porter|{weights}|mean:sentences"
        f"|nltk:{nltk.__version__}"
    )


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))
