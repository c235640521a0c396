"""Accuracy and cross entropy by hand, with ties and non-finite logits; heads in float32."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from tiny import NAC, fill, tiny_config

from m2mkd_jax.evaluators.classification import classification_sums, restrict_logits
from m2mkd_jax.phases.networks import meta_network, whole_student

NAN = np.nan


def sums(logits, labels, mask=None):
    mask = np.ones(len(labels)) if mask is None else mask
    found = classification_sums(
        jnp.asarray(logits, jnp.float32), jnp.asarray(labels, jnp.int32), jnp.asarray(mask)
    )
    return {name: float(value) for name, value in found.items()}


def test_tied_logits_predict_the_first_label():
    found = sums(np.zeros((10, 10)), range(10))
    assert (found["accuracy"], found["accuracy_top5"]) == (1, 5)
    assert found["loss"] == pytest.approx(10 * np.log(10))


def test_non_finite_logits_are_never_correct():
    for value in (NAN, np.inf, -np.inf):
        found = sums(np.full((10, 10), value), range(10))
        assert (found["accuracy"], found["accuracy_top5"]) == (0, 0)
    # The label's logit is the largest number, yet argmax returns the NaN.
    found = sums([[1.0, 9.0, NAN, 0.0, 0.0, 0.0]], [1])
    assert (found["accuracy"], found["accuracy_top5"]) == (0, 1)
    assert np.isnan(found["loss"])


def test_top5_tie_goes_to_the_first_label():
    logits = [5.0, 4.0, 3.0, 2.0, 1.0, 1.0]
    found = sums([logits, logits, logits], [4, 5, 0])
    assert (found["accuracy"], found["accuracy_top5"]) == (1, 2)


def test_non_finite_padding_is_ignored():
    found = sums([[0.0, 1.0], [NAN, NAN]], [1, 0], mask=[1.0, 0.0])
    assert found["accuracy"] == 1
    assert found["loss"] == pytest.approx(np.log(1 + np.exp(-1)))


def test_totals_by_hand():
    """Ranks 0, 4 and 5, and a row that does not count."""
    logits = [[0.0, 5, 4, 3, 2, 1], [9, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]]
    found = sums(logits, [1, 4, 5, 0], mask=[1.0, 1.0, 1.0, 0.0])
    loss = sum(np.log(np.sum(np.exp(logits[i]))) - logits[i][n] for i, n in enumerate((1, 4, 5)))
    want = {"accuracy": 1, "accuracy_top5": 2, "loss": loss}
    assert found == pytest.approx(want, rel=1e-5)


def test_restrict_logits_ignores_other_classes():
    chosen = restrict_logits(jnp.asarray([[NAN, 2.0, 2.0, 1.0]]), (1, 2, 3))
    assert (sums(chosen, [0])["accuracy"], sums(chosen, [1])["accuracy"]) == (1, 0)


HEADS = {
    "ViT": (meta_network, {}),
    "V-MoE": (whole_student, {}),
    "NAC": (whole_student, {"model": NAC}),
    "NAC, first slot": (
        whole_student,
        {"model": dataclasses.replace(NAC, pooling="first_slot", read_out_head=True)},
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_bfloat16_network_has_unrounded_float32_logits(name):
    build, changes = HEADS[name]
    config = dataclasses.replace(tiny_config("end_to_end"), precision="bfloat16", **changes)
    network = build(config)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    params = fill(network.init)
    logits = jax.jit(lambda params, images: network.apply(params, images)[0])(params, images)
    assert logits.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(np.asarray(logits != rounded)) > 0.9  # by chance, one in 65,536 is equal
