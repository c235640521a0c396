"""Runners for translation metrics; the sentences are in the json."""

from collections.abc import Iterator

import numpy as np

from cliptrans_jax.evaluators.scores import bleu, meteor
from parity.cases import Case, Comparison

LANGUAGE = "de"  # any language with spaces between words, so that sacrebleu uses its defaults


def run_bleu(case: Case) -> Iterator[Comparison]:
    """Corpus BLEU with its components, and BLEU of the first sentence alone."""
    settings, atol = case.config["config"], float(case.config["tolerance"])
    hypotheses, references = settings["hypotheses"], settings["references"]
    whole, _ = bleu(hypotheses, references, language=LANGUAGE)
    first, _ = bleu(hypotheses[:1], references[:1], language=LANGUAGE)
    got = {  # value, tolerance
        "counts": (whole.counts, 0),
        "totals": (whole.totals, 0),
        "sys_ref_len": ((whole.sys_len, whole.ref_len), 0),
        "score": (whole.score, atol),
        "bp": (whole.bp, atol),
        "precisions": (whole.precisions, atol),
        "score_first_only": (first.score, atol),
    }
    for name, want in case.arrays.below("outputs/").items():
        value, tolerance = got[name]
        yield name, value, want, tolerance, 0


def run_meteor(case: Case) -> Iterator[Comparison]:
    """METEOR of each sentence, on the case's own tokens, and the mean."""
    settings, atol = case.config["config"], float(case.config["tolerance"])
    hypotheses, references = settings["hypothesis_tokens"], settings["reference_tokens"]
    scores = [meteor(x, y) for x, y in zip(hypotheses, references, strict=True)]
    yield "sentence_scores", scores, case.arrays["outputs/sentence_scores"], atol, 0
    yield "mean", np.mean(scores), case.arrays["outputs/mean"], atol, 0
