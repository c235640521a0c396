"""The record that describes a tower to the rest of the code."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from common_jax.config import FieldError
from common_jax.mesh import Rules

Channels = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Sentences:
    """The text input of a tower.

    Attributes:
      tokenizer: kind of the tokenizer published with it.
      visible: (config, ids) -> mask (B, S) of the tokens to attend to; None for all.
      drops_out: whether it uses dropout in training.
    """

    tokenizer: str
    visible: Callable[[Any, Int[Array, "B S"]], Bool[Array, "B S"] | None]
    drops_out: bool


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The image input of a tower.

    Attributes:
      mean, std: per channel, of pixels in [0, 1].
      resampling: name of PIL's resize filter.
      crops: whether the short side is resized and the centre cropped; otherwise both sides are
        resized to the square.
    """

    mean: Channels
    std: Channels
    resampling: str
    crops: bool = True


CLIP_PICTURES = Pictures(
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    resampling="BICUBIC",
)

# For a transformer's blocks and its projection. Large matrices are sharded over fsdp along the
# width; the rest is replicated.
TRANSFORMER_RULES: Rules = (
    (r"/attention/qkv/kernel$", P("fsdp")),
    (r"/attention/out/kernel$", P(None, None, "fsdp")),
    (r"/mlp/up/kernel$", P("fsdp")),
    (r"/mlp/down/kernel$", P(None, "fsdp")),
    (r"/projection/kernel$", P("fsdp")),
    (r"/(bias|scale)$", P()),
)


def require_heads(width: int, heads: int) -> None:
    """Raises FieldError unless the width splits into heads."""
    if width % heads:
        raise FieldError(f"heads={heads} must divide width={width}")


def require_size(images: jax.Array, side: int) -> None:
    """Raises ValueError unless `images` are (B, side, side, 3)."""
    expected = (images.shape[0], side, side, 3)
    if images.shape != expected:
        raise ValueError(
            f"images have shape {images.shape}, but the tower takes {expected}; resize them, or "
            "use a tower for their size"
        )


def require_length(length: int, positions: int) -> None:
    """Raises ValueError if sentences have more tokens than positions."""
    if length > positions:
        raise ValueError(
            f"ids have {length} tokens, more than positions={positions}; truncate the sentences, "
            "and keep the end token"
        )


@dataclasses.dataclass(frozen=True)
class Tower:
    """A kind of text or image tower, with either `sentences` or `pictures`.

    Configs of text towers have `vocab`, `features` and `longest`, the tokens in the longest
    sentence; those of image towers have `image`, the side of a picture, and `features`. If the
    tower can be trained from scratch, they also have `kind`, and those of text towers `pad`.

    Attributes:
      kind: name of its published weights, a key of `tensors.kinds.KINDS`; "" if there are none.
      config: class of its sizes.
      network: flax module, built from (config, dtype).
      rules: partition rules of its parameters.
      sentences: input of a text tower.
      pictures: input of an image tower.
      from_scratch: whether stage "clip" can train it.
    """

    kind: str
    config: type
    network: type[nn.Module]
    rules: Rules
    sentences: Sentences | None = None
    pictures: Pictures | None = None
    from_scratch: bool = False

    def init(self, config: Any, dtype: DTypeLike, key: jax.Array) -> Mapping[str, Any]:
        """Fresh parameters."""
        if self.sentences is None:
            inputs = (jnp.zeros((1, config.image, config.image, 3)),)
        else:
            ids = jnp.zeros((1, 2), jnp.int32)
            inputs = (ids, self.sentences.visible(config, ids))
        return self.network(config, dtype).init(key, *inputs)["params"]

    def shapes(self, config: Any) -> Mapping[str, Any]:
        """Shapes of the parameters."""
        init = functools.partial(self.init, config, jnp.float32)
        return jax.eval_shape(init, jax.random.key(0))

    def apply(
        self,
        config: Any,
        dtype: DTypeLike,
        params: Any,
        inputs: Int[Array, "B S"] | Float[Array, "B I J 3"],
        *,
        dropout: jax.Array | None = None,
    ) -> Float[Array, "B M"]:
        """Features of padded framed ids, or of preprocessed pictures.

        Args:
          dropout: dropout key in training, else None; ignored by towers without dropout.
        """
        network, variables = self.network(config, dtype), {"params": params}
        if self.sentences is None:
            return network.apply(variables, inputs)
        # From the ids, so that callers need not pass a mask along with them.
        visible = self.sentences.visible(config, inputs)
        if dropout is None or not self.sentences.drops_out:
            return network.apply(variables, inputs, visible)
        return network.apply(variables, inputs, visible, train=True, rngs={"dropout": dropout})
