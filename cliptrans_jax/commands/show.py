"""`cliptrans show RUN_OR_CONFIG`: config, parameters, and FLOPs per step."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from common_jax.command_line import Command
from common_jax.commands.arguments import add_show_arguments

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from cliptrans_jax.config import Config
    from common_jax.commands.show import Training

TOKENS = 64  # per sentence, if it may be that long; FLOPs are proportional to it
EPOCH = 1000  # steps per epoch; neither parameters nor FLOPs depend on it


def run(args: argparse.Namespace) -> None:
    """Prints everything about a run or a config."""
    from cliptrans_jax.config import SYSTEM, Config
    from common_jax.commands.show import Subject, show

    show(args, Subject(SYSTEM, Config, trainings))


def trainings(config: "Config", mesh: "Mesh") -> "Iterator[Training]":
    """Yields the training runs of a config."""
    import dataclasses

    from etils import epath

    from cliptrans_jax.runs import contrastive, translation
    from cliptrans_jax.runs.pipeline import plan
    from cliptrans_jax.stages import STAGES, TRANSLATION_STAGES
    from common_jax.commands.show import Training

    for folder, one in plan(config, epath.Path()):
        tokens = min(TOKENS, one.tokenizer.limit)
        name = f"{folder or one.stage}, {tokens} tokens per sentence"
        if one.stage in TRANSLATION_STAGES:
            # A loop over chunks of labels has a data-dependent trip count, so its operations cannot
            # be counted. With all labels in one chunk there is no loop.
            whole = dataclasses.replace(one, label_chunk=one.optim.batch * tokens)
            examples = EPOCH * one.optim.batch
            task = translation.describe(whole, mesh, examples=examples, tokens=tokens)
            yield Training(name, task, one.apply_parity().optim)
        elif one.stage in STAGES:
            length = min(tokens, one.clip.text.longest)
            yield Training(name, contrastive.describe(one, steps=EPOCH, length=length), one.optim)


COMMAND = Command(
    "the config with the meaning of every field, the parameters, the FLOPs per step",
    add_show_arguments,
    run,
    rest=("--config.",),
)
