"""A network of toy stages: the key of every stage, what is run, what is returned; and stitches by
hand."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from common_jax.state import fold_name
from m2mkd_jax.models.stitch import Stitch
from m2mkd_jax.stages import Network, stage_name, stage_number

WIDTH = 3


class Layer(nn.Module):
    """x kernel; in training, plus a draw from each stream, which is recorded."""

    @nn.compact
    def __call__(self, x, *, train):
        kernel = self.param("kernel", nn.initializers.normal(1.0), (WIDTH, WIDTH))
        if train:
            draws = {name: jax.random.normal(self.make_rng(name), x.shape) for name in ("a", "b")}
            for name, draw in draws.items():
                self.sow("moe", name, draw)
        self.sow("other", "x", x)
        return x @ kernel + (draws["a"] if train else 0)

    def example(self, batch):
        return jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32)


NETWORK = Network((Layer(), Layer(), Layer()))
KEY = jax.random.key(5)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, WIDTH)), jnp.float32)
PARAMS = NETWORK.init(KEY)


def test_stage_number_reads_only_stage_names():
    assert [stage_number(stage_name(stage)) for stage in (0, 9, 10)] == [0, 9, 10]
    for name in ("graph", "stage_", "stage_01", "stage_-1", "stage_1/head", "module_1"):
        with pytest.raises(ValueError, match="is not the name of a stage"):
            stage_number(name)


def test_stage_initialisation_folds_in_the_stage_name():
    for stage in range(3):
        name = f"stage_{stage}"
        want = Layer().init(fold_name(KEY, name), X, train=False)["params"]
        jax.tree.map(np.testing.assert_array_equal, PARAMS[name], want)
    kernels = [PARAMS[name]["kernel"] for name in PARAMS]
    assert len(np.unique(np.round(kernels, 6))) == 3 * WIDTH**2  # no two are equal
    other = NETWORK.init(jax.random.key(6))
    assert np.all(other["stage_1"]["kernel"] != PARAMS["stage_1"]["kernel"])


def test_only_requested_stages_are_initialised():
    assert list(PARAMS) == ["stage_0", "stage_1", "stage_2"]
    assert list(NETWORK.init(KEY, only=(2, 0))) == ["stage_2", "stage_0"]
    assert NETWORK.init(KEY, only=()) == {}


def draws_of(rngs, **span):
    _, recorded = NETWORK.apply(PARAMS, X, train=True, rngs=rngs, **span)
    return {
        (stage, name): np.asarray(value[0])
        for stage, records in recorded.items()
        for name, value in records["moe"].items()
    }


def test_draws_are_independent_across_stages_and_streams():
    rngs = {"a": jax.random.key(1), "b": jax.random.key(2)}
    draws = draws_of(rngs)
    assert len(draws) == 6
    assert len(np.unique(list(draws.values()))) == 6 * X.size
    moved = draws_of(rngs | {"b": jax.random.key(3)})
    for place, draw in draws.items():
        assert np.all(moved[place] == draw) == (place[1] == "a"), place
        assert np.any(moved[place] == draw) == (place[1] == "a"), place
    # A stage's draws do not depend on which other stages are run.
    alone = draws_of(rngs, start=1, stop=2)
    assert set(alone) == {("stage_1", "a"), ("stage_1", "b")}
    for place, draw in alone.items():
        np.testing.assert_array_equal(draw, draws[place])


def test_stage_keys_fold_the_stage_name_into_the_stream_key():
    rngs = {"a": jax.random.key(1), "b": jax.random.key(2)}
    y, _ = NETWORK.apply(PARAMS, X, start=2, train=True, rngs=rngs)
    folded = {stream: fold_name(key, "stage_2") for stream, key in rngs.items()}
    want = Layer().apply(
        {"params": PARAMS["stage_2"]}, X, train=True, rngs=folded, mutable=["moe", "other"]
    )[0]
    np.testing.assert_array_equal(y, want)


def test_keys_are_unused_in_evaluation():
    rngs = {"a": jax.random.key(1), "b": jax.random.key(2)}
    with_keys, _ = NETWORK.apply(PARAMS, X, rngs=rngs)
    np.testing.assert_array_equal(with_keys, NETWORK.apply(PARAMS, X)[0])


@pytest.mark.parametrize("start", range(4))
@pytest.mark.parametrize("stop", [*range(4), None])
def test_apply_runs_stages_from_start_up_to_stop(start, stop):
    want = np.asarray(X)
    for stage in range(start, 3 if stop is None else stop):
        want = want @ np.asarray(PARAMS[stage_name(stage)]["kernel"])
    got, recorded = NETWORK.apply(PARAMS, X, start=start, stop=stop)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert list(recorded) == [stage_name(i) for i in range(start, 3 if stop is None else stop)]


def test_records_are_returned_by_stage():
    _, recorded = NETWORK.apply(PARAMS, X, record=("other",))
    (first,) = recorded["stage_0"]["other"]["x"]
    np.testing.assert_array_equal(first, X)
    (second,) = recorded["stage_1"]["other"]["x"]
    np.testing.assert_allclose(second, X @ PARAMS["stage_0"]["kernel"], rtol=1e-5, atol=1e-6)
    rngs = {"a": jax.random.key(1), "b": jax.random.key(2)}
    _, recorded = NETWORK.apply(PARAMS, X, train=True, rngs=rngs)
    assert all(list(records) == ["moe"] for records in recorded.values())


def test_a_stitch_by_hand():
    """(x - mean) / sqrt(var + 1e-5), times gain plus bias, then a linear layer; no residual."""
    x = np.asarray([[[0.0, 0.02, 0.04], [1.0, -1.0, 3.0]]])
    params = {
        "norm": {"scale": np.asarray([1.0, 2.0, 0.5]), "bias": np.asarray([0.1, 0.0, -0.2])},
        "linear": {"kernel": np.asarray([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]]), "bias": np.ones(2)},
    }
    # The first token's variance is 0.0008 / 3, so that 1e-6 instead of 1e-5 would show.
    centred = np.asarray([[-0.02, 0.0, 0.02], [0.0, -2.0, 2.0]])
    deviation = np.sqrt(np.asarray([[0.0008 / 3], [8 / 3]]) + 1e-5)
    normed = centred / deviation * params["norm"]["scale"] + params["norm"]["bias"]
    want = normed @ params["linear"]["kernel"] + 1
    got = Stitch(2, jnp.float32).apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got[0], want, rtol=1e-5)


def test_stitch_initialisation():
    x = jnp.zeros((1, 2, 64))
    params = Stitch(128, jnp.float32).init(jax.random.key(0), x)["params"]
    np.testing.assert_array_equal(params["norm"]["scale"], np.ones(64))
    for part in ("norm", "linear"):
        assert not np.any(params[part]["bias"])
    kernel = params["linear"]["kernel"]
    assert kernel.shape == (64, 128)
    assert np.std(kernel) == pytest.approx(0.02, rel=0.05)
    assert abs(np.mean(kernel)) < 1e-3
    half = Stitch(128, jnp.bfloat16).apply({"params": params}, x)
    assert half.dtype == jnp.bfloat16
