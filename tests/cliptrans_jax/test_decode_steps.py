"""Steps of a search with two beams, worked out by hand; words have ids from 3 up."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from cliptrans_jax.decode import DecodeConfig, Hypotheses, Search, SearchState
from cliptrans_jax.models.cliptrans import ModelConfig, Translator

VOCAB, PAD, END, START = 14, 1, 2, 2
LIMIT = 8  # new tokens


@functools.cache
def advance(config):
    return jax.jit(Search(Translator(ModelConfig()), config).advance)


TWO_BEAMS = DecodeConfig(beams=2, max_new_tokens=LIMIT)
SCORES = np.log([0.6, 0.4])
IDS = ([START, 5, 3], [START, 5, 4])
LONG_PENALTY = DecodeConfig(beams=2, max_new_tokens=LIMIT, length_penalty=2.0, early_stopping=False)


def one_step(config, *probabilities, scores=SCORES, ids=IDS, finished=(), done=False):
    """The state of one example after a step, and the choice.

    Args:
      probabilities: probabilities of each beam's continuations, by id.
      scores: scores of the two hypotheses, whose probabilities are 0.6 and 0.4 by default.
      ids: ids of the two hypotheses.
      finished: scores of finished hypotheses, which are [START, 6].
      done: whether the search is over.
    """

    def padded(rows):
        more = [PAD] * (LIMIT + 1 - len(rows[0]))
        return jnp.asarray([[[*row, *more] for row in rows]], "int32")

    ended = [*finished, -np.inf, -np.inf][:2]
    state = SearchState(
        length=jnp.int32(len(ids[0])),
        tokens=padded(ids),
        scores=jnp.asarray([scores], "float32"),
        origins=jnp.array([[[0] * (LIMIT + 1), [1] * (LIMIT + 1)]], "int32"),
        finished=Hypotheses(
            tokens=padded([[START, 6]] * 2),
            lengths=jnp.full((1, 2), 2, jnp.int32),
            scores=jnp.array([ended], jnp.float32),
        ),
        done=jnp.array([done]),
        cache=(),
    )
    logits = np.full((1, 2, VOCAB), -30.0, "float32")
    for row, of_beam in zip(logits[0], probabilities, strict=True):
        row[list(of_beam)] = np.log(list(of_beam.values())) + 7  # scores are not normalised yet
    state, chosen = jax.device_get(advance(config)(state, jnp.asarray(logits)))
    return jax.tree.map(lambda x: x[0] if np.ndim(x) else x, (state, chosen))


def test_search_step_by_hand():
    first = {END: 0.5, 3: 0.3, 4: 0.2}
    state, chosen = one_step(LONG_PENALTY, first, {3: 0.85, END: 0.1, 4: 0.02, 0: 0.01, 7: 0.02})
    np.testing.assert_allclose(np.exp(chosen.scores), [0.34, 0.3, 0.18, 0.12], rtol=1e-5)
    assert chosen.tokens.tolist() == [3, END, 3, 4]
    assert chosen.beams.tolist() == [1, 0, 0, 0]
    np.testing.assert_allclose(np.exp(chosen.next_scores), [0.34, 0.18], rtol=1e-5)
    assert (chosen.next_tokens.tolist(), chosen.next_beams.tolist()) == ([3, 3], [1, 0])
    np.testing.assert_array_equal(state.scores, chosen.next_scores)
    assert int(state.length) == 4
    assert state.tokens[:, :5].tolist() == [[START, 5, 4, 3, PAD], [START, 5, 3, 3, PAD]]
    assert state.origins[:, 0].tolist() == [1, 0]
    # The end does not count towards the length; start token and language code do.
    np.testing.assert_allclose(state.finished.scores, [np.log(0.3) / 3**2, -np.inf], rtol=1e-5)
    assert state.finished.tokens[0].tolist() == [START, 5, 3] + [PAD] * 6
    assert state.finished.lengths[0] == 3
    assert not state.done


def test_end_token_outside_the_best_beams_is_dropped():
    first, second = {3: 0.5, END: 0.35, 4: 0.15}, {3: 0.6, 4: 0.4}
    state, chosen = one_step(TWO_BEAMS, first, second)
    assert chosen.tokens.tolist() == [3, 3, END, 4]
    assert np.all(state.finished.scores == -np.inf)
    assert (chosen.next_tokens.tolist(), chosen.next_beams.tolist()) == ([3, 3], [0, 1])


@pytest.mark.parametrize(
    ("finished", "left"),
    [
        ((-0.2, -0.5), [(-0.2, 2), (-0.4013, 3)]),  # log(0.3) / 3 and its index
        ((-0.2, -0.3), [(-0.2, 2), (-0.3, 2)]),
        ((-0.6, -0.7), [(-0.4013, 3), (-0.6, 2)]),
    ],
)
def test_best_finished_hypotheses_are_kept(finished, left):
    state, _ = one_step(TWO_BEAMS, {END: 0.5, 3: 0.5}, {3: 0.9, 4: 0.1}, finished=finished)
    assert state.done
    for place, (score, length) in enumerate(left):
        assert state.finished.scores[place] == pytest.approx(score, abs=1e-4)
        assert state.finished.lengths[place] == length
        assert state.finished.tokens[place].tolist().index(PAD) == length


def test_ties_prefer_the_earlier_beam_and_the_smaller_id():
    _, chosen = one_step(TWO_BEAMS, *[{4: 0.5, 3: 0.5}] * 2, scores=(-0.5, -0.5))
    assert chosen.tokens.tolist() == [3, 4, 3, 4]
    assert chosen.beams.tolist() == [0, 0, 1, 1]
    ids = [[START, 5, 3, word] for word in (3, 4)]
    certain = [{END: 1.0}] * 2
    state, _ = one_step(TWO_BEAMS, *certain, ids=ids, scores=(-0.5, -1.0), finished=(-0.5 / 4,))
    assert state.finished.lengths.tolist() == [2, 4]  # the one that ended first


@pytest.mark.parametrize(("worst", "over"), [(-0.115, True), (-0.125, False), (-np.inf, False)])
def test_search_ends_when_no_open_beam_can_improve(worst, over):
    """The best continuation, 0.34 at length 3, scores log(0.34) / 9 = -0.1199."""
    rows = {3: 0.5, 4: 0.5}, {3: 0.85, 4: 0.15}
    state, _ = one_step(LONG_PENALTY, *rows, finished=(-0.01, worst))
    assert bool(state.done) is over
    state, _ = one_step(TWO_BEAMS, *rows, finished=(-0.01, worst))
    assert bool(state.done) is (worst > -np.inf)  # early stopping needs only their number


def test_finished_search_is_fed_pads_and_adds_nothing():
    rows = {END: 0.9, 3: 0.1}, {END: 0.8, 4: 0.2}
    state, _ = one_step(LONG_PENALTY, *rows, finished=(-9.0,), done=True)
    assert state.done
    np.testing.assert_array_equal(state.finished.scores, [-9, -np.inf])
    np.testing.assert_array_equal(state.tokens[:, 3], PAD)


def test_last_step_can_only_end():
    ids = [[START, 5, 3, 3, 3, 3, 3, word] for word in (3, 4)]
    state, chosen = one_step(TWO_BEAMS, {3: 0.5, 4: 0.5}, {3: 0.5, 4: 0.5}, ids=ids)
    assert chosen.tokens[:2].tolist() == [END, END]
    np.testing.assert_allclose(state.finished.scores, np.log([0.6, 0.4]) / 8, rtol=1e-5)
    assert state.finished.tokens[:, :8].tolist() == ids
    assert state.done
