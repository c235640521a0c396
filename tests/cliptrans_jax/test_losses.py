"""The objectives against numbers worked out by hand."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cliptrans_jax.losses import contrastive_loss, label_loss

PAD = 1


def test_label_loss_by_hand():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    labels = np.array([[4, 2, PAD], [0, -100, 3]], np.int32)
    scored = [(0, 0, 4), (0, 1, 2), (1, 0, 0), (1, 2, 3)]
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for smoothing in (0.0, 0.1):
        wanted = sum(
            -(1 - smoothing) * log_p[b, t, v] - smoothing * log_p[b, t].mean() for b, t, v in scored
        )
        total, count = label_loss(
            jnp.asarray(logits), jnp.asarray(labels), pad=PAD, smoothing=smoothing
        )
        assert (float(total), float(count)) == (pytest.approx(wanted, rel=1e-5), 4)


def test_pads_and_negative_labels_have_no_gradient():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 5)), jnp.float32)
    labels = jnp.array([[4, PAD, -1]])
    slope = jax.grad(lambda x: label_loss(x, labels, pad=PAD, smoothing=0.1)[0])(logits)
    assert np.any(slope[0, 0]) and not np.any(slope[0, 1:])


def test_contrastive_loss_by_hand():
    texts, images = np.array([[2.0, 0.0], [0.0, 0.5]]), np.array([[1.0, 0.0], [3.0, 4.0]])
    scores = 3.0 * np.array([[1.0, 0.6], [0.0, 0.8]])  # cosines, whatever the lengths

    def log_softmax(x, axis):
        return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))

    own = [np.diag(log_softmax(scores, axis)).mean() for axis in (1, 0)]
    found = contrastive_loss(jnp.asarray(texts), jnp.asarray(images), jnp.log(3.0))
    assert float(found) == pytest.approx(-sum(own) / 2, rel=1e-5)
