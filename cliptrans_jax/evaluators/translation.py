"""Translates a set of sentences, during or after training, and scores it."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cliptrans_jax.data.tokenizers.framing import Tokenizer
from cliptrans_jax.decode import Hypotheses, Search
from cliptrans_jax.evaluators.evaluator import Evaluator
from cliptrans_jax.evaluators.scores import METRICS, as_metrics, score
from cliptrans_jax.evaluators.show import Hypothesis
from cliptrans_jax.models.chunks import CHUNK
from cliptrans_jax.models.cliptrans import Translator
from common_jax import hosts
from common_jax.mesh import replicated, to_devices
from common_jax.step import Evaluate, one_behind

# encode(params, batch) -> features (B, M); None if the model takes none
Encode = Callable[[Any, Mapping[str, jax.Array]], jax.Array | None]
Batches = Iterable[Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Translate:
    """translate(params, batches) -> hypotheses of every example, best first.

    Attributes:
      run: the jitted search.
      tokenizer: decodes the outputs.
      mesh: devices.
    """

    run: Callable[[Any, Mapping[str, jax.Array]], tuple[Hypotheses, jax.Array, jax.Array]]
    tokenizer: Tokenizer
    mesh: Mesh

    def __call__(self, params: Any, batches: Batches) -> dict[int, list[Hypothesis]]:
        """Hypotheses by index of the example, on every host.

        Raises:
          common_jax.signals.Stopped: on a request to stop.
          FloatingPointError: if no output of an example has a finite score.
        """

        def dispatched() -> Iterator[tuple[Hypotheses, jax.Array, jax.Array]]:
            for batch in batches:
                hosts.check()
                yield self.run(params, to_devices(batch, self.mesh))

        hypotheses = {}
        with jax.set_mesh(self.mesh):
            for outputs in one_behind(dispatched()):
                hypotheses |= self._read(*outputs)
        return hypotheses

    def _read(
        self, hypotheses: Hypotheses, index: jax.Array, mask: jax.Array
    ) -> dict[int, list[Hypothesis]]:
        tokens, lengths, scores = (
            np.asarray(x) for x in (hypotheses.tokens, hypotheses.lengths, hypotheses.scores)
        )
        # By example, since batches are sorted by length. If fewer than W hypotheses have ended, the
        # scores of the missing ones are -inf.
        found = {
            int(number): [
                Hypothesis(self.tokenizer.decode(ids[:length].tolist()), float(score))
                for ids, length, score in zip(tokens[row], lengths[row], scores[row], strict=True)
                if np.isfinite(score)
            ]
            for row, number in enumerate(np.asarray(index))
            if np.asarray(mask)[row] > 0
        }
        if lost := sorted(number for number, outputs in found.items() if not outputs):
            raise FloatingPointError(
                f"the model's logits for sentence {lost[0]}, counting from 0, are not finite; "
                "check its weights, or use an earlier checkpoint"
            )
        return found


def make_translate(
    search: Search,
    encode: Encode,
    tokenizer: Tokenizer,
    *,
    mesh: Mesh,
    language: int | None = None,
) -> Translate:
    """Makes a function that translates batches of `evaluation_batches`, compiled once per length.

    Args:
      search: model and search.
      encode: computes features for the prefix.
      tokenizer: decodes the outputs.
      mesh: devices; a batch is split over all of them.
      language: the code that every output starts with; None for that of its reference.
    """

    def run(params: Any, batch: Mapping[str, jax.Array]):
        # A framed sentence begins with the code of its language.
        first = batch["labels"][:, 0]
        first = first if language is None else jax.numpy.full_like(first, language)
        hypotheses = search.run(params, encode(params, batch), batch["source"], first)
        return hypotheses, batch["_index"], batch["_mask"]

    # Replicated, so that every host can read the outputs of the whole batch.
    return Translate(jax.jit(run, out_shardings=replicated(mesh)), tokenizer, mesh)


def best_texts(hypotheses: Mapping[int, Sequence[Hypothesis]], size: int) -> list[str]:
    """The best output of every example, in order."""
    return [hypotheses[index][0].text for index in range(size)]


@dataclasses.dataclass(frozen=True)
class SentenceSet:
    """A set of sentences and the model that translates them.

    Attributes:
      translator: the model.
      encode: computes the features of a batch.
      batches: starts a pass over the set.
      mesh: devices.
      seed: random seed.
      translate: the search.
      search_batches: starts a pass with batches for the search.
      references: one translation per sentence.
      language: language of the references.
      label_chunk: labels per device whose logits are computed at a time.
    """

    translator: Translator
    encode: Encode
    batches: Callable[[], Batches]
    mesh: Mesh
    seed: int
    translate: Translate
    search_batches: Callable[[], Batches]
    references: Sequence[str]
    language: str
    label_chunk: int = CHUNK


def evaluate_translations(sentences: SentenceSet) -> Evaluate:
    """evaluate(params, helpers, step) -> scores of the best translations."""

    def evaluate(params: Any, helpers: Any, step: int) -> dict[str, float]:
        hypotheses = sentences.translate({**helpers, **params}, sentences.search_batches())
        outputs = best_texts(hypotheses, len(sentences.references))
        return as_metrics(score(outputs, sentences.references, language=sentences.language))

    return evaluate


EVALUATOR = Evaluator(evaluate_translations, best=METRICS, searches=True)
