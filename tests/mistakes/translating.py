"""In CLIPTrans' data and runs: tokens, features, corpora, stages, scores."""

from mistakes.mistake import Mistake

MISTAKES: tuple[Mistake, ...] = ()
