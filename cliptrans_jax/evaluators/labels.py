"""Loss and accuracy over a set's labels."""

from jax import numpy as jnp

from cliptrans_jax.evaluators.evaluator import Evaluator
from cliptrans_jax.evaluators.translation import Encode, SentenceSet
from cliptrans_jax.losses import label_loss
from cliptrans_jax.models.chunks import CHUNK, counts, sum_chunks
from cliptrans_jax.models.cliptrans import Translator
from common_jax.ranking import rank_of
from common_jax.step import Evaluate, Sums, make_evaluator


def make_sums(translator: Translator, encode: Encode, *, chunk: int = CHUNK) -> Sums:
    """Totals over a batch's labels: the loss without smoothing, and the number of labels with rank
    0 (`rank_of`) among all tokens. Logits are computed for `chunk` labels per device at a time."""
    pad = translator.config.sizes.pad

    def sums(params, helpers, batch, key):
        # The copies that fill up the last batch count as pads.
        labels = jnp.where(batch["_mask"][:, None] > 0, batch["labels"], pad)
        features = encode({**helpers, **params}, batch)
        states = translator.label_states(params, features, batch["source"], batch["labels"])

        def chunk_sums(states, labels):
            logits = translator.call("logits", params, states)
            # Without smoothing, so that runs that smooth differently can be compared.
            total, count = label_loss(logits, labels, pad=pad)
            right = (rank_of(logits, jnp.maximum(labels, 0)) < 1) & counts(labels, pad=pad)
            return {"count": count, "loss": total, "token_accuracy": jnp.sum(right)}

        return sum_chunks(chunk_sums, states, labels, pad=pad, chunk=chunk)

    return sums


def evaluate_labels(sentences: SentenceSet) -> Evaluate:
    """evaluate(params, helpers, step) -> loss and token accuracy, means over the set's labels."""
    sums = make_sums(sentences.translator, sentences.encode, chunk=sentences.label_chunk)
    return make_evaluator(sums, sentences.batches, mesh=sentences.mesh, seed=sentences.seed)


EVALUATOR = Evaluator(evaluate_labels, best=("token_accuracy",))
