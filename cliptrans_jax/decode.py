"""Beam search with a key-value cache, as one program with static shapes per source length.

Step by step, the search matches the original's (Hugging Face's beam search with early stopping);
with one beam it is greedy decoding. It costs little more than the decoder's matrix products:

  - Keys and values of encoder states, prefix and language code are stored once per example, as all
    of its beams share them.
  - Beams are never copied in the cache. Each step writes the keys and values of its W tokens into
    the next W slots, and a table says which slots hold a beam's history; the others are masked.
  - The cache starts short and grows in a few steps, each with its own loop, so that early tokens do
    not attend to empty slots. It is updated in place.
  - When half of the examples are done, the others continue in a batch of half the size.
  - Only the 2 W best tokens of a beam can be among the 2 W best of all beams, so only their logits
    are normalised.
"""

import dataclasses
import functools
from typing import Annotated, no_type_check

import jax
from flax import struct
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cliptrans_jax.models import prefix
from cliptrans_jax.models.cliptrans import Params, Translator
from cliptrans_jax.translators.translator import Cache, cache_slots, grow_cache
from common_jax.config import Section
from common_jax.mesh import batch_shards, put_rows, take_rows
from common_jax.nn.top_k import top_k
from common_jax.ranges import Count, Size, at_least, within

NEVER = -1e9  # score of beams that do not exist yet, as in the original
FIRST = 3  # length of hypotheses after the first step: start, language code, first word


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Section):
    """Beam search; the defaults are the original's.

    Attributes:
      beams: open hypotheses per example; 1 is greedy decoding.
      max_new_tokens: longest output, including language code and `</s>`; with only these two, every
        beam would be the same empty sentence.
      length_penalty: a hypothesis's log-probability is divided by its length to this power.
      early_stopping: ends an example's search once `beams` hypotheses are finished; otherwise it
        continues as long as the best open one, at its current length, beats the worst of these.
      batch: sentences decoded at a time, over all devices.
      bucket: sources are padded to this many tokens, or to 2, 4, 8, ... times as many.
      growth: number of lengths through which the cache of decoded tokens grows. More waste less
        attention on empty slots, but take longer to compile.
      halvings: how often each device may halve its batch, whenever half of the examples are done.
        Each halving adds to compile time.
    """

    beams: Size = 5
    max_new_tokens: Annotated[int, at_least(3)] = 60
    length_penalty: Annotated[float, within(-10, 10)] = 1.0
    early_stopping: bool = True
    batch: Size = 64
    bucket: Size = 16
    growth: Size = 2
    halvings: Count = 2

    @property
    def max_length(self) -> int:
        """Ids of the longest output, including the start token."""
        return self.max_new_tokens + 1

    @property
    def steps(self) -> int:
        """Steps of the longest search. Start token and language code are read before the first
        step, and the last token of an output is never fed back."""
        return self.max_new_tokens - 2

    @property
    def parts(self) -> tuple[int, ...]:
        """Number of steps that the cache can hold, in each part of the search."""
        count = min(self.growth, self.steps)
        return tuple(-(-self.steps * part // count) for part in range(1, count + 1))


@no_type_check  # while a tree is mapped it may hold anything
@struct.dataclass
class Hypotheses:
    """Finished translations of every example, best first.

    Attributes:
      tokens: start token, language code and words, without an end token, then pads.
      lengths: of `tokens`.
      scores: sum of log-probabilities over length ** length_penalty; -inf for missing ones.
    """

    tokens: Int[Array, "B W T"]
    lengths: Int[Array, "B W"]
    scores: Float[Array, "B W"]


@no_type_check  # while a tree is mapped it may hold anything
@struct.dataclass
class SearchState:
    """The state of a search between two steps.

    Attributes:
      length: number of ids in each open hypothesis.
      tokens: open hypotheses.
      scores: their summed log-probabilities.
      origins: for each of their decoded tokens, the beam whose cache slot holds it.
      finished: the best finished hypotheses.
      done: examples whose search is over.
      cache: keys and values.
    """

    length: Int[Array, ""]
    tokens: Int[Array, "B W T"]
    scores: Float[Array, "B W"]
    origins: Int[Array, "B W T"]
    finished: Hypotheses
    done: Bool[Array, " B"]
    cache: Cache


@no_type_check  # while a tree is mapped it may hold anything
@struct.dataclass
class Candidates:
    """The 2 W best continuations of a step and the next beams, for inspection."""

    scores: Float[Array, "B candidates"]
    tokens: Int[Array, "B candidates"]
    beams: Int[Array, "B candidates"]
    next_scores: Float[Array, "B W"]
    next_tokens: Int[Array, "B W"]
    next_beams: Int[Array, "B W"]


@dataclasses.dataclass(frozen=True)
class Search:
    """The steps of a search as pure functions, for a given model and config."""

    translator: Translator
    config: DecodeConfig

    def run(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        source: Int[Array, "B S"],
        language: Int[Array, " B"],
    ) -> Hypotheses:
        """The whole search; to be jitted.

        Args:
          features: one CLIP feature per example; None if the model has no prefix.
          source: padded source tokens.
          language: the code that each translation starts with.
        """
        states = self._encode(params, source)
        state, logits = self.start(params, features, source, states, language, steps=0)
        # The first word needs no step of its own: `start` has computed its scores.
        state, _ = self.advance(state, logits)
        # Each device halves its own share, since moving an example would also move its cache.
        shards = batch_shards()
        share = len(source) // shards
        # `rows` numbers each device's share on its own, from 0, as `take_rows` expects.
        finished, rows = state.finished, jnp.arange(len(source)).reshape(shards, -1) % share
        # Only as often as 2 divides a device's share.
        halvings = min(self.config.halvings, (share & -share).bit_length() - 1)
        for halving in range(halvings + 1):
            if halving:
                # `finished` has the whole batch; `rows` maps the examples of `state` to it.
                finished = put_rows(finished, state.finished, rows)
                # Open examples come first. More than half are still open only after the last step.
                keep = jnp.argsort(state.done.reshape(shards, -1), axis=1, stable=True)
                keep = keep[:, : rows.shape[1] // 2]
                rows = jnp.take_along_axis(rows, keep, axis=1)
                source, state = take_rows(source, keep), take_rows(state, keep)
            # The smallest batch runs until all are done.
            enough = rows.shape[1] // 2 if halving < halvings else 0
            # A halved batch gets the full cache at once: most of its steps come late in the search.
            for steps in self.config.parts if not halving else self.config.parts[-1:]:
                state = state.replace(cache=self._grow(state.cache, steps))
                state = self._search(params, source, state, steps=steps, enough=enough)
        return put_rows(finished, state.finished, rows)

    def _encode(self, params: Params, source: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """`Translator.encode` of only three quarters of the columns, if all sentences fit in them.

        Sources are padded to 16, 32, 64, ... tokens, so that few programs are compiled, and at full
        length the encoder takes up to a quarter of the search time. A second encoder in the same
        program compiles much faster than another program would.
        """
        full, short = source.shape[1], short_length(source.shape[1])
        beyond = source[:, short:] != self.translator.config.sizes.pad

        def encode_short(source: jax.Array) -> jax.Array:
            states = self.translator.encode(params, source[:, :short])
            return jnp.pad(states, ((0, 0), (0, full - short), (0, 0)))  # nothing attends to pads

        encode = functools.partial(self.translator.encode, params)
        return jax.lax.cond(jnp.any(beyond), encode, encode_short, source)

    def _search(
        self,
        params: Params,
        source: Int[Array, "B S"],
        state: SearchState,
        *,
        steps: int,
        enough: int,
    ) -> SearchState:
        """Runs steps while the cache has room and any device has more than `enough` open
        examples."""

        def unfinished(state: SearchState) -> jax.Array:
            open_ = jnp.sum(~state.done.reshape(batch_shards(), -1), axis=1)  # on each device
            return (state.length < FIRST + steps) & jnp.any(open_ > enough)

        def body(state: SearchState) -> SearchState:
            state, logits = self.step(params, source, state)
            return self.advance(state, logits)[0]

        return jax.lax.while_loop(unfinished, body, state)

    def start(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        source: Int[Array, "B S"],
        states: Float[Array, "B S D"],
        language: Int[Array, " B"],
        *,
        steps: int | None = None,
    ) -> tuple[SearchState, Float[Array, "B W V"]]:
        """The state in which every beam is [start, language], and the logits of the next token.

        All beams but the first have the score NEVER. The cache has room for `steps` steps, by
        default for the whole search.
        """
        batch, beams, longest = source.shape[0], self.config.beams, self.config.max_length
        self.translator.require_room(longest - 1)  # the last token is never fed back
        hidden, cache = self.prefill(params, features, source, states, language)
        cache = self._grow(cache, self.config.steps if steps is None else steps)
        logits = self.translator.call("logits", params, hidden[:, -1])
        # All beams start out equal; NEVER keeps the copies from being chosen at the first step.
        logits = jnp.broadcast_to(logits[:, None], (batch, beams, logits.shape[-1]))
        sizes = self.translator.config.sizes
        tokens = jnp.full((batch, beams, longest), sizes.pad, jnp.int32)
        tokens = tokens.at[:, :, 0].set(sizes.start).at[:, :, 1].set(language[:, None])
        state = SearchState(
            length=jnp.int32(2),
            tokens=tokens,
            scores=jnp.full((batch, beams), NEVER).at[:, 0].set(0.0),
            origins=jnp.zeros((batch, beams, longest), jnp.int32),
            finished=Hypotheses(
                tokens=jnp.full_like(tokens, sizes.pad),
                lengths=jnp.zeros((batch, beams), jnp.int32),
                scores=jnp.full((batch, beams), -jnp.inf),
            ),
            done=jnp.zeros(batch, bool),
            cache=cache,
        )
        return state, logits

    def prefill(
        self,
        params: Params,
        features: Float[Array, "B M"] | None,
        source: Int[Array, "B S"],
        states: Float[Array, "B S D"],
        language: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The decoder's states at `</s>`, prefix and language code, and their cache."""
        sizes = self.translator.config.sizes
        ids = jnp.stack([jnp.full_like(language, sizes.start), language], axis=1)
        embeddings = self.translator.call("embed", params, ids)
        vectors = self.translator.prefix(params, features, source.shape[0])
        block, visible = prefix.start_block(
            embeddings[:, :1], vectors, embeddings[:, 1:], self.translator.config.prefix
        )
        return self.translator.call("prefill", params, block, states, source != sizes.pad, visible)

    def step(
        self, params: Params, source: Int[Array, "B S"], state: SearchState
    ) -> tuple[SearchState, Float[Array, "B W V"]]:
        """Feeds the last token of every beam, extends the cache, and returns the next logits."""
        beams, first = self.config.beams, self._slots(0)
        index = state.length - FIRST  # of the token among the decoded ones
        last = jax.lax.dynamic_index_in_dim(state.tokens, state.length - 1, 2, keepdims=False)
        own = jnp.arange(beams, dtype=jnp.int32)
        # Beam w writes its keys as beam w; `advance` passes the table on to its continuations.
        origins = state.origins.at[:, :, index].set(own)

        # Slot first + t * W + w holds the t-th token of what was then beam w. A beam attends to it
        # if that is its own t-th token; slots of later steps are masked.
        times = jnp.arange((cache_slots(state.cache) - first) // beams)
        descends = origins[:, :, : len(times), None] == own  # [B, W, times, W]
        descends = descends & (times <= index)[:, None]
        descends = descends.reshape(*descends.shape[:2], -1)  # in the order of the slots
        visible = jnp.pad(descends, ((0, 0), (0, 0), (first, 0)), constant_values=True)

        call = self.translator.call
        hidden, cache = call(
            "extend",
            params,
            call("embed", params, last),
            state.cache,
            first + index * beams,
            first + index,
            visible[:, None],  # [B, 1, W, slots]
            source != self.translator.config.sizes.pad,
        )
        logits = call("logits", params, hidden)
        return state.replace(cache=cache, origins=origins), logits

    def advance(
        self, state: SearchState, logits: Float[Array, "B W V"]
    ) -> tuple[SearchState, Candidates]:
        """Chooses the next token of every beam, and moves hypotheses that end to `finished`."""
        config, beams = self.config, self.config.beams
        eos = self.translator.config.sizes.eos
        totals, tokens = self._continuations(state, logits)

        # At most W of the 2 W best over all beams end, one per beam, so at least W remain open.
        count = min(2 * beams, totals.shape[1] * totals.shape[2])
        best, place = top_k(totals.reshape(totals.shape[0], -1), count)  # beam-major
        token = jnp.take_along_axis(tokens.reshape(tokens.shape[0], -1), place, axis=1)
        beam = place // totals.shape[2]
        ends = token == eos
        finished = self._finish(state, best, beam, ends)

        # The W best that do not end, in order: those that end sort last.
        rank = jnp.arange(count)
        order = jnp.argsort(jnp.where(ends, count + rank, rank), axis=1)[:, :beams]
        next_scores, next_tokens, next_beams = (
            jnp.take_along_axis(x, order, axis=1) for x in (best, token, beam)
        )
        full = jnp.all(finished.scores > -jnp.inf, axis=1)
        if config.early_stopping:
            done = full
        else:
            # The original's bound: the best continuation, at its present length. With a positive
            # length_penalty a longer one may still beat it, as its negative sum is divided by more.
            bound = best[:, 0] / state.length.astype(best.dtype) ** config.length_penalty
            done = full & (finished.scores[:, -1] >= bound)
        done = state.done | done

        followed = jnp.take_along_axis(state.tokens, next_beams[:, :, None], axis=1)
        pad = self.translator.config.sizes.pad
        # An example that is done still takes part in every step; `_finish` ignores what it writes.
        shown = jnp.where(state.done[:, None], pad, next_tokens)
        state = state.replace(
            length=state.length + 1,
            tokens=followed.at[:, :, state.length].set(shown),
            scores=next_scores,
            origins=jnp.take_along_axis(state.origins, next_beams[:, :, None], axis=1),
            finished=finished,
            done=done,
        )
        return state, Candidates(best, token, beam, next_scores, next_tokens, next_beams)

    def _continuations(
        self, state: SearchState, logits: Float[Array, "B W V"]
    ) -> tuple[Float[Array, "B W candidates"], Int[Array, "B W candidates"]]:
        """Total scores and tokens of each beam's best continuations. The last step forces the end
        token, at no cost in score."""
        count = min(2 * self.config.beams, logits.shape[-1])
        # Both functions below read the logits. Without a barrier, XLA would fuse the addition of
        # the bias into both, and so compute it twice.
        logits = jax.lax.optimization_barrier(logits)
        best, tokens = top_k(logits, count)
        scores = best - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        eos = self.translator.config.sizes.eos
        forced = jnp.full_like(scores, -jnp.inf).at[:, :, 0].set(0.0)
        end = jnp.zeros_like(tokens).at[:, :, 0].set(eos)
        last = state.length == self.config.max_length - 1
        scores, tokens = jnp.where(last, forced, scores), jnp.where(last, end, tokens)
        return state.scores[:, :, None] + scores, tokens

    def _finish(
        self,
        state: SearchState,
        best: Float[Array, "B candidates"],
        beam: Int[Array, "B candidates"],
        ends: Bool[Array, "B candidates"],
    ) -> Hypotheses:
        """The W best of the finished hypotheses and of the W best candidates that end in this
        step."""
        # As in the original, an end that ranks below the W best is dropped.
        beams, old = self.config.beams, state.finished
        values = best[:, :beams] / state.length.astype(best.dtype) ** self.config.length_penalty
        counts = ends[:, :beams] & ~state.done[:, None]
        values = jnp.where(counts, values, -jnp.inf)
        tokens = jnp.take_along_axis(state.tokens, beam[:, :beams, None], axis=1)
        scores, place = top_k(jnp.concatenate([old.scores, values], axis=1), beams)
        tokens = jnp.concatenate([old.tokens, tokens], axis=1)
        lengths = jnp.concatenate([old.lengths, jnp.full_like(old.lengths, state.length)], axis=1)
        return Hypotheses(
            tokens=jnp.take_along_axis(tokens, place[:, :, None], axis=1),
            lengths=jnp.take_along_axis(lengths, place, axis=1),
            scores=scores,
        )

    def _slots(self, steps: int) -> int:
        """Number of slots of a cache for this many steps."""
        return self.translator.prefix_length + 2 + steps * self.config.beams

    def _grow(self, cache: Cache, steps: int) -> tuple[tuple, ...]:
        """The cache, grown to hold this many steps."""
        return grow_cache(cache, self._slots(steps))


def short_length(full: int) -> int:
    """How many of `full` columns the encoder computes if the rest are pads."""
    return full - full // 4
