"""The pre-norm encoder-decoder with tied embeddings of mBART, M2M-100 and NLLB-200.

The decoder takes embeddings, not ids, so that a prefix of vectors can precede the tokens.
"""

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from cliptrans_jax.models.attention import INIT, CrossAttention, DecoderAttention
from cliptrans_jax.translators.translator import Cache, LayerCache, require_length
from common_jax.config import FieldError, Section
from common_jax.mesh import constrain
from common_jax.nn import layers
from common_jax.nn.attention import Implementation, SelfAttention
from common_jax.nn.mlp import Mlp, gelu
from common_jax.nn.norm import LayerNorm
from common_jax.ranges import BelowOne, Count, Size

EPSILON = 1e-5  # torch's default; flax's is 1e-6
ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = types.MappingProxyType(
    {"gelu": gelu, "relu": nn.relu}
)


@dataclasses.dataclass(frozen=True)
class TransformerConfig(Section):
    """Sizes and special ids. What else distinguishes a kind of network are class attributes.

    Attributes:
      activation: activation of the MLPs, a key of ACTIVATIONS.
      learned_positions: whether position embeddings are learned; else they are sinusoidal.
      embedding_norm: whether embeddings are normalised before the first layer.
      first_row: row of the position table, learned or sinusoidal, of the first token.
      vocab: number of tokens, language codes included.
      width: width D of a token.
      encoder_layers, decoder_layers: number of layers.
      encoder_heads, decoder_heads: attention heads.
      encoder_hidden, decoder_hidden: hidden widths F of the MLPs.
      positions: longest sequence, including the decoder's prefix.
      dropout: dropout rate in training, of embeddings and of every branch's output.
      scale_embedding: whether token embeddings are multiplied by sqrt(width).
      pad, eos, start: ids of padding, end of sentence, and the first token of decoding.
      attention: implementation of attention, except in decoding: "auto", a fused kernel on GPUs and
        TPUs where it is faster, XLA elsewhere; "xla"; or "cudnn", in bfloat16 on GPUs only.
      remat: recomputes every layer in the backward pass instead of storing its activations.
      scan_layers: scans over the layers of the encoder and of the decoder, which compiles faster
        but draws other random numbers. Decoding never scans.
    """

    activation: ClassVar[str]
    learned_positions: ClassVar[bool]
    embedding_norm: ClassVar[bool]
    first_row: ClassVar[int]

    vocab: Size
    width: Size = 1024
    encoder_layers: Size = 12
    decoder_layers: Size = 12
    encoder_heads: Size = 16
    decoder_heads: Size = 16
    encoder_hidden: Size = 4096
    decoder_hidden: Size = 4096
    positions: Size = 1024
    dropout: BelowOne = 0.1
    scale_embedding: bool = True
    pad: Count = 1
    eos: Count = 2
    start: Count = 2
    attention: Implementation = "auto"
    remat: bool = False
    scan_layers: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("encoder_heads", "decoder_heads"):
            if self.width % getattr(self, name):
                raise FieldError(f"{name}={getattr(self, name)} must divide width={self.width}")
        for name in ("pad", "eos", "start"):
            if getattr(self, name) >= self.vocab:
                raise FieldError(f"{name}={getattr(self, name)} must be below vocab={self.vocab}")


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of a layer."""

    heads: int
    hidden: int
    width: int
    dropout: float
    attention: str
    activation: Callable[[jax.Array], jax.Array]
    dtype: Any


class EncoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    sizes: _Sizes

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], visible: Bool[Array, "B 1 1 S"], train: bool
    ) -> Float[Array, "B S D"]:
        sizes = self.sizes
        drop = nn.Dropout(sizes.dropout, deterministic=not train)
        attention = SelfAttention(
            sizes.heads, True, sizes.dtype, attention=sizes.attention, name="attention"
        )
        x = x + drop(attention(_norm(sizes.dtype, "attention_norm")(x), visible))
        mlp = Mlp(sizes.hidden, sizes.dtype, sizes.activation, name="mlp")
        x = x + drop(mlp(_norm(sizes.dtype, "mlp_norm")(x)))
        return constrain(x, "batch", "tokens", "width")


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += cross_attention(norm(x), states); x += mlp(norm(x))."""

    sizes: _Sizes

    # `setup`, not `compact`, since three methods share the submodules.
    def setup(self):
        sizes = self.sizes
        shape = sizes.width, sizes.heads, sizes.dtype, sizes.attention
        self.attention = DecoderAttention(*shape)
        self.cross_attention = CrossAttention(*shape)
        self.mlp = Mlp(sizes.hidden, sizes.dtype, sizes.activation)
        self.attention_norm = _norm(sizes.dtype)
        self.cross_attention_norm = _norm(sizes.dtype)
        self.mlp_norm = _norm(sizes.dtype)
        self.drop = nn.Dropout(sizes.dropout)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        states: Float[Array, "B S D"],
        visible: Bool[Array, "#B 1 T T"],
        states_visible: Bool[Array, "B 1 1 S"],
        train: bool,
    ) -> Float[Array, "B T D"]:
        own, _ = self.attention(self.attention_norm(x), visible)
        x = x + self.drop(own, deterministic=not train)
        # Only x is normalised: `states` are the result of the encoder's last norm.
        across = self.cross_attention(self.cross_attention_norm(x), states, states_visible)
        x = x + self.drop(across, deterministic=not train)
        x = x + self.drop(self.mlp(self.mlp_norm(x)), deterministic=not train)
        return constrain(x, "batch", "tokens", "width")

    def prefill(
        self,
        x: Float[Array, "B T D"],
        states: Float[Array, "B S D"],
        visible: Bool[Array, "#B 1 T T"],
        states_visible: Bool[Array, "B 1 1 S"],
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """`__call__` for inference; also returns the keys and values."""
        own, memory = self.attention(self.attention_norm(x), visible)
        x = x + own
        # Not as in `__call__`: the cache needs these keys and values, so they are computed once.
        source = self.cross_attention.remember(states)
        x = x + self.cross_attention.recall(self.cross_attention_norm(x), source, states_visible)
        return x + self.mlp(self.mlp_norm(x)), (memory, source)

    def extend(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache,
        slot: jax.Array,
        visible: Bool[Array, "B 1 T R"],
        states_visible: Bool[Array, "B 1 1 S"],
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """`prefill` for more tokens, which are written to the cache from `slot` on."""
        memory, source = cache
        own, memory = self.attention.extend(self.attention_norm(x), memory, slot, visible)
        x = x + own
        x = x + self.cross_attention.recall(self.cross_attention_norm(x), source, states_visible)
        return x + self.mlp(self.mlp_norm(x)), (memory, source)


class _Half(nn.Module):
    """norm(layers(norm(embeddings + positions))), for an encoder or decoder. Some kinds lack the
    inner norm."""

    config: TransformerConfig
    dtype: DTypeLike

    def _set_up(self, layer: type[nn.Module], count: int, heads: int, hidden: int, train: int):
        """Makes the submodules. `train` is the index of a layer's argument of that name, counting
        self, which must stay a Python bool under remat."""
        config = self.config
        shared = config.dropout, config.attention, ACTIVATIONS[config.activation], self.dtype
        sizes = _Sizes(heads, hidden, config.width, *shared)
        layer = nn.remat(layer, static_argnums=(train,)) if config.remat else layer
        if config.learned_positions:
            # The first rows belong to no position, but published tables have them.
            rows = config.positions + config.first_row
            self.positions = nn.Embed(rows, config.width, embedding_init=INIT, dtype=self.dtype)
        else:
            self.positions = functools.partial(sinusoids, width=config.width, dtype=self.dtype)
        if config.embedding_norm:
            self.embedding_norm = _norm(self.dtype)
        self.drop = nn.Dropout(config.dropout)
        # flax names them layer_0, layer_1 and so on; these are the paths in `transformer_names`.
        self.layer = [layer(sizes) for _ in range(count)]
        self.norm = _norm(self.dtype)

    def _place(self, x: Float[Array, "B T D"], position: jax.Array) -> Float[Array, "B T D"]:
        require_length(position.size, self.config)
        x = x + self.positions(self.config.first_row + position)
        return self.embedding_norm(x) if self.config.embedding_norm else x

    def _run(self, x: Float[Array, "B T D"], *visible: jax.Array, train: bool) -> jax.Array:
        """The final states; layers are called with `visible` and `train`."""
        x = self._place(x, jnp.arange(x.shape[1]))
        x = self.drop(x, deterministic=not train)
        # Initialisation always unrolls the layers, so that parameter paths do not depend on the
        # scan.
        if self.config.scan_layers and not self.is_initializing():
            remat = self.config.remat
            x, _ = layers.scan(self.layer, x, *visible, train, remat=remat, streams=("dropout",))
            return self.norm(x)
        return self.norm(functools.reduce(lambda x, one: one(x, *visible, train), self.layer, x))


class Encoder(_Half):
    """The encoder."""

    def setup(self):
        config = self.config
        sizes = config.encoder_layers, config.encoder_heads, config.encoder_hidden
        self._set_up(EncoderLayer, *sizes, train=3)

    def __call__(
        self, x: Float[Array, "B S D"], visible: Bool[Array, "B 1 1 S"], train: bool
    ) -> Float[Array, "B S D"]:
        return self._run(x, visible, train=train)


class Decoder(_Half):
    """The decoder, for whole sequences or token by token."""

    def setup(self):
        config = self.config
        sizes = config.decoder_layers, config.decoder_heads, config.decoder_hidden
        self._set_up(DecoderLayer, *sizes, train=5)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        states: Float[Array, "B S D"],
        visible: Bool[Array, "#B 1 T T"],
        states_visible: Bool[Array, "B 1 1 S"],
        train: bool,
    ) -> Float[Array, "B T D"]:
        return self._run(x, states, visible, states_visible, train=train)

    def prefill(
        self,
        x: Float[Array, "B T D"],
        states: Float[Array, "B S D"],
        visible: Bool[Array, "#B 1 T T"],
        states_visible: Bool[Array, "B 1 1 S"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """See `Network.prefill`."""
        x, cache = self._place(x, jnp.arange(x.shape[1])), []
        for layer in self.layer:
            x, layer_cache = layer.prefill(x, states, visible, states_visible)
            cache.append(layer_cache)
        return self.norm(x), tuple(cache)

    def extend(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        slot: jax.Array,
        position: jax.Array,
        visible: Bool[Array, "B 1 T R"],
        states_visible: Bool[Array, "B 1 1 S"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """See `Network.extend`."""
        # W beams fill W slots of the cache but share one position.
        x, new_cache = self._place(x, position), []
        for layer, layer_cache in zip(self.layer, cache, strict=True):
            x, layer_cache = layer.extend(x, layer_cache, slot, visible, states_visible)
            new_cache.append(layer_cache)
        return self.norm(x), tuple(new_cache)


class Transformer(nn.Module):
    """Encoder, decoder, and one matrix that both embeds tokens and computes logits.

    Parameters: `embedding` (V, D), `encoder/...` and `decoder/...`.
    """

    config: TransformerConfig
    dtype: DTypeLike

    def setup(self):
        config = self.config
        self.embedding = self.param("embedding", INIT, (config.vocab, config.width))
        self.encoder = Encoder(config, self.dtype)
        self.decoder = Decoder(config, self.dtype)

    def __call__(
        self,
        source: Int[Array, "B S"],
        source_mask: Bool[Array, "B S"],
        target: Int[Array, "B T"],
        *,
        train: bool = False,
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each one in `target`, with causal attention."""
        length = target.shape[1]
        visible = jnp.tril(jnp.ones((1, 1, length, length), bool))
        states = self.encode(source, source_mask, train=train)
        hidden = self.decode(self.embed(target), states, source_mask, visible, train=train)
        return self.logits(hidden)

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings without positions."""
        # Cast after the lookup, so that the table's gradient is summed in float32. In bfloat16, the
        # sum over a token that occurs in every sentence stops growing after some hundred terms.
        x = self.embedding[ids].astype(self.dtype)
        # Otherwise, to get the table's gradient, every device gathers those of all tokens, full
        # width.
        x = constrain(x, "looked_up", "tokens", "columns")
        # Like torch's padding_idx: the pad's row is trained through the logits only.
        x = jnp.where((ids == self.config.pad)[..., None], jax.lax.stop_gradient(x), x)
        # A prefix is inserted later and so is not scaled, as in the original.
        x = x * self.config.width**0.5 if self.config.scale_embedding else x
        return constrain(x, "batch", "tokens", "width")

    def encode(
        self, ids: Int[Array, "B S"], mask: Bool[Array, "B S"], *, train: bool = False
    ) -> Float[Array, "B S D"]:
        """See `Network.encode`."""
        return self.encoder(self.embed(ids), mask[:, None, None, :], train)

    def decode(
        self,
        embeddings: Float[Array, "B T D"],
        states: Float[Array, "B S D"],
        states_mask: Bool[Array, "B S"],
        visible: Bool[Array, "#B 1 T T"],
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """See `Network.decode`."""
        return self.decoder(embeddings, states, visible, states_mask[:, None, None, :], train)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """See `Network.logits`."""
        # The product accumulates in float32 and is not rounded: bfloat16 logits would tie.
        kind = jnp.promote_types(self.dtype, jnp.float32)
        embedding = jnp.asarray(self.embedding, self.dtype)
        return jnp.einsum("...D,VD->...V", hidden, embedding, preferred_element_type=kind)

    def prefill(
        self,
        embeddings: Float[Array, "B T D"],
        states: Float[Array, "B S D"],
        states_mask: Bool[Array, "B S"],
        visible: Bool[Array, "#B 1 T T"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """See `Network.prefill`."""
        return self.decoder.prefill(embeddings, states, visible, states_mask[:, None, None, :])

    def extend(
        self,
        embeddings: Float[Array, "B T D"],
        cache: Cache,
        slot: jax.Array,
        position: jax.Array,
        visible: Bool[Array, "B 1 T R"],
        states_mask: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """See `Network.extend`."""
        return self.decoder.extend(
            embeddings, cache, slot, position, visible, states_mask[:, None, None, :]
        )


def sinusoids(
    position: Int[Array, "*B"], *, width: int, dtype: DTypeLike
) -> Float[Array, "*B {width}"]:
    """[sin(p f), cos(p f)] with f_i = 10000^(-i / (D / 2 - 1)) (fairseq's)."""
    # The transformer's paper alternates sines and cosines, and divides by D / 2.
    half = width // 2
    rate = np.float32(-math.log(10_000) / (half - 1))
    # Float32 whatever the `dtype`: bfloat16 would round positions above 256.
    angles = position[..., None] * np.exp(np.arange(half, dtype=np.float32) * rate)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1).astype(dtype)


def _norm(dtype: DTypeLike, name: str | None = None) -> LayerNorm:
    return LayerNorm(EPSILON, dtype, fast_variance=True, name=name)


# Published vocabularies are not divisible by device counts, so tables are sharded along the width.
# So are matrices, whether D is their input or their output: `fsdp` need only divide D.
PARTITION_RULES = (
    (r"/(embedding|positions/embedding)$", P(None, "fsdp")),
    (r"/(qkv|memory|query)/kernel$", P("fsdp")),
    (r"/out/kernel$", P(None, None, "fsdp")),
    (r"/up/kernel$", P("fsdp", None)),
    (r"/down/kernel$", P(None, "fsdp")),
    (r"/(bias|scale|logits_bias)$", P()),
)
# Fields that do not affect the weights.
SETTINGS = ("attention", "dropout", "remat", "scan_layers")
