"""The m2mKD students of a NAC: its read-in, one mediator iteration, and its read-out.

Each has linear stitches to the meta model's width, and random but fixed codes and states. Students
are ordinary stages: the first takes images, the others take tokens of the meta model.
"""

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.state import fold_name
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac.blocks import BlockConfig, Propagator
from m2mkd_jax.nac.layers import NOISE, Linear
from m2mkd_jax.nac.network import ReadIn, ReadInConfig, ReadOut, ReadOutConfig
from m2mkd_jax.nac.tokenizer import TokenizerConfig


class ReadInStudent(nn.Module):
    """Outputs one token per image: the state of a single input latent, in the meta model's width.

    Parameters: `tokenizer`, `read_in`, `post_stitch`.

    Attributes:
      tokenizer, config, interface: see `ReadIn`.
      stitch_width: width of the meta model's tokens.
      seed: seed of the latent's code and states.
      dtype: compute dtype.
    """

    tokenizer: TokenizerConfig
    config: ReadInConfig
    interface: Interface
    stitch_width: int
    seed: int
    dtype: DTypeLike

    def setup(self):
        self.stage = ReadIn(self.tokenizer, self.config, self.interface, self.dtype)
        # Gives the parameters the same paths as in the whole NAC, which takes them over.
        nn.share_scope(self, self.stage)
        self.post_stitch = Linear(self.stitch_width, self.dtype)

    def __call__(self, x: Float[Array, "B I J X"], *, train: bool) -> Float[Array, "B 1 D"]:
        block = self.config.block
        codes = fixed_codes(self, self.seed, block.code_width)
        states = fixed_states(self, self.seed, x.shape[0], block.width, self.dtype)
        return self.post_stitch(self.stage(x, states, codes, train=train))

    def example(self, batch: int) -> jax.ShapeDtypeStruct:
        """Images."""
        side = self.interface.image_size
        return jax.ShapeDtypeStruct((batch, side, side, self.interface.channels), jnp.float32)


class MediatorStudent(nn.Module):
    """Treats the meta model's tokens as mediators that share one code: attention without a kernel,
    then an MLP.

    Parameters: `pre_stitch`, `attention`, `ffn`, `post_stitch`. The attribute `tokens` is the
    number of the meta model's tokens; see `ReadInStudent` for the others.
    """

    config: BlockConfig
    tokens: int
    stitch_width: int
    seed: int
    dtype: DTypeLike

    def setup(self):
        self.block = Propagator(self.config, self.dtype)
        nn.share_scope(self, self.block)
        self.pre_stitch = Linear(self.config.width, self.dtype)
        self.post_stitch = Linear(self.stitch_width, self.dtype)

    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B T D"]:
        codes = fixed_codes(self, self.seed, self.config.code_width)
        states = self.pre_stitch(x)
        # The same tokens receive and send, so both sides of the attention are stitched once.
        return self.post_stitch(self.block(states, codes, (states,), codes, train=train))

    def example(self, batch: int) -> jax.ShapeDtypeStruct:
        """Tokens of the meta model."""
        return jax.ShapeDtypeStruct((batch, self.tokens, self.stitch_width), self.dtype)


class ReadOutStudent(nn.Module):
    """Lets a single output latent attend to all tokens of the meta model, and pools it to logits.

    Parameters: `pre_stitch`, `attention`, `ffn`, `pooling`; see `MediatorStudent`.
    """

    config: ReadOutConfig
    labels: int
    tokens: int
    stitch_width: int
    seed: int
    dtype: DTypeLike

    def setup(self):
        self.stage = ReadOut(self.config, self.labels, self.dtype)
        nn.share_scope(self, self.stage)
        self.pre_stitch = Linear(self.config.block.width, self.dtype)

    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Float[Array, "B L"]:
        block = self.config.block
        codes = fixed_codes(self, self.seed, block.code_width)
        states = fixed_states(self, self.seed, x.shape[0], block.width, self.dtype)
        return self.stage(states, codes, (self.pre_stitch(x),), codes, train=train)

    def example(self, batch: int) -> jax.ShapeDtypeStruct:
        """Tokens of the meta model."""
        return jax.ShapeDtypeStruct((batch, self.tokens, self.stitch_width), self.dtype)


def fixed_codes(module: nn.Module, seed: int, width: int) -> Float[Array, "1 Z"]:
    """Returns the one code that a student's latents share: a normal draw, the same in every call.

    The collection "noise" can replace it, as `codes`.
    """
    if module.has_variable(NOISE, "codes"):
        return module.get_variable(NOISE, "codes")
    return jax.random.normal(_key(seed, "codes"), (1, width))


def fixed_states(
    module: nn.Module, seed: int, batch: int, width: int, dtype: DTypeLike
) -> Float[Array, "B 1 D"]:
    """Returns the initial states of a student's latent: normal draws, the same in every call.

    They differ between the places of a batch. The collection "noise" can replace them, as `states`.
    """
    if module.has_variable(NOISE, "states"):
        return module.get_variable(NOISE, "states").astype(dtype)
    # A row of the draw does not depend on the number of rows, as long as jax's threefry is
    # partitionable (the default): training and evaluation may have other batches.
    return jax.random.normal(_key(seed, "states"), (batch, 1, width)).astype(dtype)


def _key(seed: int, name: str) -> jax.Array:
    # Neither the stage nor the process enters the key: all students of a run have the same code, in
    # every process and after resuming.
    return fold_name(jax.random.key(seed), f"nac student {name}")
