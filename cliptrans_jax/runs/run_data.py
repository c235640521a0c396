"""The data of a run: corpora, tokenizer, towers, and the inputs of its stage."""

import dataclasses
import functools
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from cliptrans_jax.config import SIDES, Config
from cliptrans_jax.data.corpora import load_corpus
from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.data.examples import choose_examples, default_caption_language
from cliptrans_jax.data.feed import Inputs
from cliptrans_jax.data.tokenizers.framing import PADDING, Tokenizer, require_fits
from cliptrans_jax.data.tokenizers.tokens import encode_corpus
from cliptrans_jax.encoders import (
    ImageTower,
    TextTower,
    image_features,
    text_features,
)
from cliptrans_jax.runs.initial_weights import has_published_translator
from cliptrans_jax.runs.run_tokenizer import (
    require_same_tokenizer,
    require_tokenizer_of_weights,
    save_tokenizer,
    train_tokenizer,
)
from cliptrans_jax.runs.run_towers import (
    has_trained_text,
    load_image,
    load_published_text,
    load_trained_text,
)
from cliptrans_jax.stages import STAGES, Side
from common_jax import hosts
from common_jax.inputs import steps_per_epoch
from common_jax.weights.memory import give_back


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
        published = has_published_translator(config) and not config.tokenizer.is_trained
        spare, key = PADDING if published else None, config.model.key
        require_fits(tokenizer, vocab=sizes.vocab, special=special, key=key, spare=spare)
        for name in ("model", "clip"):
            require_same_tokenizer(config, name, text)
        require_tokenizer_of_weights(config, text)
        return tokenizer, text

    def save_tokenizer(self) -> None:
        """Writes a trained tokenizer to the workdir."""
        save_tokenizer(self._tokenizer[1], self.workdir)

    @functools.cached_property
    def text_tower(self) -> TextTower:
        """The text tower of config.sources; raises ValueError if there is none."""
        if has_trained_text(self.config):
            return load_trained_text(self.config, self.tokenizer)
        return load_published_text(self.config)

    @functools.cached_property
    def image_tower(self) -> ImageTower:
        """The image tower of config.sources; raises ValueError if there is none."""
        return load_image(self.config)

    def release_towers(self) -> None:
        """Frees the towers, except a text tower that the model runs. Later uses load them again."""
        # `cached_property` keeps its value in the instance's dict, even of a frozen dataclass.
        if not encodes_texts(self.config):
            vars(self).pop("text_tower", None)
        vars(self).pop("image_tower", None)
        give_back()

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
        corpus.require_sentences(used_languages(config), reader=f"stage {config.stage!r}")
        for pair in pairs_of(config):
            if not len(corpus.rows_with(pair)):
                raise ValueError(
                    f"{corpus.name} has no example with sentences in both {' and '.join(pair)}; "
                    "correct config.data.source_language or config.data.target_language"
                )
        if pictures:
            corpus.require_all_images()
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
