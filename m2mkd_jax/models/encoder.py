"""The pre-norm encoder shared by ViT teachers, meta models and V-MoE students, cut into stages."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from common_jax.config import FieldError
from common_jax.mesh import constrain
from common_jax.nn import layers
from common_jax.nn.attention import SelfAttention
from common_jax.nn.mlp import ACTIVATIONS, INIT, Mlp
from common_jax.nn.norm import LayerNorm
from common_jax.nn.patches import PatchEmbedding
from common_jax.nn.pooling import AttentionPool
from m2mkd_jax.models.pooling import ATTENTION, POOLS
from m2mkd_jax.models.stitch import Stitch
from m2mkd_jax.moe.config import MoeConfig
from m2mkd_jax.moe.layer import MoeMlp
from m2mkd_jax.stages import Network, Place

STREAMS = ("drop_path", "gate")  # random streams that a block may draw from in training


@dataclasses.dataclass(frozen=True)
class Interface:
    """Input and output of a network: square images, channels last, and logits over `labels`."""

    image_size: int
    channels: int
    labels: int


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Settings shared by all blocks of a network, and the settings of its embedding and head.

    `hidden` is the hidden width of MLPs and experts; for the other fields see `vit.ViTConfig`.
    """

    patch: int
    width: int
    heads: int
    hidden: int
    qkv_bias: bool
    norm_eps: float
    activation: str = "gelu"
    layer_scale: float | None = None
    patch_bias: bool = True
    class_token: bool = True
    registers: int = 0
    positions: str = "all"
    norm_pre: bool = False
    pool: str = "class"
    norm_after_pool: bool = False
    attention: str = "auto"
    remat: bool = False
    scan_layers: bool = False

    def __post_init__(self):
        if self.width % self.heads:
            raise FieldError(f"heads={self.heads} must divide width={self.width}")
        if not self.class_token and self.pool in ("class", "class_and_mean"):
            raise FieldError(
                f"pool={self.pool!r} needs a class token, but class_token=False: give pool='mean' "
                "or 'attention', or class_token=True"
            )
        if not self.class_token and self.positions == "class":
            raise FieldError(
                "positions='class' gives the class token a position, but class_token=False: give "
                "positions='patches', or class_token=True"
            )
        if self.norm_after_pool and self.pool == "class_and_mean":
            raise FieldError(
                "norm_after_pool=True norms a vector of width D, but pool='class_and_mean' gives "
                "2 D: leave norm_after_pool out, or give another pool"
            )

    @property
    def leading(self) -> int:
        """Number of tokens before the patches: the class token, then the registers."""
        return self.class_token + self.registers

    @property
    def leading_positions(self) -> int:
        """Number of rows of the position table before the patches."""
        return {"all": self.leading, "class": 1, "patches": 0}[self.positions]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Settings of a single block.

    Attributes:
      drop_path: probability of dropping each branch in training.
      moe: the mixture of experts in place of the MLP; None for a dense block.
      pre_stitch: input width of a stitch before the block; None for no stitch.
      post_stitch: output width of a stitch after the block; None for no stitch.
    """

    drop_path: float = 0.0
    moe: MoeConfig | None = None
    pre_stitch: int | None = None
    post_stitch: int | None = None


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) or x + moe(norm(x)), between optional stitches.

    Layer scale, if the encoder has it, multiplies the residual branches by the learned vectors
    `scale1` and `scale2` (D).
    """

    encoder: EncoderConfig
    config: BlockConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T _"], train: bool, rate: Float[Array, ""] | None = None
    ) -> Float[Array, "B T _"]:
        """In a loop over blocks, the traced `rate` replaces `config.drop_path`."""
        encoder, config = self.encoder, self.config
        # A stitch changes the width, so it replaces x instead of adding to it.
        if config.pre_stitch is not None:
            x = Stitch(encoder.width, self.dtype, name="pre_stitch")(x)
        attention = SelfAttention(
            encoder.heads,
            encoder.qkv_bias,
            self.dtype,
            attention=encoder.attention,
            name="attention",
        )
        y = attention(self._norm("norm1", x))
        x = x + self._drop_path(self._scale("scale1", y), train, rate)
        y = self._norm("norm2", x)
        if config.moe is None:
            y = Mlp(encoder.hidden, self.dtype, ACTIVATIONS[encoder.activation], name="mlp")(y)
        else:
            y = MoeMlp(config.moe, encoder.hidden, self.dtype, name="moe")(y, train=train)
        y = self._drop_path(self._scale("scale2", y), train, rate)
        x = constrain(x + y, "batch", "tokens", "width")
        if config.post_stitch is not None:
            x = Stitch(config.post_stitch, self.dtype, name="post_stitch")(x)
        return x

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        return LayerNorm(self.encoder.norm_eps, self.dtype, name=name)(x)

    def _scale(self, name: str, branch: jax.Array) -> jax.Array:
        start = self.encoder.layer_scale
        if start is None:
            return branch
        gain = self.param(name, nn.initializers.constant(start), branch.shape[-1:])
        return branch * gain.astype(branch.dtype)

    def _drop_path(
        self, branch: jax.Array, train: bool, rate: Float[Array, ""] | None
    ) -> jax.Array:
        if not train or (rate is None and self.config.drop_path == 0):
            return branch
        rate = self.config.drop_path if rate is None else rate
        # The two branches of a block are dropped independently, as in the original: linen folds the
        # number of earlier draws into each key.
        uniform = jax.random.uniform(self.make_rng("drop_path"), (branch.shape[0], 1, 1))
        return drop_path(branch, uniform, rate)


class EncoderStage(nn.Module):
    """Consecutive blocks; `embeds` adds the embedding before them, `classifies` adds norm, pooling
    and head after them.

    Sows under `intermediates`: `embedded` (B, T, D); `block`, one (B, T, D) per block; `features`
    (B, D), or (B, 2 D) for pool "class_and_mean".
    """

    encoder: EncoderConfig
    interface: Interface
    blocks: tuple[BlockConfig, ...]
    embeds: bool
    classifies: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.embeds:
            x = self._embed(x)
            self.sow("intermediates", "embedded", x)
        x = self._run_blocks(x, train)
        if not self.classifies:
            return x
        x = self._pool(x)
        self.sow("intermediates", "features", x)
        # In bfloat16 many of 1,000 logits would tie.
        exact = jnp.promote_types(self.dtype, jnp.float32)
        logits = nn.Dense(self.interface.labels, kernel_init=INIT, dtype=exact, name="head")(x)
        return constrain(logits, "batch", "labels")

    def _run_blocks(self, x: Float[Array, "B T _"], train: bool) -> Float[Array, "B T _"]:
        """Runs the blocks; with `scan_layers`, identical consecutive blocks as one loop."""
        # A loop stacks parameters that exist. They are initialised block by block, so that their
        # paths and values are the same with and without loops.
        loops = self.encoder.scan_layers and not self.is_initializing()
        # Argument 2, counting `self`, is `train`: traced, it could not decide what is computed.
        block = nn.remat(Block, static_argnums=(2,)) if self.encoder.remat else Block
        blocks = [
            (config, block(self.encoder, config, self.dtype, name=f"block_{i}"))
            for i, config in enumerate(self.blocks)
        ]
        # Rates may differ within a loop, which gets them as an array; all other settings are part
        # of the program.
        for _, alike in itertools.groupby(
            blocks, key=lambda pair: dataclasses.replace(pair[0], drop_path=0.0)
        ):
            configs, modules = zip(*alike, strict=True)
            if loops and len(modules) > 1:
                rates = [config.drop_path for config in configs]
                # Blocks draw for any traced rate, even 0: pass none without stochastic depth.
                each = (jnp.asarray(rates),) if any(rates) else ()
                remat = self.encoder.remat
                x, outputs = layers.scan(modules, x, train, remat=remat, each=each, streams=STREAMS)
            else:
                outputs = [x := module(x, train) for module in modules]
            for output in outputs:
                self.sow("intermediates", "block", output)
        return x

    def example(self, batch: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the input: images if the stage embeds, else tokens of its width."""
        interface = self.interface
        if self.embeds:
            size = interface.image_size
            return jax.ShapeDtypeStruct((batch, size, size, interface.channels), jnp.float32)
        # With a stitch before it, the first block takes tokens as wide as the meta model's.
        width = self.blocks[0].pre_stitch or self.encoder.width
        return jax.ShapeDtypeStruct((batch, tokens(self.encoder, interface), width), self.dtype)

    def _pool(self, x: Float[Array, "B T D"]) -> Float[Array, "B _"]:
        """The input of the head: tokens pooled into a vector, normed before or after pooling."""
        encoder = self.encoder
        expected = tokens(encoder, self.interface)
        if encoder.pool != "class" and encoder.leading and x.shape[1] != expected:
            # A stage inside another network's tokens may face other leading tokens than its own.
            raise ValueError(
                f"pool={encoder.pool!r} expects {encoder.leading} leading tokens and "
                f"{expected - encoder.leading} patches, but got {x.shape[1]} tokens: config.meta, "
                "config.teacher and config.model need the same patch, class_token and registers"
            )
        norm = LayerNorm(encoder.norm_eps, self.dtype, name="norm")
        if encoder.pool == "class" or encoder.norm_after_pool:
            # For the class token, pooling first gives the same and skips the norms of all others.
            return norm(self._pool_tokens(x))
        return self._pool_tokens(norm(x))

    def _pool_tokens(self, x: Float[Array, "B T D"]) -> Float[Array, "B _"]:
        encoder = self.encoder
        patches = x[:, encoder.leading :]
        if encoder.pool != ATTENTION:
            return POOLS[encoder.pool](x, patches)
        return AttentionPool(
            encoder.heads,
            encoder.hidden,
            ACTIVATIONS[encoder.activation],
            encoder.norm_eps,
            self.dtype,
            name="pool",
        )(patches)

    def _embed(self, images: Float[Array, "B I J X"]) -> Float[Array, "B T D"]:
        expected = self.example(images.shape[0]).shape
        if images.shape != expected:
            raise ValueError(
                f"images have shape {images.shape}, but the model takes {expected}; check "
                "config.data.image_size and config.data.channels"
            )
        encoder, width = self.encoder, self.encoder.width
        patches = PatchEmbedding(
            encoder.patch, width, self.dtype, encoder.patch_bias, name="patches"
        )(images)
        # Initial values depend on the order in which parameters are created. Registers come last,
        # so that they do not change the values of the others.
        leading = [self.param("cls_token", INIT, (1, 1, width))] if encoder.class_token else []
        rows = encoder.leading_positions + patches.shape[1]
        positions = self.param("pos_embed", INIT, (1, rows, width))
        if encoder.registers:
            leading.append(self.param("register_tokens", INIT, (1, encoder.registers, width)))
        batched = (
            jnp.broadcast_to(token, (images.shape[0], *token.shape[1:])).astype(patches.dtype)
            for token in leading
        )
        x = jnp.concatenate([*batched, patches], axis=1)
        x = x + self._pad_positions(jnp.asarray(positions)).astype(patches.dtype)
        if encoder.norm_pre:
            x = LayerNorm(encoder.norm_eps, self.dtype, name="norm_pre")(x)
        return constrain(x, "batch", "tokens", "width")

    def _pad_positions(self, positions: Float[Array, "1 _ D"]) -> Float[Array, "1 T D"]:
        """The position table with a row of zeros for each leading token without a position."""
        start, stop = self.encoder.leading_positions, self.encoder.leading
        if start == stop:
            return positions
        zeros = jnp.zeros((1, stop - start, positions.shape[-1]), positions.dtype)
        return jnp.concatenate([positions[:, :start], zeros, positions[:, start:]], axis=1)


def build(
    encoder: EncoderConfig,
    interface: Interface,
    stages: Iterable[tuple[BlockConfig, ...]],
    dtype: DTypeLike,
) -> Network:
    """The network whose stage i runs the blocks `stages[i]`; the first embeds and the last
    classifies.

    Raises:
      FieldError: for a stage without blocks, an image side that is not a multiple of the patch, or
        an activation other than "gelu" if there are experts.
    """
    if interface.image_size % encoder.patch:
        raise FieldError(
            f"patch={encoder.patch} must divide config.data.image_size={interface.image_size}"
        )
    stages = tuple(stages)
    # Refused, not ignored: in the original, a stage of depth 0 takes all blocks that follow.
    if not all(stages):
        raise FieldError(f"depths={tuple(map(len, stages))} must all be at least 1")
    if encoder.activation != "gelu" and any(block.moe for blocks in stages for block in blocks):
        raise FieldError(
            f"activation={encoder.activation!r} must be 'gelu' if blocks have experts, which "
            "always use it: leave it out, or give moe_blocks='none'"
        )
    return Network(
        tuple(
            EncoderStage(encoder, interface, blocks, i == 0, i == len(stages) - 1, dtype)
            for i, blocks in enumerate(stages)
        )
    )


def with_stitches(
    stages: Sequence[tuple[BlockConfig, ...]], width: int | None
) -> list[tuple[BlockConfig, ...]]:
    """The blocks of all stages, with stitches to and from `width` between them; None adds none."""
    stitched = []
    for stage, blocks in enumerate(stages):
        place, blocks = Place.of(stage, len(stages)), list(blocks)
        # A stage without blocks is left to `build`, which names the field in its error.
        if blocks and place in (Place.MIDDLE, Place.LAST):
            blocks[0] = dataclasses.replace(blocks[0], pre_stitch=width)
        if blocks and place in (Place.FIRST, Place.MIDDLE):
            blocks[-1] = dataclasses.replace(blocks[-1], post_stitch=width)
        stitched.append(tuple(blocks))
    return stitched


def ramp_drop_path(network: Network, rate: float) -> Network:
    """The network with stochastic depth that increases linearly from 0 at its first block to `rate`
    at its last."""
    rates = iter(drop_path_rates(rate, sum(len(stage.blocks) for stage in network.stages)))
    stages = []
    for stage in network.stages:
        blocks = (dataclasses.replace(block, drop_path=next(rates)) for block in stage.blocks)
        stages.append(stage.clone(blocks=tuple(blocks)))
    return Network(tuple(stages))


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """rate * i / (depth - 1) for block i; a single block gets 0."""
    return [rate * i / (depth - 1) if depth > 1 else 0.0 for i in range(depth)]


def drop_path(
    branch: Float[Array, "B T D"], uniform: Float[Array, "B 1 1"], rate: float | Float[Array, ""]
) -> Float[Array, "B T D"]:
    """Stochastic depth: branch / keep * floor(keep + u), keep = 1 - rate, u uniform in [0, 1) per
    example."""
    # keep + u is at least float32, for any dtype of the branch: in bfloat16 it would often round up
    # to 1, and too few branches would be dropped.
    keep = 1.0 - rate
    return branch / jnp.asarray(keep, branch.dtype) * jnp.floor(keep + uniform).astype(branch.dtype)


def tokens(encoder: EncoderConfig, interface: Interface) -> int:
    """Number of tokens in a network's blocks: class token, registers and patches together."""
    return encoder.leading + (interface.image_size // encoder.patch) ** 2
