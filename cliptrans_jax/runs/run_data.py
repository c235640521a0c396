"""The data of a run: corpora, tokenizer, towers, and the inputs of its stage."""

import dataclasses
import functools
import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cliptrans_jax import pretrained
from cliptrans_jax.config import SIDES, Config
from cliptrans_jax.data.corpora import load_corpus
from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.data.examples import choose_examples, default_caption_language
from cliptrans_jax.data.feed import Inputs
from cliptrans_jax.data.tokenizers.framing import PADDING, Tokenizer, require_fits
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, encode_corpus
from cliptrans_jax.encoders import (
    ImageTower,
    TextTower,
    image_features,
    published_text,
    text_features,
)
from cliptrans_jax.runs.run_tokenizer import (
    require_same_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from cliptrans_jax.stages import STAGES, Side, Trains, trains
from cliptrans_jax.towers import siglip
from cliptrans_jax.towers.table import IMAGE_TOWERS, TEXT_TOWERS, text_tower_of
from cliptrans_jax.towers.tower import Tower
from common_jax import checkpoint, hosts
from common_jax.config import renamed
from common_jax.inputs import steps_per_epoch
from common_jax.weights.memory import give_back
from common_jax.weights.table import Pretrained
from common_jax.workdir import check_input, freeze_stored

PUBLISHED = "a folder or a file of weights, or config.sources.fetch=True for a name on the hub"
# In messages about a text tower and its tokenizer, names the flag that sets both.
SIGLIP_KEYS = {
    "config.clip_tokenizer.path": "config.sources.siglip",
    "config.sources.clip_text": "config.sources.siglip",
}


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, as a stage reads it."""

    corpus: Corpus
    inputs: Inputs

    def source(self, index: int) -> str:
        """The sentence of example `index`; in captioning, the caption itself."""
        return self._texts(index)[0]

    def reference(self, index: int) -> str:
        """The reference translation of example `index`."""
        return self._texts(index)[1]

    def _texts(self, index: int) -> list[str]:
        examples = self.inputs.examples
        row = examples.rows[index]
        return [self.corpus.texts[language][row] for language in examples.languages[index]]


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run's config and inputs; inputs are loaded on first use.

    Attributes:
      config: the config, after `Config.apply_parity`.
      workdir: folder for the tokenizer, and for features unless config.features is set.
      known: a tokenizer to use as is, which is neither trained nor checked.
    """

    config: Config
    workdir: epath.Path
    mesh: Mesh
    known: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the translation model. A trained one must be the same as in the runs in
        config.sources."""
        return self._tokenizer[0] if self.known is None else self.known

    @functools.cached_property
    def _tokenizer(self) -> tuple[Tokenizer, str]:
        config = self.config
        tokenizer, text = train_tokenizer(config, self.workdir)
        for language in config.data.pair:
            if language not in tokenizer.languages:
                known = ", ".join(tokenizer.languages) or "none, as an encoder's has"
                raise ValueError(
                    f"config.tokenizer.kind={config.tokenizer.kind!r} has no token for the "
                    f"language {language!r} of config.data (it has {known}); use another "
                    f"tokenizer, such as {config.model.architecture.tokenizer!r} or 'trained'"
                )
        sizes = config.model.sizes
        special = {"pad": sizes.pad, "eos": sizes.eos}
        published = _has_published_translator(config) and not config.tokenizer.is_trained
        spare, key = PADDING if published else None, config.model.key
        require_fits(tokenizer, vocab=sizes.vocab, special=special, key=key, spare=spare)
        for name in ("model", "clip"):
            require_same_tokenizer(config, name, text)
        return tokenizer, text

    def save_tokenizer(self) -> None:
        """Writes a trained tokenizer to the workdir."""
        save_tokenizer(self._tokenizer[1], self.workdir)

    @functools.cached_property
    def text_tower(self) -> TextTower:
        """The text tower of config.sources; raises ValueError if there is none."""
        config, sources = self.config, self.config.sources
        if sources.clip and not _clip_run(config).clip.lock_text:
            sizes, params = load_trained(config, "text")
            # The translator's tokenizer, which may allow longer sentences than the tower.
            limit = min(self.tokenizer.limit, sizes.longest)
            tokenizer = dataclasses.replace(self.tokenizer, limit=limit)
            special = {"pad": sizes.pad}
            require_fits(tokenizer, vocab=sizes.vocab, special=special, key="config.clip.text")
            return TextTower(sizes, params, tokenizer, config.dtype)
        if sources.siglip:
            published = self._load_published("siglip", (siglip.TEXT,))
            with renamed(SIGLIP_KEYS):
                return published_text(published, text_tokenizer(config), dtype=config.dtype)
        if sources.clip_text:
            text_tower_of(config.clip_tokenizer.kind)  # raises ValueError if no tower has it
        if sources.clip:
            _warn_of_another_tower(config)
        published = self._load_published("clip_text", TEXT_TOWERS, base=sources.clip_text_base)
        return published_text(published, config.clip_tokenizer, dtype=config.dtype)

    @functools.cached_property
    def image_tower(self) -> ImageTower:
        """The image tower of config.sources; raises ValueError if there is none."""
        config = self.config
        if config.sources.clip:
            return ImageTower(*load_trained(config, "image"), config.dtype)
        if config.sources.siglip:
            published = self._load_published("siglip", (siglip.VISION,))
        else:
            published = self._load_published("clip_image", IMAGE_TOWERS)
        return ImageTower(published.config, published.params, config.dtype)

    def release_towers(self) -> None:
        """Frees the towers, except a text tower that the model runs. Later uses load them again."""
        # `cached_property` keeps its value in the instance's dict, even of a frozen dataclass.
        if not encodes_texts(self.config):
            vars(self).pop("text_tower", None)
        vars(self).pop("image_tower", None)
        give_back()

    def _load_published(self, name: str, towers: Sequence[Tower], base: str = "") -> Pretrained:
        """Loads one of these towers from the source in config.sources.`name`."""
        config, sources = self.config, self.config.sources
        if not getattr(sources, name):
            raise ValueError(
                f"stage {config.stage!r} with config.model.mapper.prefix="
                f"{config.model.mapper.prefix} needs features: give config.sources.{name}, the "
                "folder of a published tower; config.sources.siglip, one with both towers; or "
                "config.sources.clip, a run of stage 'clip'"
            )
        _check_published(config, name)
        # config.sources.weights then names weights in the translator's file, not in the tower's.
        return pretrained.load(
            getattr(sources, name),
            # Each kind once: M-CLIP's two text towers have the same.
            kind=tuple(dict.fromkeys(tower.kind for tower in towers if tower.kind)),
            fetch=sources.fetch,
            weights="" if _has_published_translator(config) else sources.weights,
            activation=sources.clip_activation,
            base=base,
        )

    def check(self, *, train: bool, towers: bool = True) -> int:
        """Checks all inputs of the stage before anything is computed or written.

        Args:
          train: whether the stage trains; otherwise it only reads the test split.
          towers: whether to check the towers; False if an earlier stage has yet to train them.

        Returns:
          The number of training examples.

        Raises:
          ValueError, FileNotFoundError: as `load`.
        """
        config, count = self.config, 0
        evaluation, training = (feature_side(config, train=x) for x in (False, True))
        if train:
            corpus = self._corpus(config.data.train_split, training)
            count = sum(len(corpus.rows_with(pair)) for pair in pairs_of(config))
            steps_per_epoch(count, config.optim.batch)  # raises ValueError if they fill no batch
            self._corpus(config.data.valid_split, evaluation)
        for split in (config.data.test_split, *config.data.further_tests):
            self._corpus(split, evaluation)
        if not config.has_prefix or not towers:
            return count
        for side in {evaluation, training} if train else {evaluation}:
            tower = self.image_tower if side is Side.IMAGE else self.text_tower
            width = tower.config.features
            if width != config.model.mapper.features:
                raise ValueError(
                    f"config.model.mapper.features={config.model.mapper.features} must be "
                    f"{width}, the width of the {side.value} tower's features"
                )
        return count

    def load(self, split: str, *, train: bool) -> Split:
        """Loads a split as the input of the config's stage.

        Raises:
          ValueError, FileNotFoundError: if data, pictures or towers are missing or do not match.
        """
        config, side = self.config, feature_side(self.config, train=train)
        corpus = self._corpus(split, side)
        folder = features_folder(config, self.workdir)
        # Sources and targets alike are framed with their own language, as in the original.
        tokens = {
            name: encode_corpus(self.tokenizer, corpus, name, frame=name, folder=folder)
            for name in corpus.texts
        }
        arrays = (part for ids in tokens.values() for part in (ids.lengths, ids.flat))
        # Hosts with other files would train on other sentences without an error.
        hosts.require_same(corpus.name, *(np.ascontiguousarray(part).data for part in arrays))
        examples = choose_examples(
            STAGES[config.stage],
            tokens,
            pair=config.data.pair,
            train=train,
            noise=config.noise,
            side=side,
            caption_language=caption_language(config),
            all_languages=config.all_languages and train,
        )
        if corpus.sparse:
            examples = examples.of_rows_with_sentences(corpus)
        return Split(corpus, self._inputs(corpus, examples))

    def _corpus(self, split: str, side: Side) -> Corpus:
        config = self.config
        # Stages that look at no pictures must run on data without any.
        pictures = config.has_prefix and side is Side.IMAGE
        corpus = load_corpus(config.data, split, config.data.pair, with_images=pictures)
        if len(corpus) == 0:
            raise ValueError(f"{corpus.name} is empty")
        corpus.require_sentences(used_languages(config), reader=f"stage {config.stage!r}")
        for pair in pairs_of(config):
            if not len(corpus.rows_with(pair)):
                raise ValueError(
                    f"{corpus.name} has no example with sentences in both {' and '.join(pair)}; "
                    "correct config.data.source_language or config.data.target_language"
                )
        if pictures:
            corpus.require_images()
        return corpus

    def _inputs(self, corpus: Corpus, examples: Any) -> Inputs:
        config = self.config
        framed = (self.tokenizer.pad, config.sentence_limit)
        if not config.has_prefix:
            return Inputs(examples, None, None, *framed)
        # The step runs the text tower, so it gets ids of the tower's tokenizer instead of features.
        if config.encodes_texts and examples.side is Side.TEXT:
            tower, folder = self.text_tower, features_folder(config, self.workdir)
            tokens = {
                name: encode_corpus(tower.tokenizer, corpus, name, frame=None, folder=folder)
                for name in examples.read
            }
            clip = (tower.tokenizer.pad, tower.longest)
            return Inputs(examples, None, examples.of_source(tokens), *framed, *clip)
        place = {"folder": features_folder(config, self.workdir), "mesh": self.mesh}
        images, texts = None, {}
        if examples.side is Side.IMAGE:
            workers = config.data.workers
            images = image_features(self.image_tower, corpus, **place, workers=workers)
        else:
            texts = {
                name: text_features(self.text_tower, corpus, name, **place)
                for name in examples.read
            }
        return Inputs(examples, examples.features(images, texts), None, *framed)


def features_folder(config: Config, workdir: epath.Path) -> epath.Path:
    """The folder in which features of frozen towers are cached."""
    return epath.Path(config.features).expanduser() if config.features else workdir / "features"


def feature_side(config: Config, *, train: bool) -> Side:
    """The side that features are computed from."""
    stage = STAGES[config.stage]
    return stage.train if train else SIDES[config.test_side] or stage.test


def encodes_texts(config: Config) -> bool:
    """True if the model runs the text tower, in training or in evaluation."""
    sides = {feature_side(config, train=train) for train in (True, False)}
    return config.encodes_texts and (config.unfreeze_clip or Side.TEXT in sides)


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


def caption_language(config: Config) -> str:
    """The language of captions; with config.all_languages, the one to evaluate."""
    return config.caption_language or (
        config.data.target_language
        if config.all_languages
        else default_caption_language(config.data.pair)
    )


def used_languages(config: Config) -> tuple[str, ...]:
    """The languages whose sentences a stage of STAGES reads or writes."""
    if STAGES[config.stage].captioning and not config.all_languages:
        return (caption_language(config),)
    return config.data.pair


def pairs_of(config: Config) -> list[tuple[str, str]]:
    """The languages of encoder and decoder, for each kind of example that a stage trains on."""
    if STAGES[config.stage].captioning:
        return [(language, language) for language in used_languages(config)]
    return [config.data.pair]


def _has_published_translator(config: Config) -> bool:
    """True if the translator's weights are published ones, alone or in a released checkpoint."""
    sources = config.sources
    return bool(sources.mbart or (sources.model and not is_run(sources.model)))


def is_run(source: str) -> bool:
    """True if `source` is a workdir or a step in one, not a released file."""
    try:
        checkpoint.find_step(source)
    except FileNotFoundError:
        return False
    return True


def check_weights(config: Config) -> None:
    """Raises FileNotFoundError if config.sources.model or .mbart is set but missing."""
    source = config.sources.model
    path = epath.Path(source)
    # A file NAME.pth may be split into NAME_1.pth, NAME_2.pth, ...
    if not source or not path.with_name(f"{path.stem}_1{path.suffix}").is_file():
        check_input("config.sources.model", source, "a workdir, or a released checkpoint")
    _check_published(config, "mbart")


def load_trained(config: Config, name: str) -> tuple[Any, Any]:
    """Sizes and parameters of a tower, "text" or "image", from a run of stage "clip".

    Stages continue from the parameters that it trained. A config of stage "clip" itself asks for
    its result, the average if there is one.
    """
    source, average = config.sources.clip, trains(config.stage) is Trains.TOWERS
    sizes = getattr(_clip_run(config).clip, name)
    checkpoint.warn_if_unfinished(source)
    params = checkpoint.load(source, subtree=f"clip/{name}", average=average)
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


def _check_published(config: Config, name: str) -> None:
    if not config.sources.fetch:
        check_input(f"config.sources.{name}", getattr(config.sources, name), PUBLISHED)
