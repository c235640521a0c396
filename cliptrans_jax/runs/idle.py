"""Config fields that are set but have no effect given the others."""

import logging
from collections.abc import Iterator

from cliptrans_jax.config import READS, Config
from cliptrans_jax.models.mapper import MAPPERS
from cliptrans_jax.runs.initial_weights import is_run
from cliptrans_jax.runs.run_data import feature_side
from cliptrans_jax.stages import EVALUATE, FREEZES, PIPELINE, STAGES, Side, Trains, trains
from cliptrans_jax.translators.table import TRANSLATORS
from common_jax.command_line import unread
from common_jax.config import is_set
from common_jax.optim import idle_optim


def idle(config: Config) -> dict[str, str]:
    """Why a field that is set, and that the stage reads, has no effect given the other fields; by
    field path."""
    found = {path: why for path, why in _without_effect(config) if is_set(config, path)}
    if config.stage != EVALUATE:
        found |= idle_optim(config, pipeline=config.stage == PIPELINE)
    read = READS[config.stage]
    return {path: why for path, why in found.items() if not unread([path], read)}


def warn_of_random_parts(config: Config) -> None:
    """Warns about parts of the translator that a captioning stage freezes although nothing loads
    them."""
    stage, sources = STAGES.get(config.stage), config.sources
    if stage is None or not stage.captioning or sources.model or sources.mbart:
        return
    if parts := FREEZES[config.freeze]:
        logging.warning(
            "stage %r freezes the translator's %s at random values: give config.sources.mbart or "
            "config.sources.model, or config.freeze=nothing to train from scratch",
            config.stage,
            " and ".join(parts),
        )


def seen_in_training(config: Config) -> list[str]:
    """Returns a warning for each field of config.data whose scores are of the training split."""
    if config.stage == EVALUATE:
        return []  # what its model was trained on is not in its config
    found = dict(config.data.trained_on)
    if trains(config.stage) is Trains.TOWERS:
        found.pop("test_split", None)  # it is for translators
    return list(found.values())


def _without_effect(config: Config) -> Iterator[tuple[str, str]]:
    """Yields fields and sections that the other fields switch off, whether set or not, and why."""
    stages = [STAGES[x] for x in config.recipes or [config.stage] if x in STAGES]
    yield from _of_noise(config, captions={stage.captioning for stage in stages})
    yield from _of_sources(config)
    yield from _of_prefix(config)
    for name in config.recipes:
        if STAGES[name].trains is Trains.TOWERS:
            yield f"recipes.{name}.label_smoothing", f"stage {name!r} has no label loss"
    if config.data.source != "emoji":
        why = f"config.data.source={config.data.source!r} draws no emoji"
        yield from ((f"data.{name}", why) for name in ("emoji_size", "emoji_flags"))
    if not config.valid_decode:
        yield "valid_beams", "config.valid_decode=False translates no validation set"
    if config.decode.beams == 1 and config.valid_beams <= 1:
        yield "decode.length_penalty", "one beam compares no hypotheses"
    if not config.tokenizer.is_trained:
        yield "tokenizer.vocab", f"config.tokenizer.kind={config.tokenizer.kind!r} has its own"
    for name in TRANSLATORS:
        if name != config.model.translator and hasattr(config.model, name):
            yield f"model.{name}", f"config.model.translator={config.model.translator!r}"
    if not any(stage.trains is Trains.TOWERS for stage in stages):
        yield "data.bad_share", "a translator needs every picture"


def _of_prefix(config: Config) -> Iterator[tuple[str, str]]:
    mapper, stage = config.model.mapper, STAGES.get(config.stage)
    if not config.has_prefix:
        why = "config.model.mapper.prefix=0 uses no features"
        names = ("kind", "features", "dropout")
        yield from ((f"model.mapper.{name}", why) for name in names)
        names = ("test_side", "keep_text_features", "unfreeze_clip", "model.prefix")
        yield from ((name, why) for name in names)
        return
    if not MAPPERS[mapper.kind].drops:
        yield "model.mapper.dropout", f"config.model.mapper.kind={mapper.kind!r} drops nothing"
    if config.unfreeze_clip:
        yield "keep_text_features", "config.unfreeze_clip=True encodes sentences in every step"
    elif stage is not None and stage.trains is Trains.TRANSLATOR:
        sides = {feature_side(config.apply_parity(), train=train) for train in (True, False)}
        if Side.TEXT not in sides:
            yield "keep_text_features", f"stage {config.stage!r} uses features of pictures only"


def _of_noise(config: Config, *, captions: set[bool]) -> Iterator[tuple[str, str]]:
    noise = config.noise
    if captions == {True}:
        yield from ((f"noise.{x}", "captioning always drops tokens") for x in ("train", "test"))
    elif not (True in captions or noise.train or noise.test):
        yield "noise.mask_prob", "config.noise.train and config.noise.test drop no tokens"
    if config.stage == EVALUATE:
        yield "noise.train", "an evaluation does not train"


def _of_sources(config: Config) -> Iterator[tuple[str, str]]:
    sources = config.sources
    if not (sources.model or sources.mbart):
        yield "sources.fresh", "there is no config.sources.model or config.sources.mbart"
    if sources.leave and not (sources.model and is_run(sources.model)):
        yield "sources.leave", "it is for a run in config.sources.model"
    published = sources.mbart or sources.clip_text or sources.clip_image or sources.siglip
    if not (published or sources.model):
        yield "sources.weights", "there is no published source"
    if sources.siglip or (sources.clip and not sources.clip_text):
        yield "clip_tokenizer", "the towers in config.sources bring their own tokenizer"
