"""In the Neural Attentive Circuits."""

from mistakes.mistake import Mistake

MISTAKES: tuple[Mistake, ...] = ()
