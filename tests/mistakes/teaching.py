"""In the distillation: losses, hybrids, phases, pipeline, few-shot, evaluation."""

from mistakes.mistake import Mistake

MISTAKES: tuple[Mistake, ...] = ()
