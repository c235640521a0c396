"""Runs of stages that train a translator: train, choose the best checkpoint on the validation set,
and translate the test set with it."""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cliptrans_jax.config import Config
from cliptrans_jax.data.examples import empties_source
from cliptrans_jax.data.feed import TRIVIAL, TrainFeed, batch_shapes, evaluation_batches
from cliptrans_jax.data.tokenizers.framing import require_fits
from cliptrans_jax.decode import Search
from cliptrans_jax.encoders import TextTower
from cliptrans_jax.evaluators.evaluator import evaluate_all
from cliptrans_jax.evaluators.table import evaluators_of
from cliptrans_jax.evaluators.translation import Encode, SentenceSet, Translate, make_translate
from cliptrans_jax.models import cliptrans
from cliptrans_jax.models.cliptrans import Translator
from cliptrans_jax.pretrained import place
from cliptrans_jax.runs.initial_weights import check_fresh, check_start, make_warm_start
from cliptrans_jax.runs.objective import make_encode, make_loss
from cliptrans_jax.runs.run_data import (
    RunData,
    Split,
    encodes_texts,
    feature_side,
)
from cliptrans_jax.runs.run_towers import describe_text
from cliptrans_jax.runs.scoring import SCORES, decode_batches, score_further, score_split
from cliptrans_jax.stages import STAGES, Side, trainable
from cliptrans_jax.towers.table import tower_of
from common_jax import checkpoint, hosts, loop
from common_jax.inputs import steps_per_epoch
from common_jax.mesh import Rules, match_rules, with_shardings
from common_jax.metrics import read_metrics, scalar
from common_jax.run_config import RunConfig
from common_jax.step import Evaluate
from common_jax.task import Task
from common_jax.workdir import read_json, read_result


def run(user_config: Config, workdir: epath.Path, mesh: Mesh) -> dict[str, Any]:
    """Trains the config's stage, resuming if interrupted, and scores the test split.

    Parameters are saved under the translator's subtree, "mapper", and "clip" if the text tower is
    trained.

    Returns:
      The result of `common_jax.loop.train`, with the scores of the test split under "test".
    """
    # An interruption while the test split is translated leaves a result without scores.
    result, scores = read_result(workdir, user_config, phase=user_config.stage), None
    if result is not None:
        _refuse_other_best(workdir, user_config.run.best)
        path = workdir / SCORES
        scores = hosts.decide(lambda: read_json(path) if path.exists() else None)
    if result is not None and scores is not None:
        logging.info("%s is already finished: %s", user_config.stage, workdir)
        return result | {"test": scores}
    # Checkpoints store `user_config`, since parity must not be applied twice.
    config = user_config.apply_parity()
    data = RunData(config, workdir, mesh)
    # From here to `loop.check`: everything that can be refused before features are computed.
    count = data.check(train=True)
    model = Model.of(config, data)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    check_start(
        config, model.trained_tower, with_shardings(shapes, match_rules(model.rules, shapes, mesh))
    )
    task = model.bare_task(mesh, examples=count)
    loop.check(task, config.run, config.optim, seed=config.seed, mesh=mesh)
    data.save_tokenizer()  # written before anything else
    train = data.load(config.data.train_split, train=True)
    valid = data.load(config.data.valid_split, train=False)
    test = data.load(config.data.test_split, train=False)
    # All of these splits have their features now, and training needs the memory.
    data.release_towers()
    translate = model.translate(data)
    beams = config.valid_beams
    # By default, validation and test share one compiled search.
    valid_translate = model.translate(data, beams=beams) if beams else translate
    feed = TrainFeed(
        train.inputs, config.noise, config.batching, config.optim.batch, config.seed, hosts.shard()
    )
    task = dataclasses.replace(
        task,
        batch=feed.shapes(config.optim.micro_batch),
        helpers=model.frozen(mesh),
        warm_start=make_warm_start(config, model.trained_tower),
        batches=feed.batches,
        evaluators={"val": validate(config, model, valid, valid_translate, mesh=mesh)},
    )
    result = loop.train(
        task, config.run, config.optim,
        seed=config.seed, workdir=workdir, mesh=mesh, config=user_config,
    )  # fmt: skip
    step = best_step(workdir, config.run)
    params = checkpoint.load(step, mesh=mesh, rules=model.rules, average=True)
    params = {**task.helpers, **params}  # checkpoints have no helpers
    further = score_further(config, workdir, data, translate, params, step=step.name)
    scores = score_split(config, workdir, test, translate, params, step=step.name)
    return result | further | {"test": scores}


def _refuse_other_best(workdir: epath.Path, best: str | None) -> None:
    """Raises ValueError if a finished run had another `run.best`: it chose the checkpoint whose
    scores are there, and those that were kept."""
    before = read_json(workdir / "config.json").get("run", {}).get("best", best)
    if before != best:
        raise ValueError(
            f"config.run.best={best!r}, but {workdir} is finished, with the checkpoint to score "
            f"chosen by {before!r}: give --config.run.best={before} or another --workdir, or score "
            "another checkpoint with stage 'evaluate' and its folder as config.sources.model"
        )


def describe(user_config: Config, mesh: Mesh, *, examples: int, tokens: int) -> Task:
    """A stage's task without data and weights, which is enough to compile its step.

    Args:
      user_config: the config, before `apply_parity`.
      mesh: devices, which may be abstract.
      examples: number of training examples.
      tokens: padded length of sentences.
    """
    config = user_config.apply_parity()
    tower = describe_text(config) if encodes_texts(config) else None
    model = Model(config, Translator(config.model, config.dtype), tower)
    return model.bare_task(mesh, examples=examples, tokens=tokens)


def check(user_config: Config, workdir: epath.Path, mesh: Mesh, *, key: str) -> None:
    """Checks a stage of a pipeline before its sources exist; writes nothing.

    Args:
      key: path of its recipe, for messages.

    Raises:
      ValueError, FileNotFoundError: as `run`.
    """
    config = user_config.apply_parity()
    data = RunData(config, workdir, mesh)
    count = data.check(train=True, towers=not _awaits_towers(config))
    data.release_towers()  # read to check the width of their features
    task = describe(user_config, mesh, examples=count, tokens=config.sentence_limit)
    check_fresh(config, jax.eval_shape(task.init, jax.random.key(0)))
    loop.check(task, config.run, config.optim, seed=config.seed, mesh=mesh, key=key)


def _awaits_towers(config: Config) -> bool:
    """True if an earlier stage has yet to train the towers."""
    if not config.sources.clip:
        return False
    try:
        checkpoint.find_step(config.sources.clip)
    except FileNotFoundError:
        return True
    return False


@dataclasses.dataclass(frozen=True)
class Model:
    """The model that a stage trains; `tower` is the text tower if steps run it, else None."""

    config: Config
    translator: Translator
    tower: TextTower | None

    @classmethod
    def of(cls, config: Config, data: RunData) -> "Model":
        """The model of a config, without parameters; checks its vocabulary."""
        vocab = config.model.sizes.vocab
        require_fits(data.tokenizer, vocab=vocab, special={}, key=config.model.key)
        tower = data.text_tower if encodes_texts(config) else None
        return cls(config, Translator(config.model, config.dtype), tower)

    @property
    def trained_tower(self) -> TextTower | None:
        """The text tower if it is trained too, else None."""
        return self.tower if self.config.unfreeze_clip else None

    @property
    def rules(self) -> Rules:
        """Partition rules of all parameters, including those of a frozen tower."""
        rules = cliptrans.partition_rules(self.config.model)
        return rules if self.tower is None else (*rules, *tower_of(self.tower.config).rules)

    @property
    def encode(self) -> Encode:
        """encode(params, batch) -> features for the prefix."""
        return make_encode(self.tower)

    def init(self, key: jax.Array) -> Mapping[str, Any]:
        """Initial parameters. A text tower's are zeros, as they are always loaded."""
        params = self.translator.init(key)
        if self.trained_tower is None:
            return params
        return params | {"clip": jax.tree.map(jax.numpy.zeros_like, self.tower.params)}

    def bare_task(self, mesh: Mesh, *, examples: int, tokens: int = 8) -> Task:
        """The task without data and weights, for `examples` training examples with sentences padded
        to `tokens`."""
        config, tower = self.config, self.tower
        stage = STAGES[config.stage]
        # If only evaluation encodes texts, training reads features of pictures.
        in_step = tower is not None and feature_side(config, train=True) is Side.TEXT
        # Where all words are dropped, steps are compiled for a source of two tokens.
        batch = batch_shapes(
            config.optim.micro_batch,
            tokens=min(tokens, config.sentence_limit),
            source=TRIVIAL if empties_source(stage, config.noise) else None,
            features=0 if in_step or not config.has_prefix else config.model.mapper.features,
            clip_tokens=min(tokens, tower.longest) if in_step else 0,
        )
        loss = make_loss(
            self.translator, tower, label_smoothing=config.label_smoothing, chunk=config.label_chunk
        )
        return Task(
            phase=config.stage,
            init=self.init,
            rules=self.rules,
            trainable=trainable(stage, config.freeze, config.model.architecture),
            streams=("dropout",),
            shown=("train/loss", "train/skipped", "val/loss", f"val/{config.bleu}", "val/chrf"),
            loss=loss,
            batch=batch,
            steps_per_epoch=steps_per_epoch(examples, config.optim.batch),
            helpers=self.frozen_shapes(mesh),
        )

    def frozen_shapes(self, mesh: Mesh) -> dict[str, Any]:
        """Shapes and shardings of the parameters that steps use but do not train: a frozen text
        tower's, under "clip"."""
        if self.tower is None or self.trained_tower is not None:
            return {}
        params = {"clip": self.tower.params}
        return with_shardings(params, match_rules(self.rules, params, mesh))

    def frozen(self, mesh: Mesh) -> dict[str, Any]:
        """The parameters of `frozen_shapes`, on the mesh."""
        # The tower in a step is sharded by its rules; one that encodes a whole set is replicated.
        shapes = self.frozen_shapes(mesh)
        return place({"clip": self.tower.params}, shapes) if shapes else {}

    def translate(self, data: RunData, *, beams: int = 0) -> Translate:
        """The config's search, with another number of beams unless 0. Reuse it for all sets, so
        that it compiles only once."""
        config, language = self.config, None
        # The original evaluates captioning in the target language, even if captions are in another.
        if config.parity and STAGES[config.stage].captioning:
            language = data.tokenizer.language_id(config.data.target_language)
        decode = dataclasses.replace(config.decode, beams=beams or config.decode.beams)
        search, tokenizer = Search(self.translator, decode), data.tokenizer
        return make_translate(search, self.encode, tokenizer, mesh=data.mesh, language=language)


def validate(
    config: Config, model: Model, valid: Split, translate: Translate, *, mesh: Mesh
) -> Evaluate:
    """Makes the evaluation on the validation set that stage and config ask for.

    Args:
      translate: the search.
    """
    batches = functools.partial(
        evaluation_batches, valid.inputs, batch=config.optim.micro_batch, batching=config.batching,
        noise=config.noise, seed=config.seed, shard=hosts.shard(),
    )  # fmt: skip
    sentences = SentenceSet(
        translator=model.translator,
        encode=model.encode,
        batches=batches,
        mesh=mesh,
        seed=config.seed,
        translate=translate,
        search_batches=functools.partial(decode_batches, config, valid.inputs),
        references=[valid.reference(index) for index in range(len(valid.inputs))],
        language=valid.inputs.examples.languages[0][1],
        label_chunk=config.label_chunk,
    )
    chosen = [x for x in evaluators_of(config.stage) if config.valid_decode or not x.searches]
    return evaluate_all([x.make(sentences) for x in chosen])


def best_step(workdir: epath.Path, run: RunConfig) -> epath.Path:
    """The folder of the checkpoint with the highest `run.best`; the earliest if several tie.

    Leaves out checkpoints of an interruption or of run.checkpoint_minutes: their timing depends on
    the machine, and the result must not. It is the newest if `run.best` is None or, with a warning,
    if no finite value is on record. Process 0 chooses for all processes, which must call this
    together.
    """
    folder = checkpoint.absolute(workdir) / checkpoint.FOLDER
    return folder / hosts.decide(lambda: _choose_step(workdir, run).name)


def _choose_step(workdir: epath.Path, run: RunConfig) -> epath.Path:
    metric = run.best
    if metric is None:
        return checkpoint.find_step(workdir)
    result = workdir / "result.json"
    # The checkpoint of the last step counts even if no epoch ends there.
    total = read_json(result).get("steps") if result.exists() else None
    folder = checkpoint.absolute(workdir) / checkpoint.FOLDER
    steps, record = checkpoint.own_steps(folder), workdir / "metrics.jsonl"
    values = {
        line["step"]: score
        for line in (read_metrics(record) if record.exists() else ())
        if (score := scalar(record, line, metric)) is not None
        and line["step"] in steps
        and np.isfinite(score)
        and (line.get("epoch", 0) % run.checkpoint_every == 0 or line["step"] == total)
    }
    if not values:
        step = checkpoint.find_step(workdir)
        logging.warning("%s has no %s for any checkpoint: using the newest", record, metric)
        return step
    return folder / str(max(values, key=lambda step: (values[step], -step)))
