"""The transformer's MLP and its GELU."""

import math

import numpy as np
from jax import numpy as jnp
from tiny import fill

from common_jax.nn.mlp import Mlp, gelu


def test_gelu_is_exact():
    x = np.array([-4.0, -1.5, -0.5, 0.0, 0.3, 1.0, 2.5, 6.0])
    wanted = [z * (1 + math.erf(z / math.sqrt(2))) / 2 for z in x]
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), wanted, rtol=1e-5, atol=1e-6)


def test_mlp_projects_up_activates_and_projects_down():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    for activation in (gelu, jnp.abs):
        layer = Mlp(5, jnp.float32, activation)
        params = fill(layer.init, x)
        up, down = params["params"]["up"], params["params"]["down"]
        assert up["kernel"].shape == (4, 5) and down["kernel"].shape == (5, 4)
        hidden = activation(x @ up["kernel"] + up["bias"])
        wanted = hidden @ down["kernel"] + down["bias"]
        np.testing.assert_allclose(layer.apply(params, x), wanted, rtol=1e-4, atol=1e-5)
