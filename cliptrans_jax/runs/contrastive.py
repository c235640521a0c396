"""Stage "clip": trains a small M-CLIP on pictures and their names in all languages, for runs
without a published one."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from cliptrans_jax.config import Config
from cliptrans_jax.contrastive.table import CONTRASTIVE
from cliptrans_jax.data.corpora import load_corpus
from cliptrans_jax.data.corpus import Corpus
from cliptrans_jax.data.examples import pad
from cliptrans_jax.data.feed import host_shard
from cliptrans_jax.data.framing import Tokenizer, require_fits
from cliptrans_jax.data.pictures import augment_picture, prepare_picture
from cliptrans_jax.evaluators.evaluator import evaluate_all
from cliptrans_jax.evaluators.retrieval import PairSet
from cliptrans_jax.evaluators.table import evaluators_of
from cliptrans_jax.models.rules import rules_below
from cliptrans_jax.runs.run_data import save_tokenizer, train_tokenizer
from cliptrans_jax.towers.table import tower_of
from common_jax import loop
from common_jax.inputs import eval_batches, steps_per_epoch, train_batches
from common_jax.mesh import Rules
from common_jax.step import Evaluate
from common_jax.task import Task
from common_jax.workdir import refuse_other_config


def run(config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains both towers and the learned numbers of the loss, saved under "clip".

    Returns:
      The run's result. Its accuracy is that of retrieving pictures by their names in the first
      language within a batch, and names by pictures.
    """
    refuse_other_config(workdir, config)
    train, evaluated, text = _load(config, workdir)
    optim, length = config.optim, _longest(train, evaluated)
    task = describe(config, steps=steps_per_epoch(len(train), optim.batch), length=length)
    run_config = dataclasses.replace(config.run, best=None)
    loop.check(task, run_config, optim, seed=config.seed, mesh=mesh)
    save_tokenizer(text, workdir)  # the first thing that is written

    def batches(start: int) -> Iterator[Mapping[str, np.ndarray]]:
        return train_batches(
            train,
            transform=functools.partial(_augment, config, length),
            seed=config.seed,
            batch=optim.batch,
            start_step=start,
            workers=config.data.workers,
            bad_share=config.data.bad_share,
            shard=host_shard(),
            report_path=workdir / "bad_examples.jsonl",
        )

    def evaluate(pairs: _Pairs) -> Evaluate:
        chosen = PairSet(
            embed=functools.partial(_embed, config, dropout=None),
            batches=functools.partial(
                eval_batches,
                pairs,
                transform=functools.partial(_prepare, config, length),
                batch=min(optim.micro_batch, max(1, len(pairs) // mesh.size) * mesh.size),
                workers=config.data.workers,
                bad_share=config.data.bad_share,
                shard=host_shard(),
            ),
            mesh=mesh,
            seed=config.seed,
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
    train, evaluated, _ = _load(config, workdir)
    steps = steps_per_epoch(len(train), config.optim.batch)
    task = describe(config, steps=steps, length=_longest(train, evaluated))
    run = dataclasses.replace(config.run, best=None)
    loop.check(task, run, config.optim, seed=config.seed, mesh=mesh, key=key)


def _load(config: Config, workdir: epath.Path) -> tuple["_Pairs", dict[str, "_Pairs"], str]:
    """Training pairs, those of each evaluation by its name, checked, and the content of the
    tokenizer's file."""
    tokenizer, text = train_tokenizer(config, workdir)
    train = _Pairs.of(config, config.data.train_split, tokenizer)
    splits = {"val": config.data.valid_split, **config.data.further}
    evaluated = {name: _Pairs.of(config, split, tokenizer) for name, split in splits.items()}
    _check(config, tokenizer, _longest(train, evaluated))
    return train, evaluated, text


def _longest(train: "_Pairs", evaluated: Mapping[str, "_Pairs"]) -> int:
    return max(pairs.longest for pairs in (train, *evaluated.values()))


def describe(config: Config, *, steps: int, length: int) -> Task:
    """The task without data: `steps` per epoch, sentences of `length` tokens."""
    side, batch = config.clip.image.image, config.optim.micro_batch
    return Task(
        title="clip",
        init=functools.partial(init, config),
        rules=partition_rules(config),
        trainable=".*",
        streams=("dropout",),
        shown=(
            "train/loss",
            "train/skipped",
            "val/loss",
            *(f"{name}/accuracy" for name in ("val", *config.data.further)),
        ),
        loss=functools.partial(_loss, config),
        batch={
            "image": jax.ShapeDtypeStruct((batch, side, side, 3), np.float32),
            "ids": jax.ShapeDtypeStruct((batch, length), np.int32),
        },
        steps_per_epoch=steps,
    )


def init(config: Config, key: jax.Array) -> dict[str, Any]:
    """Initial parameters of both towers and of the loss."""
    towers, keys = (config.clip.text, config.clip.image), jax.random.split(key)
    text, image = (
        tower_of(tower).init(tower, config.dtype, key)
        for tower, key in zip(towers, keys, strict=True)
    )
    learned = CONTRASTIVE[config.clip.loss].init(config.clip.scale)
    return {"clip": {"text": text, "image": image, **learned}}


def _embed(config: Config, params: Any, batch: Any, dropout: jax.Array | None):
    text, image, tree = config.clip.text, config.clip.image, params["clip"]
    texts = tower_of(text).apply(text, config.dtype, tree["text"], batch["ids"], dropout=dropout)
    images = tower_of(image).apply(image, config.dtype, tree["image"], batch["image"])
    return texts, images


def _loss(config: Config, params, helpers, batch, rngs, step):
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
            f"config.clip.text.positions={text.positions} leave room for {text.longest} tokens, "
            f"and the longest sentence has {length}; raise it, or lower "
            "config.tokenizer.max_length"
        )


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """Pictures with the ids of their names by language; `arrays` is None: they are read singly."""

    corpus: Corpus
    ids: Mapping[str, list[np.ndarray]]

    arrays = None

    @classmethod
    def of(cls, config: Config, split: str, tokenizer: Tokenizer) -> "_Pairs":
        languages = config.known_languages
        corpus = load_corpus(config.data, split, languages, with_images=True)
        corpus.require_sentences(languages, reader="stage 'clip' with config.languages")
        corpus.require_images()
        texts = {name: tokenizer.encode(corpus.texts[name], None) for name in languages}
        return cls(corpus, texts)

    @property
    def longest(self) -> int:
        return max(len(ids) for texts in self.ids.values() for ids in texts)

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, index: int) -> dict[str, Any]:
        texts, sparse = self.corpus.texts, self.corpus.sparse
        names = [ids[index] for name, ids in self.ids.items() if texts[name][index] or not sparse]
        return {"image": self.corpus.images[index], "ids": names}


def _augment(config: Config, length: int, example: dict, generator: np.random.Generator) -> dict:
    ids = example["ids"][generator.integers(len(example["ids"]))]
    picture = augment_picture(example["image"], config.augment, generator)
    return _finish(config, length, picture, ids)


def _prepare(config: Config, length: int, example: dict) -> dict:
    return _finish(config, length, example["image"], example["ids"][0])


def _finish(config: Config, length: int, picture: np.ndarray, ids: np.ndarray) -> dict:
    tower = config.clip.image
    return {
        "image": prepare_picture(picture, tower.image, tower_of(tower).pictures),
        "ids": pad([ids], length, pad_id=config.clip.text.pad)[0],
    }


def partition_rules(config: Config) -> Rules:
    """Partition rules of both towers and of the learned numbers of the loss."""
    return (
        *((rf"^/clip/{name}$", P()) for name in CONTRASTIVE[config.clip.loss].learned),
        *rules_below("text", tower_of(config.clip.text).rules),
        *rules_below("image", tower_of(config.clip.image).rules),
    )
