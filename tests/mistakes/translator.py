"""In CLIPTrans' networks: mBART, mapper, prefix, towers, decoding, losses."""

from mistakes.mistake import Mistake

MISTAKES: tuple[Mistake, ...] = ()
