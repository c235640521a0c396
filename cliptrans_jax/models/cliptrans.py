"""The translation model: a mapping network's prefix in the decoder of mBART (CLIPTrans, section 3
of the paper; src/models/model.py)."""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from cliptrans_jax.models import mapper, prefix
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.models.prefix import PrefixConfig
from cliptrans_jax.translators import mbart
from cliptrans_jax.translators.mbart import MBart, MBartConfig
from common_jax.config import FieldError, Section

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section):
    """A translation model.

    Attributes:
      mbart: the encoder-decoder.
      mapper: the mapping network.
      prefix: how the decoder reads what that gives.
    """

    mbart: MBartConfig = MBartConfig()
    mapper: MapperConfig = MapperConfig()
    prefix: PrefixConfig = PrefixConfig()

    def __post_init__(self):
        super().__post_init__()
        width = self.mbart.width
        if self.mapper.prefix and self.mapper.kind == "transformer" and (width % 2 or width < 3):
            raise FieldError(
                f"mbart.width={width} must be even and at least 4 with mapper.kind='transformer', "
                "which has 2 heads and an MLP of a third of the width"
            )


@dataclasses.dataclass(frozen=True)
class Translator:
    """Pure functions of parameters {"mbart": ..., "mapper": ...}; without a prefix the mapper is
    absent, and so are features.

    Attributes:
      config: sizes.
      dtype: what is computed in; parameters are float32.
    """

    config: ModelConfig
    dtype: DTypeLike = jnp.float32

    @property
    def network(self) -> MBart:
        """mBART alone."""
        return MBart(self.config.mbart, self.dtype)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        ids = jnp.ones((1, 2), jnp.int32)
        keys = jax.random.split(key)
        params = {"mbart": self.network.init(keys[0], ids, ids > 0, ids)["params"]}
        if self.config.mapper.prefix:
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
        """The prefix of every example; of length 0 where the model has none."""
        width = self.config.mbart.width
        if not self.config.mapper.prefix:
            return jnp.zeros((batch, 0, width), self.dtype)
        assert features is not None
        rngs = {} if dropout is None else {"dropout": jax.random.fold_in(dropout, 1)}
        variables = {"params": params["mapper"]}
        return self._mapper.apply(variables, features, dropout is not None, rngs=rngs)

    def encode(
        self, params: Params, source: Int[Array, "B S"], *, dropout: jax.Array | None = None
    ) -> Float[Array, "B S D"]:
        """Encoder states; pads are heard by none."""
        return self._mbart(
            params, source, source != self.config.mbart.pad, method=MBart.encode, dropout=dropout
        )

    def train_logits(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        source: Int[Array, "B S"],
        labels: Int[Array, "B T"],
        *,
        dropout: jax.Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Scores of every label given the labels before it, the prefix and the source.

        Args:
          features: a CLIP feature an example; None where the model has no prefix.
          source: the encoder's tokens, `[language, words, </s>]` and pads.
          labels: the same of the target; negative ones and pads are ignored by the loss.
          dropout: key of dropout; None outside training.
        """
        states = self.label_states(params, features, source, labels, dropout=dropout)
        return self.scores(self.readout(params), states)

    def label_states(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        source: Int[Array, "B S"],
        labels: Int[Array, "B T"],
        *,
        dropout: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """The states that `scores` turns into those of `train_logits`. Slots of the prefix predict
        nothing and are left out."""
        states = self.decode_labels(params, features, source, labels, dropout=dropout)
        return prefix.remove(states, self.config.mapper.prefix)

    def readout(self, params: Params) -> Params:
        """The parameters that `scores` needs: the embedding (V, D) and the bias (V)."""
        return {name: params["mbart"][name] for name in ("embedding", "logits_bias")}

    def scores(self, readout: Params, states: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Scores of all tokens, in float32 at least."""
        return self._mbart({"mbart": readout}, states, method=MBart.logits)

    def decode_labels(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        source: Int[Array, "B S"],
        labels: Int[Array, "B T"],
        *,
        dropout: jax.Array | None = None,
    ) -> Float[Array, "B T2 D"]:
        """The decoder's last states at all T + P slots."""
        embeddings, visible = self.decoder_input(params, features, labels, dropout=dropout)
        states = self.encode(params, source, dropout=dropout)
        return self._mbart(
            params,
            embeddings,
            states,
            source != self.config.mbart.pad,
            visible,
            method=MBart.decode,
            dropout=None if dropout is None else jax.random.fold_in(dropout, 2),
        )

    def decoder_input(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        labels: Int[Array, "B T"],
        *,
        dropout: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T2 D"], Bool[Array, "#B 1 T2 T2"]]:
        """What the decoder reads in training, and which slots hear which."""
        config, count = self.config, self.config.mapper.prefix
        given = mbart.shift_right(labels, pad=config.mbart.pad)
        embeddings = self._mbart(params, given, method=MBart.embed)
        if not count:  # no scored slot can hear a pad behind it, so none need be hidden
            length = labels.shape[1]
            return embeddings, jnp.tril(jnp.ones((1, 1, length, length), bool))
        vectors = self.prefix(params, features, labels.shape[0], dropout=dropout)
        seen = jnp.pad(given[:, 1:] != config.mbart.pad, ((0, 0), (1 + count, 0)))
        seen = seen.at[:, : 1 + count].set(True)
        visible = prefix.visibility(seen, prefix=count, rule=config.prefix.mask)
        return prefix.insert(embeddings, vectors), visible

    @property
    def _mapper(self):
        return mapper.build(self.config.mapper, self.config.mbart.width, self.dtype)

    def _mbart(self, params: Params, *arguments, method, dropout: jax.Array | None = None):
        train = {"train": True} if dropout is not None else {}
        rngs = {} if dropout is None else {"dropout": dropout}
        variables = {"params": params["mbart"]}
        return self.network.apply(variables, *arguments, **train, method=method, rngs=rngs)


# Paths of parameters start with "mbart/" or "mapper/".
PARTITION_RULES = (
    *((rf"/mbart/(.*/)?{regex.removeprefix('/')}", spec) for regex, spec in mbart.PARTITION_RULES),
    *(
        (rf"/mapper/(.*/)?{regex.removeprefix('/')}", spec)
        for regex, spec in mapper.PARTITION_RULES
    ),
)
