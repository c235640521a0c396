"""Stages of one ViT in place of another ViT's: conversion between their token layouts.

Different widths are bridged by stitches, which belong to the stage; the conversions here have no
parameters.
"""

import dataclasses

import jax
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Layout:
    """The tokens between two stages of a ViT: the class token, registers, and the patches of a
    square grid in raster order.

    Attributes:
      class_token: whether there is a class token.
      registers: number of registers.
      side: side of the grid, in patches.
    """

    class_token: bool
    registers: int
    side: int

    @property
    def count(self) -> int:
        """The number of tokens T."""
        return self.class_token + self.registers + self.side**2

    def __str__(self) -> str:
        parts = ["class token"] * self.class_token
        parts += [f"{self.registers} registers"] * bool(self.registers)
        return ", ".join([*parts, f"{self.side} x {self.side} patches"])


def convert_tokens(x: Float[Array, "B T D"], own: Layout, other: Layout) -> Float[Array, "B S D"]:
    """Converts tokens to another layout.

    The grid of patches is resized with `jax.image.resize`: linear interpolation to a larger grid,
    antialiased with a triangle kernel to a smaller one. A missing class token or register is filled
    with the mean of the patches; a surplus one is dropped.
    """
    if own == other:
        return x
    leading = own.class_token + own.registers
    own_class, own_registers, patches = jnp.split(x, (own.class_token, leading), axis=1)
    mean = jnp.mean(patches, axis=1, keepdims=True)
    class_token = own_class if own.class_token else mean
    missing = max(other.registers - own.registers, 0)
    grid = patches.reshape(len(x), own.side, own.side, -1)
    grid = jax.image.resize(grid, (len(x), other.side, other.side, x.shape[-1]), "linear")
    # As slice bounds, booleans keep one class token or none.
    return jnp.concatenate(
        [
            class_token[:, : other.class_token],
            own_registers[:, : other.registers],
            jnp.repeat(mean, missing, axis=1),
            grid.reshape(len(x), other.side**2, -1),
        ],
        axis=1,
    )


class BridgedStage(nn.Module):
    """A stage wrapped to take and return tokens in another layout than its own; images and logits
    pass unchanged. Its parameters are those of the stage.

    Attributes:
      stage: the stage.
      own, outer: layouts of the stage's own tokens, and of the tokens around it.
      embeds, classifies: whether it takes images, and whether it returns logits.
    """

    stage: nn.Module
    own: Layout
    outer: Layout
    embeds: bool
    classifies: bool

    def setup(self):
        # Keeps the paths of the parameters the same as without the wrapper.
        nn.share_scope(self, self.stage)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not self.embeds:
            x = convert_tokens(x, self.outer, self.own)
        x = self.stage(x, train=train)
        return x if self.classifies else convert_tokens(x, self.own, self.outer)

    def example(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the input: that of the stage, with the outer number of tokens."""
        example = self.stage.example(batch)
        if self.embeds:
            return example
        return jax.ShapeDtypeStruct((batch, self.outer.count, example.shape[-1]), example.dtype)
