"""The towers that a run takes features from: published ones, or those that a run of stage "clip"
trained."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from typing import Any

import jax

from cliptrans_jax import pretrained
from cliptrans_jax.config import Config
from cliptrans_jax.data.tokenizers.framing import Tokenizer, require_fits
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.encoders import ImageTower, TextTower, published_text
from cliptrans_jax.runs.initial_weights import check_published, has_published_translator
from cliptrans_jax.stages import Trains, trains
from cliptrans_jax.towers import siglip
from cliptrans_jax.towers.table import IMAGE_TOWERS, TEXT_TOWERS, text_tower_of
from cliptrans_jax.towers.tower import Tower
from common_jax import checkpoint
from common_jax.config import renamed
from common_jax.weights.table import Pretrained
from common_jax.workdir import freeze_stored

# In messages about a text tower and its tokenizer, names the flag that sets both.
SIGLIP_KEYS = {
    "config.clip_tokenizer.path": "config.sources.siglip",
    "config.sources.clip_text": "config.sources.siglip",
}


def has_trained_text(config: Config) -> bool:
    """True if config.sources.clip is a run that trained a text tower, so that features of sentences
    come from it."""
    return bool(config.sources.clip) and not _clip_run(config).clip.lock_text


def load_trained_text(config: Config, tokenizer: Tokenizer) -> TextTower:
    """The text tower that the run in config.sources.clip trained; `tokenizer` is the translator's,
    which may allow longer sentences than the tower."""
    sizes, params = load_trained(config, "text")
    cut = dataclasses.replace(tokenizer, limit=min(tokenizer.limit, sizes.longest))
    require_fits(cut, vocab=sizes.vocab, special={"pad": sizes.pad}, key="config.clip.text")
    return TextTower(sizes, params, cut, config.dtype)


def load_published_text(config: Config) -> TextTower:
    """The text tower in config.sources.siglip or config.sources.clip_text, with its tokenizer;
    raises ValueError if there is none."""
    sources = config.sources
    if sources.siglip:
        published = _load_published(config, "siglip", (siglip.TEXT,))
        with renamed(SIGLIP_KEYS):
            return published_text(published, text_tokenizer(config), dtype=config.dtype)
    if sources.clip_text:
        text_tower_of(config.clip_tokenizer.kind)  # raises ValueError if no tower has it
    if sources.clip:
        _warn_of_another_tower(config)
    published = _load_published(config, "clip_text", TEXT_TOWERS, base=sources.clip_text_base)
    return published_text(published, config.clip_tokenizer, dtype=config.dtype)


def load_image(config: Config) -> ImageTower:
    """The image tower of config.sources; raises ValueError if there is none."""
    if config.sources.clip:
        return ImageTower(*load_trained(config, "image"), config.dtype)
    if config.sources.siglip:
        published = _load_published(config, "siglip", (siglip.VISION,))
    else:
        published = _load_published(config, "clip_image", IMAGE_TOWERS)
    return ImageTower(published.config, published.params, config.dtype)


def _load_published(
    config: Config, name: str, towers: Sequence[Tower], base: str = ""
) -> Pretrained:
    """Loads one of these towers from the source in config.sources.`name`."""
    sources = config.sources
    if not getattr(sources, name):
        raise ValueError(
            f"stage {config.stage!r} with config.model.mapper.prefix="
            f"{config.model.mapper.prefix} needs features: give config.sources.{name}, the "
            "folder of a published tower; config.sources.siglip, one with both towers; or "
            "config.sources.clip, a run of stage 'clip'"
        )
    check_published(config, name)
    # config.sources.weights then names weights in the translator's file, not in the tower's.
    return pretrained.load(
        getattr(sources, name),
        # Each kind once: M-CLIP's two text towers have the same.
        kind=tuple(dict.fromkeys(tower.kind for tower in towers if tower.kind)),
        fetch=sources.fetch,
        weights="" if has_published_translator(config) else sources.weights,
        activation=sources.clip_activation,
        base=base,
    )


def describe_text(config: Config) -> TextTower:
    """The text tower without weights and tokenizer. It has the sizes in config.clip.text if stage
    "clip" trains it, else the default sizes of the tower in config.sources.siglip or in
    config.sources.clip_text, whose kind follows from its tokenizer."""
    trained = config.sources.clip and not config.sources.clip_text
    if config.sources.siglip:
        sizes = siglip.TEXT.config()
    elif trained or config.clip_tokenizer.is_trained:
        sizes = config.clip.text
    else:
        sizes = text_tower_of(config.clip_tokenizer.kind).config()
    return TextTower.described(sizes, config.dtype)


def text_tokenizer(config: Config) -> TokenizerConfig:
    """The tokenizer of a published text tower; a SigLIP has it in its own folder."""
    sources = config.sources
    if not sources.siglip:
        return config.clip_tokenizer
    folder = pretrained.find(sources.siglip, fetch=sources.fetch)
    return TokenizerConfig(siglip.TEXT.sentences.tokenizer, str(folder))


def load_trained(config: Config, name: str) -> tuple[Any, Any]:
    """Sizes and parameters of a tower, "text" or "image", from a run of stage "clip".

    A tower that stays frozen is the run's result, the average of its parameters if there is one, as
    in its own evaluation. One that keeps training starts from the parameters themselves.
    """
    source, average = config.sources.clip, not (name == "text" and config.unfreeze_clip)
    sizes = getattr(_clip_run(config).clip, name)
    checkpoint.warn_if_unfinished(source)
    step = checkpoint.common_step(source)
    if average and checkpoint.has_average(step):
        logging.info("%s: the average of its %s tower is loaded, not the last one", step, name)
    params = checkpoint.load(step, subtree=f"clip/{name}", average=average)
    # To the host, like published towers, which move to the devices when they are used.
    return sizes, jax.device_get(params)


def _clip_run(config: Config) -> Config:
    """The config of the run in config.sources.clip.

    Raises:
      FileNotFoundError: if it has no finished checkpoint.
      ValueError: if it is not a run of stage "clip"; if config.sources.clip_text is given although
        the run trained both towers, or not given although the run has config.clip.lock_text.
    """
    source = config.sources.clip
    with checkpoint.naming_field("config.sources.clip", source):
        run_config = checkpoint.load_config(source)
    if trains(run_config.get("stage")) is not Trains.TOWERS:
        raise ValueError(
            f"config.sources.clip={source!r} is a run of stage "
            f"{json.dumps(run_config.get('stage'))}, not of 'clip'"
        )
    run, given = freeze_stored(Config, run_config, source), config.sources.clip_text
    if run.clip.lock_text and not given:
        raise ValueError(
            f"config.sources.clip={source!r} is a run with config.clip.lock_text, which trained no "
            f"text tower: give config.sources.clip_text={run.sources.clip_text!r}, and "
            f"config.clip_tokenizer with kind={run.clip_tokenizer.kind!r} and "
            f"path={run.clip_tokenizer.path!r}"
        )
    if given and not run.clip.lock_text:
        raise ValueError(
            f"config.sources.clip={source!r} is a run that trained both towers, and features of "
            f"config.sources.clip_text={given!r} are from another space; leave one out"
        )
    return run


def _warn_of_another_tower(config: Config) -> None:
    """Warns if the run in config.sources.clip was trained against another text tower."""
    given, trained = config.sources.clip_text, _clip_run(config).sources.clip_text
    if checkpoint.absolute(given) != checkpoint.absolute(trained):
        logging.warning(
            "config.sources.clip_text=%r is not the text tower that the run in "
            "config.sources.clip=%r was trained against, %r; unless both have the same weights, "
            "their features are from different spaces",
            *(given, config.sources.clip, trained),
        )
