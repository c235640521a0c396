"""The losses, against numbers worked out by hand."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from meshes import split_mesh

from cliptrans_jax.contrastive.softmax import softmax_loss
from cliptrans_jax.evaluators.retrieval import retrieval_sums
from cliptrans_jax.losses import label_loss, states_loss
from cliptrans_jax.models import linear_loss
from cliptrans_jax.models.chunks import sum_chunks
from cliptrans_jax.translators.translator import Readout

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


def test_label_loss_of_simple_distributions():
    """For uniform chances, log V whatever the smoothing; with p = (1/2, 1/4, 1/4), each label's
    share is e / V."""
    labels = jnp.asarray([[0, 2]])
    for smoothing in (0.0, 0.3):
        total, _ = label_loss(jnp.full((1, 2, 8), 5.0), labels, pad=PAD, smoothing=smoothing)
        assert float(total) == pytest.approx(2 * np.log(8), rel=1e-6)
    halves = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25]]]))
    total, _ = label_loss(halves, jnp.asarray([[0]]), pad=PAD, smoothing=0.3)
    wanted = 0.7 * np.log(2) + 0.1 * (np.log(2) + 2 * np.log(4))
    assert float(total) == pytest.approx(wanted, rel=1e-6)


def test_bfloat16_losses_are_summed_in_float32():
    logits = jnp.zeros((1, 300, 3), jnp.bfloat16)
    total, count = label_loss(logits, jnp.zeros((1, 300), int), pad=PAD)
    assert (total.dtype, count.dtype) == (jnp.float32, jnp.float32)
    assert (float(total), float(count)) == (pytest.approx(300 * np.log(3), rel=1e-5), 300)


def test_pads_and_negative_labels_have_no_gradient():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, 3, 5)), jnp.float32)
    labels = jnp.array([[4, PAD, -1]])
    slope = jax.grad(lambda x: label_loss(x, labels, pad=PAD, smoothing=0.1)[0])(logits)
    assert np.any(slope[0, 0]) and not np.any(slope[0, 1:])


VOCAB = 300


@pytest.fixture(autouse=True)
def three_blocks(monkeypatch):
    """Blocks of 128, 128 and 44 tokens."""
    monkeypatch.setattr(linear_loss, "BLOCK", 128)


def readout_case(dtype="float32"):
    draw = np.random.default_rng(2)
    matrix, bias = draw.normal(size=(VOCAB, 4)), draw.normal(size=VOCAB)
    readout = Readout(jnp.asarray(matrix, "float32"), jnp.asarray(bias, "float32"))
    labels = draw.integers(-1, VOCAB, size=(8, 7)).astype(np.int32)
    labels[0, :4] = 127, 128, VOCAB - 1, PAD
    return readout, jnp.asarray(draw.normal(size=(8, 7, 4)), dtype), jnp.asarray(labels)


def in_chunks(chunk, smoothing=0.1):
    """Loss, count and gradients of `states_loss`."""

    def loss(readout, states, labels):
        total, count = states_loss(
            readout, states, labels, pad=PAD, smoothing=smoothing, chunk=chunk
        )
        return 3 * total / count, count

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def plain(readout, states, labels, smoothing=0.1):
    """The same, computed from all logits."""

    def loss(readout, states):
        logits = states @ readout.matrix.T + readout.bias
        total, count = label_loss(logits, labels, pad=PAD, smoothing=smoothing)
        return 3 * total / count, count

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(readout, states)


def assert_close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@pytest.mark.parametrize("chunk", [1, 24, 56])
def test_chunked_loss_matches_the_plain_loss(chunk):
    case = readout_case()
    assert_close(in_chunks(chunk)(*case), plain(*case))


def test_loss_without_smoothing_and_bias():
    (matrix, bias), *rest = readout_case()
    wanted, (by_readout, by_states) = plain(Readout(matrix, 0 * bias), *rest, smoothing=0.0)
    found = in_chunks(16, smoothing=0.0)(Readout(matrix), *rest)
    assert_close(found, (wanted, (Readout(by_readout.matrix), by_states)))


@pytest.mark.parametrize("real", [0, 16, 17, 56])
def test_chunks_of_pads_are_skipped(real, monkeypatch):
    readout, states, labels = readout_case()
    order = np.random.default_rng(3).permutation(labels.size)
    labels = jnp.full(labels.size, PAD).at[order[:real]].set(5).reshape(labels.shape)
    weigh, seen = linear_loss._weigh, []

    def counted(block, rows, labels):
        if block.first == 0:
            jax.debug.callback(lambda x: seen.append(int(x)), jnp.sum(labels != PAD))
        return weigh(block, rows, labels)

    monkeypatch.setattr(linear_loss, "_weigh", counted)
    total, _ = jax.jit(lambda *case: states_loss(*case, pad=PAD, chunk=16))(readout, states, labels)
    jax.effects_barrier()
    assert (len(seen), sum(seen)) == (-(-real // 16), real)
    logits = states @ readout.matrix.T + readout.bias
    assert float(total) == pytest.approx(float(label_loss(logits, labels, pad=PAD)[0]), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunked_loss_on_eight_devices_matches_the_plain_loss(chunk):
    case = readout_case()
    with jax.set_mesh(split_mesh()):
        program = in_chunks(chunk).lower(*case).compile()
        found = program(*case)
    assert "reduce-scatter" in program.as_text()
    assert_close(found, plain(*case))


@pytest.mark.parametrize(
    ("states", "platform", "precision", "sent"),
    [
        ("bfloat16", "cpu", None, "bf16"),
        ("float32", "cpu", None, "f32"),
        ("float32", "tpu", None, "bf16"),
        ("float32", "tpu", "highest", "f32"),
    ],
)
def test_matrix_is_gathered_in_the_matmul_dtype(states, platform, precision, sent):
    with jax.set_mesh(split_mesh()), jax.default_matmul_precision(precision):
        program = in_chunks(4).trace(*readout_case(states))
        text = program.lower(lowering_platforms=(platform,)).as_text()
    gathers = [line for line in text.splitlines() if "stablehlo.all_gather" in line]
    assert gathers and all(f"x{sent}>" in line for line in gathers)


def test_bfloat16_gradients_are_close_to_float32():
    case = readout_case("bfloat16")
    (_, _), (by_readout, by_states) = in_chunks(8)(*case)
    assert (by_readout.matrix.dtype, by_states.dtype) == (jnp.float32, jnp.bfloat16)
    _, (wanted, _) = plain(case[0], case[1].astype("float32"), case[2])
    np.testing.assert_allclose(by_readout.matrix, wanted.matrix, atol=0.02)


def test_small_gradients_accumulate_over_many_chunks():
    """In bfloat16, 256 + 1/2 is 256."""
    readout = Readout(jnp.zeros((2, 1)), jnp.zeros(2))
    case = jnp.ones((4, 256, 1), jnp.bfloat16), jnp.zeros((4, 256), int)
    total = lambda *case: states_loss(*case, pad=PAD, chunk=1)[0]  # noqa: E731
    value, (by_readout, by_states) = jax.jit(jax.value_and_grad(total, (0, 1)))(readout, *case)
    assert (value.dtype, float(value)) == (jnp.float32, pytest.approx(1024 * np.log(2), rel=1e-5))
    for leaf in jax.tree.leaves(by_readout):
        np.testing.assert_array_equal(leaf.ravel(), [-512, 512])
    assert not np.any(by_states)


def test_gradients_of_nearly_certain_labels_are_exact():
    """p = 0.9997 would be 1 in bfloat16, with zero gradient."""
    matrix, states = jnp.asarray([[8.0], [0.0]]), jnp.ones((1, 4, 1), jnp.bfloat16)
    total = lambda matrix: states_loss(  # noqa: E731
        Readout(matrix), states, jnp.zeros((1, 4), int), pad=PAD
    )[0]
    slope = 4 * jax.nn.sigmoid(-8.0)
    np.testing.assert_allclose(jax.grad(total)(matrix)[:, 0], [-slope, slope], rtol=5e-3)


def test_frozen_matrix_costs_no_gradient():
    readout, states, labels = readout_case()

    def products(of_matrix):
        def total(matrix, states):
            return states_loss(Readout(matrix, readout.bias), states, labels, pad=PAD)[0]

        argument = 0 if of_matrix else 1
        text = str(jax.make_jaxpr(jax.grad(total, argument))(readout.matrix, states))
        return text.count("dot_general")

    # For each of three blocks: the logits and the states' gradient; also the matrix's gradient.
    assert (products(of_matrix=False), products(of_matrix=True)) == (2 * 3, 3 * 3)


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
    scores = 3.0 * np.array([[1.0, 0.6], [0.0, 0.8]])  # cosines, whatever the vectors' lengths

    def log_softmax(x, axis):
        return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))

    own = [np.diag(log_softmax(scores, axis)).mean() for axis in (1, 0)]
    found = softmax_loss(jnp.asarray(texts), jnp.asarray(images), log_scale=jnp.log(3.0))
    assert float(found) == pytest.approx(-sum(own) / 2, rel=1e-5)


def test_retrieval_counts_ties_once_and_never_non_finite_scores():
    def accuracy(texts, images, mask):
        found = retrieval_sums(*(jnp.asarray(x, jnp.float32) for x in (texts, images, mask)))
        return float(found["accuracy"]), float(found["count"])

    axes = np.eye(3)
    assert accuracy(axes, 2 * axes, [1, 1, 1]) == (3, 3)
    # Similarities (1, 0), (0.8, 0.6): text 1 finds image 0, image 1 finds text 1.
    assert accuracy([(1, 0), (0.8, 0.6)], [(1, 0), (0, 1)], [1, 1]) == (1.5, 2)
    # All equal: only the first pair counts.
    assert accuracy(np.ones((3, 3)), np.ones((3, 3)), [1, 1, 1]) == (1, 3)
    assert accuracy(np.zeros((3, 3)), axes, [1, 1, 1]) == (0, 3)  # zero length: NaN
    assert accuracy(np.full((3, 3), np.nan), np.full((3, 3), np.nan), [1, 1, 1]) == (0, 3)
    assert accuracy(axes, axes, [1, 1, 0]) == (2, 2)
    assert accuracy([axes[0], np.nan * axes[1]], axes[:2], [1, 0]) == (1, 1)
