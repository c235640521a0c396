"""Small mistakes of the kind that developers make, each with the tests that must notice it.

`tests/mutants.py` makes them one at a time in a copy of the code. If a text is no longer in its
file, `tests/test_mutants.py` fails: when you change the code, change the mistake with it.
"""

from mistakes import data, moe, nac, teaching, training, translating, translator
from mistakes.mistake import Mistake

MISTAKES: tuple[Mistake, ...] = (
    *teaching.MISTAKES,
    *moe.MISTAKES,
    *nac.MISTAKES,
    *training.MISTAKES,
    *data.MISTAKES,
    *translator.MISTAKES,
    *translating.MISTAKES,
)
