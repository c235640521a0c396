"""The data of a run: corpora, tokenizer, towers, and the inputs of its stage."""

import dataclasses
import functools
import json
import tempfile
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from cliptrans_jax.config import SIDES, Config
from cliptrans_jax.data.corpora import load_corpus
from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.data.examples import choose_examples, default_caption_language
from cliptrans_jax.data.feed import Inputs
from cliptrans_jax.data.framing import Tokenizer, require_fits
from cliptrans_jax.data.tokens import load_tokenizer
from cliptrans_jax.encoders import (
    ImageTower,
    TextTower,
    image_features,
    load_published_image,
    load_published_text,
    text_features,
)
from cliptrans_jax.stages import STAGES, Side, Trains, trains
from cliptrans_jax.towers.table import TEXT_TOWERS, text_tower_of
from common_jax import checkpoint
from common_jax.inputs import steps_per_epoch
from common_jax.workdir import check_input, freeze_stored, holds_results, write_bytes

TOKENIZER = "tokenizer.json"
PUBLISHED = "a folder or a file of weights, or config.sources.fetch=True for a name on the hub"


@dataclasses.dataclass(frozen=True)
class Split:
    """One split as the input of a stage.

    Attributes:
      corpus: texts, pictures, keys.
      inputs: examples with features.
    """

    corpus: Corpus
    inputs: Inputs

    def reference(self, index: int) -> str:
        """The correct translation of example `index`."""
        examples = self.inputs.examples
        return self.corpus.texts[examples.languages[index][1]][examples.rows[index]]

    def source(self, index: int) -> str:
        """The sentence that it translates; in captioning, the caption itself."""
        examples = self.inputs.examples
        return self.corpus.texts[examples.languages[index][0]][examples.rows[index]]


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run's config with its inputs, each loaded on first use.

    Attributes:
      config: after `Config.apply_parity`.
      workdir: folder for the tokenizer, and for features unless config.features is set.
      mesh: devices that compute features.
      known: a tokenizer that need be neither trained nor checked.
    """

    config: Config
    workdir: epath.Path
    mesh: Mesh
    known: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the translation model. A trained one must be that of the runs in
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
                    f"language {language!r} of config.data (it has {known}); take another "
                    f"tokenizer, such as {config.model.architecture.tokenizer!r} or 'trained'"
                )
        sizes = config.model.sizes
        special = {"pad": sizes.pad, "eos": sizes.eos}
        require_fits(tokenizer, vocab=sizes.vocab, special=special, key=config.model.key)
        for name in ("model", "clip"):
            _require_same_tokenizer(config, name, text)
        return tokenizer, text

    def save_tokenizer(self) -> None:
        """Writes a trained tokenizer to the workdir."""
        save_tokenizer(self._tokenizer[1], self.workdir)

    @functools.cached_property
    def text_tower(self) -> TextTower:
        """The text tower of config.sources; raises ValueError if there is none."""
        config = self.config
        if config.sources.clip:
            return load_trained_text(config, self.tokenizer)
        _require(config, "clip_text")
        if config.clip_tokenizer.kind == "trained":
            kinds = " or ".join(
                f"{tower.sentences.tokenizer!r} for {tower.kind!r}" for tower in TEXT_TOWERS
            )
            raise ValueError(
                f"config.clip_tokenizer.kind='trained', and config.sources.clip_text="
                f"{config.sources.clip_text!r} is a published tower, which has a tokenizer of its "
                f"own: set config.clip_tokenizer.kind to {kinds}, and config.clip_tokenizer.path "
                "to its folder"
            )
        _check_published(config, "clip_text")
        return load_published_text(
            config.sources.clip_text,
            config.clip_tokenizer,
            dtype=config.dtype,
            fetch=config.sources.fetch,
            weights=config.sources.weights,
            activation=config.sources.clip_activation,
            base=config.sources.clip_text_base,
        )

    @functools.cached_property
    def image_tower(self) -> ImageTower:
        """The image tower of config.sources; raises ValueError if there is none."""
        config = self.config
        if config.sources.clip:
            return load_trained_image(config)
        _require(config, "clip_image")
        _check_published(config, "clip_image")
        return load_published_image(
            config.sources.clip_image,
            dtype=config.dtype,
            fetch=config.sources.fetch,
            weights=config.sources.weights,
            activation=config.sources.clip_activation,
        )

    def check(self, *, train: bool, towers: bool = True) -> int:
        """Checks all inputs of the stage before anything is computed or written.

        Args:
          train: whether it trains; otherwise it reads the test split only.
          towers: whether to check the towers; False if an earlier stage has yet to train them.

        Returns:
          The number of training examples.

        Raises:
          ValueError, FileNotFoundError: as `load`.
        """
        config, sides, count = self.config, {self._side(train=False)}, 0
        if train:
            sides.add(self._side(train=True))
            corpus = self._corpus(config.data.train_split, self._side(train=True))
            count = sum(len(corpus.rows_with(pair)) for pair in _pairs(config))
            steps_per_epoch(count, config.optim.batch)
            self._corpus(config.data.valid_split, self._side(train=False))
        self._corpus(config.data.test_split, self._side(train=False))
        if not config.has_prefix or not towers:
            return count
        for side in sides:
            tower = self.image_tower if side is Side.IMAGE else self.text_tower
            width = tower.config.features
            if width != config.model.mapper.features:
                raise ValueError(
                    f"config.model.mapper.features={config.model.mapper.features} must be "
                    f"{width}, the width of the {side.value} tower's features"
                )
        return count

    def load(self, split: str, *, train: bool) -> Split:
        """The inputs of the config's stage from a split.

        Raises:
          ValueError, FileNotFoundError: for data, pictures or towers that are missing or do not
            fit.
        """
        config, side = self.config, self._side(train=train)
        corpus = self._corpus(split, side)
        tokens = {
            language: self.tokenizer.encode(texts, language)
            for language, texts in corpus.texts.items()
        }
        several = config.all_languages and train
        examples = choose_examples(
            STAGES[config.stage],
            tokens,
            pair=config.data.pair,
            train=train,
            noise=config.noise,
            side=side,
            caption_language=caption_language(config),
            all_languages=several,
        )
        if corpus.sparse:
            examples = examples.of_rows_with_sentences(corpus)
        return Split(corpus, self._inputs(corpus, examples))

    def _side(self, *, train: bool) -> Side:
        return feature_side(self.config, train=train)

    def _corpus(self, split: str, side: Side) -> Corpus:
        config = self.config
        pictures = config.has_prefix and side is Side.IMAGE
        corpus = load_corpus(config.data, split, config.data.pair, with_images=pictures)
        if len(corpus) == 0:
            raise ValueError(f"{corpus.name} is empty")
        corpus.require_sentences(used_languages(config), reader=f"stage {config.stage!r}")
        for pair in _pairs(config):
            if not corpus.rows_with(pair):
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
        if config.encodes_texts and examples.side is Side.TEXT:
            tower = self.text_tower
            tokens = {
                language: tower.tokenizer.encode(corpus.texts[language], None)
                for language in examples.read
            }
            return Inputs(examples, None, examples.of_source(tokens), *framed, tower.longest)
        folder = epath.Path(config.features) if config.features else self.workdir / "features"
        place = {"folder": folder, "mesh": self.mesh}
        images, texts = None, {}
        if examples.side is Side.IMAGE:
            workers = config.data.workers
            images = image_features(self.image_tower, corpus, **place, workers=workers)
        else:
            for language in examples.read:
                texts[language] = text_features(self.text_tower, corpus, language, **place)
        return Inputs(examples, examples.features(images, texts), None, *framed)


def feature_side(config: Config, *, train: bool) -> Side:
    """The side that features are computed from."""
    stage = STAGES[config.stage]
    return stage.train if train else SIDES[config.test_side] or stage.test


def encodes_texts(config: Config) -> bool:
    """True if the model runs the text tower, in training or in evaluation."""
    sides = {feature_side(config, train=train) for train in (True, False)}
    return config.encodes_texts and (config.unfreeze_clip or Side.TEXT in sides)


def describe_text(config: Config) -> TextTower:
    """The text tower without weights and tokenizer: with the sizes of config.clip.text if stage
    "clip" trains it, else those of M-CLIP or CLIP by config.clip_tokenizer."""
    if config.sources.clip or config.clip_tokenizer.kind == "trained":
        sizes = config.clip.text
    else:
        sizes = text_tower_of(config.clip_tokenizer.kind).config()
    return TextTower.described(sizes, config.dtype)


def caption_language(config: Config) -> str:
    """The language of captions; with config.all_languages the one to evaluate."""
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


def _pairs(config: Config) -> list[tuple[str, str]]:
    """The languages of encoder and decoder in each kind of example that a stage trains."""
    if STAGES[config.stage].captioning:
        return [(language, language) for language in used_languages(config)]
    return [config.data.pair]


def check_weights(config: Config) -> None:
    """Raises FileNotFoundError if config.sources.model or .mbart is set but missing."""
    source = config.sources.model
    path = epath.Path(source)
    # A file NAME.pth may be split into NAME_1.pth, NAME_2.pth, ...
    if not source or not path.with_name(f"{path.stem}_1{path.suffix}").is_file():
        check_input("config.sources.model", source, "a workdir, or a released checkpoint")
    _check_published(config, "mbart")


def train_tokenizer(config: Config, workdir: epath.Path) -> tuple[Tokenizer, str]:
    """The translation model's tokenizer, and the content of its file if it is trained.

    If the workdir has results, its tokenizer is loaded; else one is trained, but not written yet.

    Raises:
      ValueError: for more tokens than the translator's vocabulary.
    """
    languages, sentences = config.known_languages, None
    if config.tokenizer.kind == "trained":
        corpus = load_corpus(config.data, config.data.train_split, languages)
        sentences = [text for language in languages for text in corpus.texts[language]]
    cut = dataclasses.replace(config.tokenizer, max_length=config.sentence_limit)
    with tempfile.TemporaryDirectory() as folder:
        path = workdir / TOKENIZER
        resumes = path.exists() and holds_results(workdir)
        path = path if resumes else epath.Path(folder) / TOKENIZER
        tokenizer = load_tokenizer(cut, sentences=sentences, languages=languages, path=path)
        text = path.read_text() if sentences is not None else ""
    vocab = config.model.sizes.vocab
    require_fits(tokenizer, vocab=vocab, special={}, key=config.model.key)
    return tokenizer, text


def save_tokenizer(text: str, workdir: epath.Path) -> None:
    """Writes the file of a trained tokenizer atomically, unless it exists with this content."""
    path = workdir / TOKENIZER
    if not text or jax.process_index() or (path.exists() and path.read_text() == text):
        return
    workdir.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def _require_same_tokenizer(config: Config, name: str, text: str) -> None:
    """Raises ValueError if a run in config.sources has another tokenizer.

    Args:
      name: field of `config.sources`.
      text: content of this run's tokenizer file; "" for a published tokenizer.
    """
    source = getattr(config.sources, name)
    try:
        step = checkpoint.find_step(source) if source else None
    except FileNotFoundError:  # raised again when weights are loaded
        return
    if step is None:
        return
    kind = (checkpoint.load_config(step).get("tokenizer") or {}).get("kind")
    if kind not in (None, config.tokenizer.kind):
        raise ValueError(
            f"config.sources.{name}={source!r} is a run with config.tokenizer.kind={kind!r}, whose "
            f"ids mean other words than those of config.tokenizer.kind={config.tokenizer.kind!r}; "
            "give the config.tokenizer of that run"
        )
    other = step.parent.parent / TOKENIZER
    if text and other.exists() and other.read_text() != text:
        raise ValueError(
            f"config.sources.{name}: {other} is another tokenizer than the one for this config; "
            "give the config.data, config.languages and config.tokenizer of that run"
        )


def load_trained_text(config: Config, tokenizer: Tokenizer) -> TextTower:
    """The text tower of a run of stage "clip"."""
    trained = _clip_config(config)
    sizes = trained.clip.text
    special = {"pad": sizes.pad}
    require_fits(tokenizer, vocab=sizes.vocab, special=special, key="config.clip.text")
    params = _host(checkpoint.load(config.sources.clip, subtree="clip/text"))
    return TextTower(trained.clip.text, params, tokenizer, config.dtype)


def load_trained_image(config: Config) -> ImageTower:
    """The image tower of a run of stage "clip"."""
    trained = _clip_config(config)
    params = _host(checkpoint.load(config.sources.clip, subtree="clip/image"))
    return ImageTower(trained.clip.image, params, config.dtype)


def _clip_config(config: Config) -> Config:
    run_config = checkpoint.load_config(config.sources.clip)
    if trains(run_config.get("stage")) is not Trains.TOWERS:
        raise ValueError(
            f"config.sources.clip={config.sources.clip!r} is a run of stage "
            f"{json.dumps(run_config.get('stage'))}, not of 'clip'"
        )
    return freeze_stored(Config, run_config, config.sources.clip)


def _host(params: Any) -> Any:
    return jax.tree.map(jax.device_get, params)


def _require(config: Config, name: str) -> None:
    if not getattr(config.sources, name):
        raise ValueError(
            f"stage {config.stage!r} with config.model.mapper.prefix="
            f"{config.model.mapper.prefix} needs features: give config.sources.{name}, the folder "
            "of a published tower, or config.sources.clip, a run of stage 'clip'"
        )


def _check_published(config: Config, name: str) -> None:
    if not config.sources.fetch:
        check_input(f"config.sources.{name}", getattr(config.sources, name), PUBLISHED)
