"""The losses against numbers worked out by hand."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from meshes import split_mesh

from cliptrans_jax.contrastive.softmax import softmax_loss
from cliptrans_jax.evaluators.retrieval import retrieval_sums
from cliptrans_jax.losses import label_loss, states_loss
from cliptrans_jax.models.chunks import sum_chunks, total_of_chunks

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


def test_label_loss_of_even_chances():
    """log V whatever the smoothing; and with p = (1/2, 1/4, 1/4) the share e / V of every label."""
    labels = jnp.asarray([[0, 2]])
    for smoothing in (0.0, 0.3):
        total, _ = label_loss(jnp.full((1, 2, 8), 5.0), labels, pad=PAD, smoothing=smoothing)
        assert float(total) == pytest.approx(2 * np.log(8), rel=1e-6)
    halves = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25]]]))
    total, _ = label_loss(halves, jnp.asarray([[0]]), pad=PAD, smoothing=0.3)
    wanted = 0.7 * np.log(2) + 0.1 * (np.log(2) + 2 * np.log(4))
    assert float(total) == pytest.approx(wanted, rel=1e-6)


def test_losses_of_half_precision_are_summed_in_float32():
    logits = jnp.zeros((1, 300, 3), jnp.bfloat16)
    total, count = label_loss(logits, jnp.zeros((1, 300), int), pad=PAD)
    assert (total.dtype, count.dtype) == (jnp.float32, jnp.float32)
    assert (float(total), float(count)) == (pytest.approx(300 * np.log(3), rel=1e-5), 300)


def test_pads_and_negative_labels_have_no_gradient():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 5)), jnp.float32)
    labels = jnp.array([[4, PAD, -1]])
    slope = jax.grad(lambda x: label_loss(x, labels, pad=PAD, smoothing=0.1)[0])(logits)
    assert np.any(slope[0, 0]) and not np.any(slope[0, 1:])


@dataclasses.dataclass(frozen=True)
class Scale:
    """A readout with a matrix, a bias and something of its own."""

    factor: float

    def scores(self, readout, states):
        return self.factor * jnp.einsum("btd,vd->btv", states, readout["matrix"]) + readout["bias"]


def readout_case(dtype="float32"):
    draw = np.random.default_rng(2)
    readout = {"matrix": draw.normal(size=(11, 4)), "bias": draw.normal(size=11)}
    readout = {name: jnp.asarray(x, "float32") for name, x in readout.items()}
    labels = draw.integers(-1, 11, size=(8, 7)).astype(np.int32)
    return readout, jnp.asarray(draw.normal(size=(8, 7, 4)), dtype), jnp.asarray(labels)


def in_chunks(chunk, dtype="float32"):
    """Loss, count and gradients of `states_loss`."""

    def loss(readout, states, labels):
        options = {"pad": PAD, "smoothing": 0.1, "dtype": dtype, "chunk": chunk}
        total, count = states_loss(Scale(0.5).scores, readout, states, labels, **options)
        return 3 * total / count, count

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("chunk", [1, 16, 24, 48])
def test_chunks_lose_nothing(chunk):
    case = readout_case()
    found, wanted = in_chunks(chunk)(*case), in_chunks(56)(*case)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)
    assert np.abs(wanted[1][0]["bias"]).min() > 0


@pytest.mark.parametrize("real", [0, 1, 16, 17, 56])
def test_chunks_of_pads_are_not_computed(real):
    readout, states, labels = readout_case()
    order = np.random.default_rng(3).permutation(labels.size)
    labels = jnp.full(labels.size, PAD).at[order[:real]].set(5).reshape(labels.shape)
    seen = []

    def loss(readout, states, labels):
        jax.debug.callback(lambda x: seen.append(int(x)), jnp.sum(labels != PAD))
        logits = Scale(1.0).scores(readout, states)
        return label_loss(logits, labels, pad=PAD, smoothing=0.1)[0]

    def in_chunks(readout, states):
        options = {"pad": PAD, "dtype": "float32", "chunk": 16}
        return total_of_chunks(loss, readout, states, labels, **options)

    found = jax.jit(jax.value_and_grad(in_chunks, (0, 1)))(readout, states)
    jax.effects_barrier()
    computed = list(seen)
    assert (len(computed), sum(computed)) == (-(-real // 16), real)
    wanted = jax.value_and_grad(loss, (0, 1))(readout, states, labels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_of_eight_devices_are_summed(chunk):
    mesh = split_mesh()
    case = readout_case()
    wanted = in_chunks(56)(*case)
    with jax.set_mesh(mesh):
        program = in_chunks(chunk).lower(*case).compile()
        found = program(*case)
    assert "reduce-scatter" in program.as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


def test_gradients_of_chunks_are_summed_in_float32():
    case = readout_case("bfloat16")
    (_, _), (by_readout, by_states) = in_chunks(8, "bfloat16")(*case)
    assert (by_readout["matrix"].dtype, by_states.dtype) == (jnp.float32, jnp.bfloat16)
    _, (wanted, _) = in_chunks(8)(case[0], case[1].astype("float32"), case[2])
    np.testing.assert_allclose(by_readout["matrix"], wanted["matrix"], atol=0.02)


def test_small_gradients_of_many_chunks_are_not_lost():
    """In bfloat16 256 + 1 is 256."""
    seen = []

    def loss(readout, states, labels):
        seen.append((readout["matrix"].dtype.name, readout["bias"].dtype.name, labels.shape))
        real = jnp.sum(labels != PAD)
        return real * (jnp.sum(readout["matrix"]) + jnp.sum(readout["bias"])) + jnp.sum(states)

    def total(readout, states, labels):
        options = {"pad": PAD, "dtype": "bfloat16", "chunk": 1}
        return total_of_chunks(loss, readout, states, labels, **options)

    readout = {"matrix": jnp.ones((2, 3)), "bias": jnp.ones(2)}
    states, labels = jnp.ones((4, 128, 1), jnp.bfloat16), jnp.zeros((4, 128), int)
    value, (by_readout, by_states) = jax.jit(jax.value_and_grad(total, (0, 1)))(
        readout, states, labels
    )
    assert (value.dtype, float(value)) == (jnp.float32, 512 * (6 + 2 + 1))
    for leaf in jax.tree.leaves(by_readout):
        np.testing.assert_array_equal(leaf, 512)
    np.testing.assert_array_equal(by_states, 1)
    assert set(seen) == {("bfloat16", "float32", (1, 1))}  # matrices alone are rounded


def test_sums_over_chunks_count_every_label_once():
    _, states, labels = readout_case()

    def sums(states, labels):
        real = (labels >= 0) & (labels != PAD)
        return {"count": jnp.sum(real), "states": jnp.sum(states * real[..., None])}

    wanted = sums(states, labels)
    for chunk in (1, 16, 40, 100):
        found = sum_chunks(sums, states, labels, pad=PAD, chunk=chunk)
        assert int(found["count"]) == int(wanted["count"])
        assert float(found["states"]) == pytest.approx(float(wanted["states"]), rel=1e-5)


def test_contrastive_loss_by_hand():
    texts, images = np.array([[2.0, 0.0], [0.0, 0.5]]), np.array([[1.0, 0.0], [3.0, 4.0]])
    scores = 3.0 * np.array([[1.0, 0.6], [0.0, 0.8]])  # cosines, whatever the lengths

    def log_softmax(x, axis):
        return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))

    own = [np.diag(log_softmax(scores, axis)).mean() for axis in (1, 0)]
    found = softmax_loss(jnp.asarray(texts), jnp.asarray(images), log_scale=jnp.log(3.0))
    assert float(found) == pytest.approx(-sum(own) / 2, rel=1e-5)


def test_retrieval_counts_ties_once_and_never_what_is_not_finite():
    def accuracy(texts, images, mask):
        found = retrieval_sums(*(jnp.asarray(x, jnp.float32) for x in (texts, images, mask)))
        return float(found["accuracy"]), float(found["count"])

    axes = np.eye(3)
    assert accuracy(axes, 2 * axes, [1, 1, 1]) == (3, 3)
    # Similarities (1, 0), (0.8, 0.6): text 1 finds image 0, image 1 finds text 1.
    assert accuracy([(1, 0), (0.8, 0.6)], [(1, 0), (0, 1)], [1, 1]) == (1.5, 2)
    # All equal: the first pair alone.
    assert accuracy(np.ones((3, 3)), np.ones((3, 3)), [1, 1, 1]) == (1, 3)
    assert accuracy(np.zeros((3, 3)), axes, [1, 1, 1]) == (0, 3)  # of no length: NaN
    assert accuracy(np.full((3, 3), np.nan), np.full((3, 3), np.nan), [1, 1, 1]) == (0, 3)
    assert accuracy(axes, axes, [1, 1, 0]) == (2, 2)
    assert accuracy([axes[0], np.nan * axes[1]], axes[:2], [1, 0]) == (1, 1)
