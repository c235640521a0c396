"""Framed sentences of two languages, and the examples that a stage makes from them."""

import numpy as np

from cliptrans_jax.data.examples import NoiseConfig, choose_examples
from cliptrans_jax.stages import STAGES

SIZE, PAD, EOS = 22, 1, 2
CODES = {"en": 90, "de": 91}


def sentences(language, *, seed):
    """Framed ids; a sentence's first word is its number, which identifies it in a batch."""
    rng = np.random.default_rng(seed)
    return [
        np.array([CODES[language], 10 + i, *rng.integers(40, 80, rng.integers(0, 18)), EOS], "i4")
        for i in range(SIZE)
    ]


TOKENS = {"en": sentences("en", seed=0), "de": sentences("de", seed=1)}
PAIR, QUIET = ("en", "de"), NoiseConfig()


def choose(stage, *, train=True, noise=QUIET, pair=PAIR, **choices):
    """The examples of a stage."""
    return choose_examples(STAGES[stage], TOKENS, pair=pair, train=train, noise=noise, **choices)
