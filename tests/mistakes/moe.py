"""In the transformers and in the mixture of experts: routing, dispatch, encoder."""

from mistakes.mistake import Mistake

MISTAKES: tuple[Mistake, ...] = ()
