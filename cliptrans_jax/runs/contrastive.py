"""Stage "clip": trains a small M-CLIP on pictures and their names in all languages, for runs
without a published one; or only its image tower, against a frozen published text tower."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cliptrans_jax.config import Config
from cliptrans_jax.contrastive.table import CONTRASTIVE
from cliptrans_jax.data.corpora import load_corpus
from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.data.pictures import augment_picture, prepare_picture
from cliptrans_jax.data.tokenizers.framing import Tokenizer, require_fits
from cliptrans_jax.encoders import TextTower, text_features
from cliptrans_jax.evaluators.evaluator import evaluate_all
from cliptrans_jax.evaluators.retrieval import PairSet
from cliptrans_jax.evaluators.table import evaluators_of
from cliptrans_jax.models.rules import rules_below
from cliptrans_jax.runs.run_data import RunData, features_folder
from cliptrans_jax.runs.run_tokenizer import save_tokenizer, train_tokenizer
from cliptrans_jax.runs.text_side import text_side
from cliptrans_jax.towers.table import tower_of
from common_jax import hosts, loop
from common_jax.inputs import eval_batches, steps_per_epoch, train_batches
from common_jax.inputs.ragged import lengths_of
from common_jax.mesh import Rules
from common_jax.step import Evaluate, Programs
from common_jax.task import Task
from common_jax.workdir import refuse_other_config


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the towers and the learned scalars of the loss, which are saved under "clip".

    With config.clip.lock_text it trains and saves only the image tower, against the features of the
    text tower in config.sources.clip_text.

    Returns:
      The run's result. Its accuracy is for retrieval within a batch, of pictures by their names in
      the first language and of names by pictures.
    """
    refuse_other_config(workdir, config)
    _check_batch(config)
    train, evaluated, text, tower = _load(config, workdir, mesh)
    optim, length = config.optim, _longest(train, evaluated)
    task = describe(config, steps=steps_per_epoch(len(train), optim.batch), length=length)
    # By default config.run.best is BLEU, which only translators have; `READS` lacks it here.
    run_config = dataclasses.replace(config.run, best=None)
    loop.check(task, run_config, optim, seed=config.seed, mesh=mesh)
    save_tokenizer(text, workdir)  # written before anything else
    if tower is not None:
        encode = functools.partial(
            _Pairs.encoded, tower=tower, folder=features_folder(config, workdir), mesh=mesh
        )
        train, evaluated = encode(train), {name: encode(one) for name, one in evaluated.items()}
        del tower, encode  # otherwise its weights would stay in memory for the whole run

    def batches(start: int) -> Iterator[Mapping[str, np.ndarray]]:
        return train_batches(
            train,
            transform=functools.partial(_augment, config, length),
            seed=config.seed,
            batch=optim.batch,
            start_step=start,
            workers=config.data.workers,
            bad_share=config.data.bad_share,
            shard=hosts.shard(),
            report_path=workdir / "bad_examples.jsonl",
        )

    programs = Programs()

    def evaluate(pairs: _Pairs) -> Evaluate:
        chosen = PairSet(
            embed=functools.partial(_embed, config, dropout=None),
            batches=functools.partial(
                eval_batches,
                pairs,
                transform=functools.partial(_prepare, config, length),
                # A small set is a batch of its own. Accuracy depends on the batch: it is the share
                # of pairs found among those of their batch.
                batch=min(optim.micro_batch, -(-len(pairs) // mesh.size) * mesh.size),
                workers=config.data.workers,
                bad_share=config.data.bad_share,
                shard=hosts.shard(),
            ),
            mesh=mesh,
            seed=config.seed,
            programs=programs,
        )
        return evaluate_all([one.make(chosen) for one in evaluators_of(config.stage)])

    evaluators = {name: evaluate(pairs) for name, pairs in evaluated.items()}
    task = dataclasses.replace(task, batches=batches, evaluators=evaluators)
    return loop.train(
        task,
        run_config,
        optim,
        seed=config.seed,
        workdir=workdir,
        mesh=mesh,
        config=config,
    )


def check(config: Config, workdir: epath.Path, mesh: Mesh, *, key: str) -> None:
    """Checks the stage; writes nothing. `key` is the path of its recipe, for messages.

    Raises:
      ValueError, FileNotFoundError: as `run`.
    """
    _check_batch(config, key)
    train, evaluated, _, _ = _load(config, workdir, mesh)
    steps = steps_per_epoch(len(train), config.optim.batch)
    task = describe(config, steps=steps, length=_longest(train, evaluated))
    run = dataclasses.replace(config.run, best=None)
    loop.check(task, run, config.optim, seed=config.seed, mesh=mesh, key=key)


def _check_batch(config: Config, key: str = "config") -> None:
    """Raises ValueError for a batch too small for the loss, and for config.optim.accumulate > 1:
    the average over micro-batches would be another loss, in which a pair has only those of its
    micro-batch as negatives."""
    loss = config.clip.loss
    if config.optim.batch < CONTRASTIVE[loss].smallest:
        raise ValueError(
            f"{key}.optim.batch={config.optim.batch}: config.clip.loss={loss!r} contrasts each "
            "pair with the others of its batch, and without any it is always 0. Give at least "
            f"{CONTRASTIVE[loss].smallest}"
        )
    if config.optim.accumulate > 1:
        raise ValueError(
            f"{key}.optim.accumulate={config.optim.accumulate}: stage 'clip' contrasts each pair "
            "with all others of a batch, which must not be split. Set it to 1; to save memory, "
            f"lower {key}.optim.batch or use more devices"
        )


def _load(
    config: Config, workdir: epath.Path, mesh: Mesh
) -> tuple["_Pairs", dict[str, "_Pairs"], str, TextTower | None]:
    """Loads and checks the pairs for training and, by name, for each evaluation. Also returns the
    content of the tokenizer's file, and the text tower that stays frozen, if any."""
    tower, text = None, ""
    if config.clip.lock_text:
        tower = RunData(config, workdir, mesh).text_tower
        tokenizer = tower.tokenizer
    else:
        tokenizer, text = train_tokenizer(config, workdir)
    train = _Pairs.of(config, config.data.train_split, tokenizer)
    splits = {"val": config.data.valid_split, **config.data.further}
    evaluated = {name: _Pairs.of(config, split, tokenizer) for name, split in splits.items()}
    # Hosts with other files would train on other sentences without an error.
    for pairs in (train, *evaluated.values()):
        rows = (row.tobytes() for ids in pairs.names.values() for row in ids)
        hosts.require_same(pairs.corpus.name, text, *rows)
    if tower is None:
        _check(config, tokenizer, _longest(train, evaluated))
    elif tower.config.features != config.clip.image.features:
        raise ValueError(
            f"config.clip.image.features={config.clip.image.features} must be "
            f"{tower.config.features}, the width of the features of "
            f"config.sources.clip_text={config.sources.clip_text!r}: both towers share one space"
        )
    return train, evaluated, text, tower


def _longest(train: "_Pairs", evaluated: Mapping[str, "_Pairs"]) -> int:
    return max(pairs.longest for pairs in (train, *evaluated.values()))


def describe(config: Config, *, steps: int, length: int) -> Task:
    """The task without data, with `steps` per epoch and sentences of `length` tokens."""
    side, batch = config.clip.image.image, config.optim.micro_batch
    texts = text_side(config).shapes(config, batch, length)
    return Task(
        phase="clip",
        init=functools.partial(init, config),
        rules=partition_rules(config),
        trainable=".*",  # a text tower that stays frozen is no parameter
        streams=("dropout",),
        shown=(
            "train/loss",
            "train/skipped",
            *(f"{name}/accuracy" for name in ("val", *config.data.further)),
        ),
        loss=functools.partial(_loss, config),
        batch={"image": jax.ShapeDtypeStruct((batch, side, side, 3), np.float32), **texts},
        steps_per_epoch=steps,
    )


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    """Initial parameters of the trained towers and of the loss."""
    sizes = config.clip.image
    of_text, of_image = jax.random.split(key)  # of_image must not depend on lock_text
    params = {
        **text_side(config).init(config, of_text),
        "image": tower_of(sizes).init(sizes, config.dtype, of_image),
    }
    return {"clip": {**params, **CONTRASTIVE[config.clip.loss].init(config.clip.scale)}}


def _embed(
    config: Config, params: Any, batch: Mapping[str, jax.Array], dropout: jax.Array | None
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """The features of texts and of images."""
    image, tree = config.clip.image, params["clip"]
    texts = text_side(config).features(config, tree, batch, dropout)
    images = tower_of(image).apply(image, config.dtype, tree["image"], batch["image"])
    return texts, images


def _loss(
    config: Config, params, helpers, batch, rngs, step
) -> tuple[Float[Array, ""], Mapping[str, Float[Array, ""]]]:
    # Both are of the global batch, so negatives come from all devices.
    texts, images = _embed(config, params, batch, rngs["dropout"])
    objective = CONTRASTIVE[config.clip.loss]
    learned = objective.limit(params["clip"])
    return objective.loss(texts, images, **learned), objective.metrics(learned)


def _check(config: Config, tokenizer: Tokenizer, length: int) -> None:
    text, image = config.clip.text, config.clip.image
    if text.features != image.features:
        raise ValueError(
            f"config.clip.text.features={text.features} must be config.clip.image.features="
            f"{image.features}: both towers share one space"
        )
    require_fits(tokenizer, vocab=text.vocab, special={"pad": text.pad}, key="config.clip.text")
    if length > text.longest:
        raise ValueError(
            f"config.clip.text.positions={text.positions} leaves room for {text.longest} tokens, "
            f"but the longest sentence has {length}; raise it, or lower "
            "config.tokenizer.max_length"
        )


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Pictures with their names by language, as framed ids or as features of a frozen tower.
    `arrays` is None, so that they are read one by one."""

    corpus: Corpus
    names: Mapping[str, Sequence[np.ndarray]]

    arrays = None

    @classmethod
    def of(cls, config: Config, split: str, tokenizer: Tokenizer) -> "_Pairs":
        languages = config.known_languages
        corpus = load_corpus(config.data, split, languages, with_images=True)
        corpus.require_sentences(languages, reader="stage 'clip' with config.languages")
        corpus.require_images()
        ids = {name: tokenizer.encode(corpus.texts[name], None) for name in languages}
        return cls(corpus, ids)

    def encoded(self, *, tower: TextTower, folder: epath.Path, mesh: Mesh) -> "_Pairs":
        features = {
            language: text_features(tower, self.corpus, language, folder=folder, mesh=mesh)
            for language in self.names
        }
        return dataclasses.replace(self, names=features)

    @property
    def longest(self) -> int:
        return max(int(lengths_of(names).max()) for names in self.names.values())

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, index: int) -> dict[str, Any]:
        texts, sparse = self.corpus.texts, self.corpus.sparse
        # In a sparse corpus, an empty name is a missing one; elsewhere it is a name.
        names = [
            names[index]
            for language, names in self.names.items()
            if texts[language][index] or not sparse
        ]
        return {"image": self.corpus.images[index], "names": names}


def _augment(config: Config, length: int, example: dict, generator: np.random.Generator) -> dict:
    # One language per epoch and picture, so that an epoch sees every picture once.
    name = example["names"][generator.integers(len(example["names"]))]
    picture = augment_picture(example["image"], config.augment, generator)
    return _finish(config, length, picture, name)


def _prepare(config: Config, length: int, example: dict) -> dict:
    # No draw, so that evaluations can be compared: the first language that has a name.
    return _finish(config, length, example["image"], example["names"][0])


def _finish(config: Config, length: int, picture: np.ndarray, name: np.ndarray) -> dict:
    tower = config.clip.image
    image = prepare_picture(picture, tower.image, tower_of(tower).pictures)
    return {"image": image, **text_side(config).example(config, length, name)}


def partition_rules(config: Config) -> Rules:
    """Partition rules of the trained towers and of the learned scalars of the loss."""
    return (
        *((rf"^/clip/{name}$", P()) for name in CONTRASTIVE[config.clip.loss].learned),
        *text_side(config).rules(config),
        *rules_below("image", tower_of(config.clip.image).rules),
    )
