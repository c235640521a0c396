"""`jax.lax.ragged_dot_general` with vmap and forward derivatives, which JAX supports only in part.

Programs are traced for all platforms, so what fails here fails on CPUs and GPUs, too.
"""

import jax
import jax.numpy as jnp
from jax.lax import RaggedDotDimensionNumbers
from jaxtyping import Array, Int


def ragged_product(
    a: Array,
    b: Array,
    sizes: Int[Array, " E"],
    *,
    contract: tuple[int, int],
    groups: list[int],
    dtype: jnp.dtype,
) -> Array:
    """The product of rows `a`, which come in E groups of these sizes, and `b`.

    Args:
      contract: the axes of `a` and `b` to sum over.
      groups: the axis of `b` that numbers the groups' matrices; empty if `b` has rows as well.
      dtype: dtype of the result.
    """
    dims = RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=groups,
    )

    @jax.custom_batching.custom_vmap
    def one(a: Array, b: Array, sizes: Array) -> Array:
        return jax.lax.ragged_dot_general(a, b, sizes, dims, preferred_element_type=dtype)

    # One product after another.
    @one.def_vmap
    def _(count: int, batched: list[bool], *given: Array) -> tuple[Array, bool]:
        def example(i: Array) -> Array:
            return one(*(x[i] if many else x for x, many in zip(given, batched, strict=True)))

        return jax.lax.map(example, jnp.arange(count)), True

    # Explicit, since JAX cannot differentiate and then batch a custom_vmap.
    product = jax.custom_jvp(one)

    @product.defjvp
    def _(given: tuple, tangents: tuple) -> tuple[Array, Array]:
        (a, b, sizes), (da, db, _) = given, tangents
        return product(a, b, sizes), product(da, b, sizes) + product(a, db, sizes)

    return product(a, b, sizes)
