"""In reading, augmenting and choosing images, and in feeding them."""

from mistakes.mistake import Mistake

MISTAKES: tuple[Mistake, ...] = ()
