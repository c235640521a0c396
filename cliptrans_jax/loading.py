"""Loads the model of a run from its workdir, for translation."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float32

from cliptrans_jax.config import Config
from cliptrans_jax.data.examples import Examples
from cliptrans_jax.data.feed import Inputs
from cliptrans_jax.data.tokenizers.framing import Tokenizer, require_texts
from cliptrans_jax.decode import Search
from cliptrans_jax.evaluators.show import Hypothesis
from cliptrans_jax.evaluators.translation import Translate, make_translate
from cliptrans_jax.resident import Resident
from cliptrans_jax.runs.finished import Finished, find
from cliptrans_jax.runs.run_data import RunData, caption_language
from cliptrans_jax.runs.scoring import decode_batches
from cliptrans_jax.runs.translation import Model
from cliptrans_jax.stages import STAGES, TRANSLATION_STAGES, Side
from common_jax import checkpoint
from common_jax.mesh import MeshConfig, make_mesh


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained translation model.

    Attributes:
      params: the translator in its subtree, "mapper", and "clip" if the text tower was trained.
      data: loads the towers on first use.
      search: the compiled search.
    """

    config: Config
    params: Any
    tokenizer: Tokenizer
    data: RunData
    search: Translate
    mesh: Mesh

    def __repr__(self) -> str:
        """A line: all parameters and tokens would fill a notebook."""
        count = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
        return f"LoadedModel(stage={self.config.stage!r}, pair={self.pair}, {count:,} parameters)"

    @property
    def pair(self) -> tuple[str, str]:
        """Languages of input and output; in captioning, both are the language of the captions."""
        if STAGES[self.config.stage].captioning:
            return (caption_language(self.config),) * 2
        return self.config.data.pair

    def translate(
        self, sentences: Iterable[str], *, pictures: Iterable[np.ndarray] | None = None
    ) -> list[list[Hypothesis]]:
        """The hypotheses of every sentence, best first, with their scores.

        As in training, sentences are stripped, and line breaks become spaces. Sentences with more
        tokens than positions are truncated, which is logged. A run of a captioning stage writes
        captions from features of the pictures or, without pictures, of the sentences. As in its
        training, its encoder sees only what config.noise leaves of a sentence, by default nothing;
        with 0 < mask_prob < 1 that depends on the sentence's place in the list.

        Args:
          sentences: a list in the first language of `pair`. Given pictures, they may be empty.
          pictures: uint8 (I, J, 3) RGB, (I, J, 4) or (I, J), one per sentence; if given, features
            are computed from the pictures, not from the sentences.

        Raises:
          ValueError: if there are no sentences, one is empty or not a string, the number of
            pictures differs, an array is not a picture, or the model takes no pictures.
        """
        sentences = _lines(sentences, allow_empty=pictures is not None)
        pictures = None if pictures is None else _checked_pictures(pictures, len(sentences))
        if pictures is not None and not self.config.has_prefix:
            raise ValueError(
                "this model takes no pictures, as its run has config.model.mapper.prefix=0; leave "
                "them out"
            )
        source, target = self.pair
        # Only the first id of a target is read: the code that the search begins with.
        code = np.array([self.tokenizer.language_id(target)], np.int32)
        examples = Examples(
            source=self.tokenizer.encode(sentences, source),
            target=[code] * len(sentences),
            side=Side.TEXT if pictures is None else Side.IMAGE,
            rows=np.arange(len(sentences), dtype=np.int32),
            languages=((source, target),) * len(sentences),
            drops=STAGES[self.config.stage].captioning,
        )
        features, tokens = self._encode(sentences, pictures)
        limit, clip = self.config.sentence_limit, ()
        if tokens is not None:
            clip = (self.data.text_tower.tokenizer.pad, self.data.text_tower.longest)
        inputs = Inputs(examples, features, tokens, self.tokenizer.pad, limit, *clip)
        # The sentences are this process's own, not its share of a set.
        batches = decode_batches(self.config, inputs, shard=(0, 1))
        hypotheses = self.search(self.params, batches)
        return [hypotheses[index] for index in range(len(sentences))]

    def sentence_features(self, sentences: Iterable[str]) -> Float32[np.ndarray, "B M"]:
        """One feature per sentence, by the text tower that the run used, or trained.

        Sentences are stripped and truncated as in `translate`.

        Raises:
          ValueError: if there are no sentences, one is empty or not a string, or the run has no
            text tower.
        """
        return self._sentences.sentences(_lines(sentences, allow_empty=False))

    def picture_features(self, pictures: Iterable[np.ndarray]) -> Float32[np.ndarray, "B M"]:
        """One feature per picture, by the image tower that the run used.

        Args:
          pictures: uint8 (I, J, 3) RGB, (I, J, 4) or (I, J).

        Raises:
          ValueError: if there are no pictures, an array is not one, or the run has no image tower.
        """
        pictures = _checked_pictures(pictures)
        if not pictures:
            raise ValueError("pictures is empty; give at least one picture")
        return self._pictures.pictures(pictures)

    def _encode(self, sentences: Sequence[str], pictures: Sequence[np.ndarray] | None):
        """Features, and tokens for the text tower; None for whichever is not needed."""
        if not self.config.has_prefix:
            return None, None
        if pictures is not None:
            return self._pictures.pictures(pictures), None
        if self.config.unfreeze_clip:
            return None, self.data.text_tower.tokenizer.encode(sentences, None)
        return self._sentences.sentences(sentences), None

    # Moved to the devices on the first call, so that later calls only compute.
    @functools.cached_property
    def _sentences(self) -> Resident:
        tower = self.data.text_tower
        if self.config.unfreeze_clip:
            # A copy of the tree, whose leaves `Resident` replaces.
            trained = jax.tree.map(lambda leaf: leaf, self.params["clip"])
            tower = dataclasses.replace(tower, params=trained)
        return Resident(tower, self.mesh, self.config.decode.batch)

    @functools.cached_property
    def _pictures(self) -> Resident:
        return Resident(self.data.image_tower, self.mesh, self.config.decode.batch)


def _lines(sentences: object, *, allow_empty: bool) -> list[str]:
    """The sentences, normalised in the same way as those of corpora."""
    lines = require_texts(sentences, name="sentences")
    if not lines:
        raise ValueError("sentences is empty; give at least one sentence")
    lines = [" ".join(filter(None, map(str.strip, line.split("\n")))) for line in lines]
    if "" in lines and not allow_empty:
        raise ValueError(
            f"sentences[{lines.index('')}] is empty, which leaves nothing to translate; drop it"
        )
    return lines


def _checked_pictures(pictures: object, count: int | None = None) -> list[np.ndarray]:
    """The pictures as a list of valid arrays, `count` of them if given."""
    single = isinstance(pictures, np.ndarray) and pictures.ndim < 4
    if single or not isinstance(pictures, Iterable):
        raise ValueError(
            f"pictures must be a list of arrays and is a {type(pictures).__name__}; give [picture] "
            "for one"
        )
    pictures = list(pictures)
    if count not in (None, len(pictures)):
        raise ValueError(
            f"{count} sentences and {len(pictures)} pictures: give as many pictures or none"
        )
    for place, picture in enumerate(pictures):
        is_array = isinstance(picture, np.ndarray)
        is_pixels = is_array and picture.dtype == np.uint8 and picture.size
        if not is_pixels or not (picture.ndim == 2 or picture.shape[2:] in ((3,), (4,))):
            shown = f"{picture.dtype} {picture.shape}" if is_array else type(picture).__name__
            raise ValueError(
                f"pictures[{place}] must be a uint8 array (I, J, 3), (I, J, 4) or (I, J) and is "
                f"{shown}"
            )
    return pictures


def load_model(
    source: epath.PathLike, *, mesh: Mesh | None = None, batch: int | None = None
) -> LoadedModel:
    """Loads a run's best checkpoint on the validation set.

    Args:
      source: the run's workdir, a pipeline's workdir, or one step's folder.
      mesh: devices; None for only the first.
      batch: sentences or pictures that are computed at a time, rounded up to a multiple of the
        devices; None for the run's config.decode.batch. Fewer are padded to it, so 1 is fastest
        for one sentence at a time.

    Raises:
      FileNotFoundError: if there is no finished checkpoint.
      ValueError: for a run of stage "clip", which trains no translation model, or of the other
        system, and for a batch below 1.
    """
    settings = {} if batch is None else {"decode.batch": str(batch)}
    return load_finished(find(source, TRANSLATION_STAGES, settings), mesh=mesh)


def load_finished(run: Finished, *, mesh: Mesh | None = None) -> LoadedModel:
    """Loads a checkpoint of a run of `TRANSLATION_STAGES`, with the settings of `run.config`."""
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
    # The run's batch was for its own devices; here it becomes a multiple of these.
    run = run.with_batch(run.config.decode.batch, mesh)
    # A frozen text tower encodes the sentences before the search, not in it.
    config = dataclasses.replace(run.config.apply_parity(), keep_text_features=True)
    tokenizer = run.load_tokenizer()
    data = RunData(config, run.workdir, mesh, known=tokenizer)
    model = Model.of(config, data)
    params = checkpoint.load(run.step, mesh=mesh, rules=model.rules, average=True)
    search = make_translate(
        Search(model.translator, config.decode), model.encode, tokenizer, mesh=mesh
    )
    return LoadedModel(config, params, tokenizer, data, search, mesh)
