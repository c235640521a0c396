"""The protocol of a translation network, and the record that describes one to the rest of the
code."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from cliptrans_jax.models.attention import Memory
from common_jax.mesh import Rules

# A decoder layer's keys and values: of its own R slots, and of S encoder states.
Slots = tuple[Float[Array, "B H R K"], Float[Array, "B H R K"]]
LayerCache = tuple[Slots, Memory]
Cache = tuple[LayerCache, ...]


class Readout(NamedTuple):
    """The parameters of `Network.logits`, which computes hidden matrix^T + bias."""

    matrix: Float[Array, "V D"]
    bias: Float[Array, " V"] | None = None


@runtime_checkable
class Sizes(Protocol):
    """Fields of every translator's config.

    Attributes:
      vocab: number of tokens, language codes included.
      width: width D of a token.
      positions: longest sequence, including the decoder's prefix.
      pad, eos, start: ids of padding, end of sentence, and the first token of decoding.
    """

    vocab: int
    width: int
    positions: int
    pad: int
    eos: int
    start: int


@runtime_checkable
class Network(Protocol):
    """Methods of every translator's flax module, which is built from (config, dtype).

    The decoder takes embeddings, not ids, so that a prefix of vectors can precede the tokens. Masks
    are True where a token may be attended to.
    """

    def __call__(
        self, source: Int[Array, "B S"], source_mask: Bool[Array, "B S"], target: Int[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each one in `target`; touches every parameter, for `init`."""

    def embed(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of the decoder's tokens, without positions."""

    def encode(
        self, ids: Int[Array, "B S"], mask: Bool[Array, "B S"], *, train: bool = False
    ) -> Float[Array, "B S D"]:
        """States of source tokens."""

    def decode(
        self,
        embeddings: Float[Array, "B T D"],
        states: Float[Array, "B S D"],
        states_mask: Bool[Array, "B S"],
        visible: Bool[Array, "#B 1 T T"],
        *,
        train: bool = False,
    ) -> Float[Array, "B T D"]:
        """The decoder's final states.

        Slot t has position t and attends to the slots that are True in `visible[..., t, :]`.
        """

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of all tokens, in float32 at least."""

    def prefill(
        self,
        embeddings: Float[Array, "B T D"],
        states: Float[Array, "B S D"],
        states_mask: Bool[Array, "B S"],
        visible: Bool[Array, "#B 1 T T"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """`decode` for inference; also returns the keys and values of its T slots and of the
        encoder states."""

    def extend(
        self,
        embeddings: Float[Array, "B T D"],
        cache: Cache,
        slot: jax.Array,
        position: jax.Array,
        visible: Bool[Array, "B 1 T R"],
        states_mask: Bool[Array, "B S"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """One step of decoding, for T continuations of each example.

        Args:
          embeddings: embeddings of their last tokens, all at `position`.
          cache: cache from `prefill`, grown to R slots.
          slot: first of the T cache slots to write.
          visible: the slots that each token attends to, including its own.
          states_mask: as in `prefill`.
        """


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A kind of translator.

    Attributes:
      name: name to use in prose.
      subtree: key of its parameters in a checkpoint, and of its sizes in `config.model`.
      config: class of its sizes, see `Sizes`.
      network: flax module, see `Network`.
      rules: partition rules of its parameters.
      encoder_input: (ids, sizes) -> the ids that the encoder reads. `ids` are padded source
        sentences, framed as in `data/tokenizers/framing.py`: [language, pieces..., eos]. The result
        has the same length, with pads in the same places.
      decoder_input: (labels, sizes) -> the ids that the decoder reads to predict the labels, which
        are framed in the same way. They start with [start, language], as decoding does.
      embedding, encoder, buffers: regexes of paths below the subtree: the embedding that encoder
        and decoder share, the rest of the encoder, and parameters that are never trained, if any.
      readout: the network's parameters -> those of `logits`, which is linear in them.
      kind: name of its published weights, a key of `tensors.kinds.KINDS`.
      tokenizer: kind of the tokenizer published with it.
      settings: fields of its config that do not affect the weights.
    """

    name: str
    subtree: str
    config: type
    network: type[nn.Module]
    rules: Rules
    encoder_input: Callable[[Int[Array, "B S"], Any], Int[Array, "B S"]]
    decoder_input: Callable[[Int[Array, "B T"], Any], Int[Array, "B T"]]
    embedding: str
    encoder: str
    readout: Callable[[Mapping[str, Any]], Readout]
    kind: str
    tokenizer: str
    settings: tuple[str, ...] = ()
    buffers: str = ""

    def init(self, config: Any, dtype: DTypeLike, key: jax.Array) -> Mapping[str, Any]:
        """Initial parameters, below the subtree."""
        ids = jnp.ones((1, 2), jnp.int32)  # parameters do not depend on them
        return self.network(config, dtype).init(key, ids, ids > 0, ids)["params"]

    def shapes(self, config: Any) -> Mapping[str, Any]:
        """Shapes of the parameters."""
        init = functools.partial(self.init, config, jnp.float32)
        return jax.eval_shape(init, jax.random.key(0))

    def differing_sizes(self, ours: Any, theirs: Any) -> list[str]:
        """Fields that affect the weights and differ between two configs."""
        names = [field.name for field in dataclasses.fields(self.config)]
        differing = (name for name in names if getattr(ours, name) != getattr(theirs, name))
        return [name for name in differing if name not in self.settings]


def language_first(ids: Int[Array, "B S"], sizes: Sizes) -> Int[Array, "B S"]:
    """The sentences, unchanged: [language, pieces..., eos] (mBART-50, M2M-100, NLLB)."""
    return ids


def require_length(length: int, sizes: Sizes) -> None:
    """Raises ValueError for a longer sequence than learned positions; sinusoids have no end."""
    # Beyond its table an embedding gives NaN, from which a search makes plausible tokens.
    if length > sizes.positions and getattr(sizes, "learned_positions", True):
        raise ValueError(
            f"a sequence of {length} tokens, prefix included, is longer than the translator's "
            f"positions={sizes.positions}; truncate the sentences, or lower max_new_tokens"
        )


def cache_slots(cache: Cache) -> int:
    """Number R of slots for the decoder's own tokens."""
    own, _ = cache[0]
    return own[0].shape[2]


def grow_cache(cache: Cache, slots: int) -> tuple[tuple, ...]:
    """The cache, grown to `slots` slots for the decoder's own tokens."""
    return tuple((tuple(_grow(part, slots) for part in own), states) for own, states in cache)


def _grow(part: Float[Array, "B H R K"], slots: int) -> Float[Array, "B H {slots} K"]:
    # New slots hold zeros, and are masked until a step writes to them.
    return jnp.pad(part, ((0, 0), (0, 0), (0, slots - part.shape[2]), (0, 0)))
