"""In the training loop: optimizer, step, state, averages, checkpoints, inputs, metrics."""

from mistakes.mistake import Mistake

MISTAKES: tuple[Mistake, ...] = ()
