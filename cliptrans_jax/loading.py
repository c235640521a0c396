"""Trained models, ready to translate, from nothing but a workdir."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from cliptrans_jax.config import Config
from cliptrans_jax.data.examples import Examples, NoiseConfig
from cliptrans_jax.data.feed import BatchingConfig, Inputs, evaluation_batches
from cliptrans_jax.data.framing import Tokenizer
from cliptrans_jax.data.pictures import prepare_picture
from cliptrans_jax.data.tokens import load_tokenizer
from cliptrans_jax.decode import Search
from cliptrans_jax.encoders import ImageTower, TextTower
from cliptrans_jax.evaluators.show import Hypothesis
from cliptrans_jax.evaluators.translation import Translate, make_translate
from cliptrans_jax.runs.material import TOKENIZER, Material
from cliptrans_jax.runs.translation import Model, best_step
from cliptrans_jax.stages import STAGES, Side
from common_jax import checkpoint
from common_jax.command_line import check_system
from common_jax.config import freeze
from common_jax.mesh import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained translation model.

    Attributes:
      config: of its run.
      params: {"mbart": ..., "mapper": ...}, and "clip" where its text tower was trained.
      tokenizer: of sources and outputs.
      material: gives the towers that features come from, when they are first needed.
      search: the compiled search.
      mesh: devices.
    """

    config: Config
    params: Any
    tokenizer: Tokenizer
    material: Material
    search: Translate
    mesh: Mesh

    def translate(
        self, sentences: Sequence[str], *, pictures: Sequence[np.ndarray] | None = None
    ) -> list[list[Hypothesis]]:
        """The hypotheses of every sentence, best first, with their scores.

        Args:
          sentences: in the source language of the run.
          pictures: uint8 (I, J, 3) RGB, one a sentence: the features are taken of them and not of
            the sentences.

        Raises:
          ValueError: no sentences, or another number of pictures.
        """
        if not sentences or (pictures is not None and len(pictures) != len(sentences)):
            raise ValueError(
                f"{len(sentences)} sentences and "
                f"{'no' if pictures is None else len(pictures)} pictures: give at least one "
                "sentence, and as many pictures or none"
            )
        source, target = self.config.data.pair
        code = np.array([self.tokenizer.language_id(target)], np.int32)
        examples = Examples(
            source=self.tokenizer.encode(sentences, source),
            target=[code] * len(sentences),
            side=Side.TEXT if pictures is None else Side.IMAGE,
            rows=np.arange(len(sentences), dtype=np.int32),
            languages=((source, target),) * len(sentences),
            drops=False,
        )
        features, tokens = self._features(sentences, pictures)
        inputs = Inputs(
            examples,
            features,
            tokens,
            self.tokenizer.pad,
            self.config.sentence_limit,
            None if tokens is None else self.material.text_tower.longest,
        )
        batches = evaluation_batches(
            inputs,
            batch=self.config.decode.batch,
            batching=BatchingConfig(self.config.decode.bucket),
            noise=NoiseConfig(),
            seed=0,
            shard=(0, 1),
            by_length=True,
        )
        found = self.search(self.params, batches)
        return [found[index] for index in range(len(sentences))]

    def _features(self, sentences: Sequence[str], pictures: Sequence[np.ndarray] | None):
        """Features and tokens for the text tower, one of them or neither."""
        if not self.config.has_prefix:
            return None, None
        if pictures is not None:
            tower: ImageTower = self.material.image_tower
            for picture in pictures:
                check_picture(picture)
            prepared = np.stack([prepare_picture(x, tower.config.image) for x in pictures])
            return np.asarray(jax.jit(tower.apply)(tower.params, prepared), np.float32), None
        tower: TextTower = self.material.text_tower
        ids = tower.tokenizer.encode(sentences, None)
        if self.config.unfreeze_clip:
            return None, ids
        return tower.encode(ids, mesh=self.mesh), None


def check_picture(picture: np.ndarray) -> None:
    """Raises ValueError unless a picture is uint8 (I, J, 3)."""
    shape = getattr(picture, "shape", None)
    dtype = getattr(picture, "dtype", type(picture).__name__)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(
            f"a picture is of type {dtype}{f' and shape {tuple(shape)}' if shape else ''} and must "
            "be a uint8 array (I, J, 3), RGB with channels last"
        )


def load_model(source: epath.PathLike, *, mesh: Mesh | None = None) -> LoadedModel:
    """The model that a run trained, of its best checkpoint by the validation set.

    Args:
      source: the run's workdir, or one step's folder, which is then taken as it is.
      mesh: devices; None for the first alone.

    Raises:
      FileNotFoundError: when there is no finished checkpoint.
      ValueError: when it is of stage "clip", which trains no translation model, or of the other
        system.
    """
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
    saved = checkpoint.load_config(source)
    check_system(saved, "stage", str(source))
    config = freeze(Config, saved).consistent()
    # Sentences' features are computed before the search, where they are not trained with it.
    config = dataclasses.replace(config, keep_text_features=True)
    step = checkpoint.find_step(source)
    workdir = step.parent.parent
    if config.stage not in STAGES:
        raise ValueError(
            f"{workdir} is a run of stage {config.stage!r}, which trains no translation model; "
            f"give a run of one of {list(STAGES)}"
        )
    if step != checkpoint.absolute(source):
        step = best_step(workdir, config.run.best)
    cut = dataclasses.replace(config.tokenizer, max_length=config.sentence_limit)
    tokenizer = load_tokenizer(
        cut, sentences=None, languages=config.known_languages, path=workdir / TOKENIZER
    )
    material = Material(config, workdir, mesh, known=tokenizer)
    model = Model.of(config, material)
    params = checkpoint.load(step, mesh=mesh, rules=model.rules, average=config.optim.ema > 0)
    search = make_translate(
        Search(model.translator, config.decode), model.features, tokenizer, mesh=mesh
    )
    return LoadedModel(config, params, tokenizer, material, search, mesh)
