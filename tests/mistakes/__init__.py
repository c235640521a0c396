"""Small mistakes of the kind that developers make, each with the tests that have to notice it.

`tests/mutants.py` makes them one at a time in a copy of the code. A text that is no longer there
fails `tests/test_mutants.py`: whoever changes the code changes the mistake with it.
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
