"""The translation model: a mapping network whose output is a prefix in a translator's decoder
(CLIPTrans paper, section 3; src/models/model.py)."""

import dataclasses
from typing import Annotated, Any

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from cliptrans_jax.models import mapper, prefix
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.models.prefix import PrefixConfig
from cliptrans_jax.models.rules import rules_below
from cliptrans_jax.translators.mbart import MBartConfig
from cliptrans_jax.translators.nllb import NllbConfig
from cliptrans_jax.translators.table import TRANSLATORS
from cliptrans_jax.translators.translator import (
    Architecture,
    Network,
    Readout,
    Sizes,
    require_length,
)
from common_jax.config import FieldError, Section
from common_jax.mesh import Rules
from common_jax.ranges import key_of

Params = dict[str, Any]
# Folded into a step's dropout key, so that no two parts draw alike; the encoder has the key itself.
MAPPER, DECODER, TOWER = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """The config of a translation model.

    Attributes:
      mbart: sizes of the translator "mbart".
      mapper: the mapping network.
      prefix: layout and mask of the prefix in the decoder.
      translator: the encoder-decoder, a key of TRANSLATORS and also the name of the section with
        its sizes.
      nllb: sizes of the translator "nllb".
    """

    mbart: MBartConfig = MBartConfig()
    mapper: MapperConfig = MapperConfig()
    prefix: PrefixConfig = PrefixConfig()
    translator: Annotated[str, key_of(lambda: TRANSLATORS)] = "mbart"
    nllb: NllbConfig = NllbConfig()

    def __post_init__(self):
        super().__post_init__()
        width = self.sizes.width
        if self.mapper.prefix and self.mapper.kind == "transformer" and (width % 2 or width < 3):
            raise FieldError(
                f"{self.translator}.width={width} must be even and at least 4 with "
                "mapper.kind='transformer', which has 2 heads and an MLP of a third of the width"
            )

    @property
    def architecture(self) -> Architecture:
        """The record of the translator."""
        return TRANSLATORS[self.translator]

    @property
    def sizes(self) -> Sizes:
        """Sizes and special ids of the translator."""
        return getattr(self, self.architecture.subtree)

    @property
    def key(self) -> str:
        """Config path of the section with the sizes, for messages."""
        return f"config.model.{self.architecture.subtree}"


@dataclasses.dataclass(frozen=True)
class Translator:
    """The model as pure functions of parameters {"mbart": ..., "mapper": ...}.

    The first key is the translator's subtree. A model without a prefix has no mapper and takes no
    features. Parameters are float32; `dtype` is that of the computation.

    To train it with an optimizer of your own, take the paths to update from `stages.trainable`, and
    split the parameters with `common_jax.state.partition`: mBART's `logits_bias` is never trained.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32

    @property
    def network(self) -> Network:
        """The encoder-decoder alone."""
        return self.config.architecture.network(self.config.sizes, self.dtype)

    @property
    def prefix_length(self) -> int:
        """Number of prefix vectors."""
        return self.config.mapper.prefix

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        # Split even without a mapper, so that the network's weights do not depend on having one.
        keys, architecture = jax.random.split(key), self.config.architecture
        network = architecture.init(self.config.sizes, self.dtype, keys[0])
        params = {architecture.subtree: network}
        if self.prefix_length:
            features = jnp.zeros((1, self.config.mapper.features))
            params["mapper"] = self._mapper.init(keys[1], features, False)["params"]
        return params

    def prefix(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        batch: int,
        *,
        dropout: jax.Array | None = None,
    ) -> Float[Array, "B P D"]:
        """The prefix of each example, empty if the model has none.

        Raises:
          ValueError: if the model has a prefix, and `features` are None or have another shape.
        """
        if not self.prefix_length:
            # Empty instead of None, so that decoding needs no second form.
            return jnp.zeros((batch, 0, self.config.sizes.width), self.dtype)
        expected = (batch, self.config.mapper.features)
        if features is None or jnp.shape(features) != expected:
            given = "are None" if features is None else f"have shape {jnp.shape(features)}"
            raise ValueError(
                f"features {given}, but must have shape {expected}, one vector of mapper.features "
                f"numbers per sentence, as the model has mapper.prefix={self.prefix_length}"
            )
        rngs = {} if dropout is None else {"dropout": jax.random.fold_in(dropout, MAPPER)}
        variables = {"params": params["mapper"]}
        return self._mapper.apply(variables, features, dropout is not None, rngs=rngs)

    def encode(
        self, params: Params, source: Int[Array, "B S"], *, dropout: jax.Array | None = None
    ) -> Float[Array, "B S D"]:
        """Encoder states of framed sentences; no token attends to pads."""
        sizes = self.config.sizes
        # It leaves pads where they are, so the mask of `source` is that of `ids`.
        ids = self.config.architecture.encoder_input(source, sizes)
        return self.call("encode", params, ids, source != sizes.pad, dropout=dropout)

    def train_logits(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        source: Int[Array, "B S"],
        labels: Int[Array, "B T"],
        *,
        dropout: jax.Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every label, given the labels before it, the prefix and the source.

        Args:
          features: one CLIP feature per example; None if the model has no prefix.
          source: the encoder's tokens, `[language, words, </s>]` and pads.
          labels: the target's tokens in the same form; the loss ignores negative ones and pads.
          dropout: key for dropout; None outside training.
        """
        states = self.label_states(params, features, source, labels, dropout=dropout)
        return self.call("logits", params, states)

    def label_states(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        source: Int[Array, "B S"],
        labels: Int[Array, "B T"],
        *,
        dropout: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """The states that `readout` maps to the logits of `train_logits`. Slots of the prefix
        predict nothing and are left out."""
        states = self.decode_labels(params, features, source, labels, dropout=dropout)
        return prefix.remove(states, self.prefix_length)

    def readout(self, params: Params) -> Readout:
        """The matrix and bias that map states to logits."""
        architecture = self.config.architecture
        return architecture.readout(params[architecture.subtree])

    def decode_labels(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        source: Int[Array, "B S"],
        labels: Int[Array, "B T"],
        *,
        dropout: jax.Array | None = None,
    ) -> Float[Array, "B T+{self.prefix_length} D"]:
        """The decoder's final states in all T + P slots."""
        embeddings, visible = self.decoder_input(params, features, labels, dropout=dropout)
        states = self.encode(params, source, dropout=dropout)
        return self.call(
            "decode",
            params,
            embeddings,
            states,
            source != self.config.sizes.pad,
            visible,
            dropout=None if dropout is None else jax.random.fold_in(dropout, DECODER),
        )

    def decoder_input(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        labels: Int[Array, "B T"],
        *,
        dropout: jax.Array | None = None,
    ) -> tuple[
        Float[Array, "B T+{self.prefix_length} D"],
        Bool[Array, "#B 1 T+{self.prefix_length} T+{self.prefix_length}"],
    ]:
        """The decoder's input embeddings in training, and which slots each slot attends to."""
        config, count = self.config, self.prefix_length
        ids = config.architecture.decoder_input(labels, config.sizes)
        embeddings = self.call("embed", params, ids)
        if not count:  # pads come last, so causal attention hides them from all labels
            length = labels.shape[1]
            return embeddings, jnp.tril(jnp.ones((1, 1, length, length), bool))
        vectors = self.prefix(params, features, labels.shape[0], dropout=dropout)
        # [B, 1 + P + T - 1]: start token, prefix, and all labels but the last. In a short sentence
        # the end token is read too; the label of its slot is a pad, so it is never scored.
        mask = jnp.pad(ids[:, 1:] != config.sizes.pad, ((0, 0), (1 + count, 0)))
        # The start token is visible whatever its id: without it, its slot would attend to nothing.
        mask = mask.at[:, : 1 + count].set(True)
        visible = prefix.visibility(mask, count=count, rule=config.prefix.mask)
        return prefix.insert(embeddings, vectors), visible

    def require_room(self, tokens: int) -> None:
        """Raises ValueError if the decoder has no positions for this many tokens and the prefix."""
        require_length(tokens + self.prefix_length, self.config.sizes)

    @property
    def _mapper(self):
        return mapper.build(self.config.mapper, self.config.sizes.width, self.dtype)

    def call(self, method: str, params: Params, *arguments: Any, dropout: jax.Array | None = None):
        """Calls a method of `Network` with the translator's subtree of `params`."""
        # Only `encode` and `decode` have dropout; the other methods take no such argument.
        train = {"train": True} if dropout is not None else {}
        rngs = {} if dropout is None else {"dropout": dropout}
        variables = {"params": params[self.config.architecture.subtree]}
        return self.network.apply(variables, *arguments, **train, method=method, rngs=rngs)


def partition_rules(config: ModelConfig) -> Rules:
    """Partition rules of a model's parameters, whose paths start with the translator's subtree or
    with "mapper"."""
    architecture = config.architecture
    return (
        *rules_below(architecture.subtree, architecture.rules),
        *rules_below("mapper", mapper.PARTITION_RULES),
    )
