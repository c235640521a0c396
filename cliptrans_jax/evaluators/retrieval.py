"""Retrieval accuracy between texts and pictures."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from cliptrans_jax.contrastive.objective import unit
from cliptrans_jax.evaluators.evaluator import Evaluator
from common_jax.ranking import rank_of
from common_jax.step import Evaluate, Programs, make_evaluator


@dataclasses.dataclass(frozen=True)
class PairSet:
    """A set of texts and their pictures.

    Attributes:
      embed: (params, batch) -> features of texts and of images.
      batches: starts a pass over the set.
      mesh: devices.
      seed: random seed.
      programs: shared by the sets of a run, which differ in data alone.
    """

    embed: Callable[[Any, Mapping[str, jax.Array]], tuple[Float[Array, "B M"], Float[Array, "B M"]]]
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]]
    mesh: Mesh
    seed: int
    programs: Programs


def retrieval_sums(
    texts: Float[Array, "B M"], images: Float[Array, "B M"], mask: Float[Array, " B"]
) -> dict[str, Float[Array, ""]]:
    """The number of pairs in a batch, and the sum of their accuracies: 1 if text and image retrieve
    each other, 1/2 if only one retrieves the other, else 0.

    A hit has rank 0 (`rank_of`) by cosine similarity among the examples with mask 1. Ties rank by
    index; a similarity that is not finite is never a hit.
    """
    real, own = mask > 0, jnp.arange(len(mask))
    # bfloat16, the default precision of some accelerators, would cause ties.
    scores = jnp.matmul(unit(texts), unit(images).T, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.where(real[:, None] & real[None, :], scores, -jnp.inf)
    hits = rank_of(scores, own) < 1, rank_of(scores.T, own) < 1
    right = sum(jnp.where(real, x, False).astype(jnp.float32) for x in hits) / 2
    return {"count": jnp.sum(mask), "accuracy": jnp.sum(right)}


def evaluate_retrieval(pairs: PairSet) -> Evaluate:
    """evaluate(params, helpers, step) -> accuracy within batches, averaged over both directions."""

    def sums(params: Any, helpers: Any, batch: Any, key: jax.Array) -> dict[str, jax.Array]:
        return retrieval_sums(*pairs.embed(params, batch), batch["_mask"])

    return make_evaluator(
        sums,
        pairs.batches,
        mesh=pairs.mesh,
        seed=pairs.seed,
        programs=pairs.programs,
        name="retrieval",
    )


EVALUATOR = Evaluator(evaluate_retrieval)
