"""Orders and draws depend only on seed, epoch and position."""

import itertools

import numpy as np

from common_jax import inputs

SIZE = 30


def test_order_is_a_function_of_seed_and_epoch():
    first = inputs.epoch_permutation(3, 1, SIZE)
    inputs.epoch_permutation.cache_clear()
    np.testing.assert_array_equal(first, inputs.epoch_permutation(3, 1, SIZE))
    np.testing.assert_array_equal(np.sort(first), np.arange(SIZE))
    assert not first.flags.writeable  # it is cached for the next call
    for other in ((4, 1), (3, 2)):
        assert (inputs.epoch_permutation(*other, SIZE) != first).any()
    places = [inputs.example_index(3, 1, place, size=SIZE) for place in range(SIZE)]
    np.testing.assert_array_equal(places, first)


def test_order_does_not_depend_on_the_numpy_version():
    # From a generator whose numbers numpy has frozen; another order would break resuming.
    assert inputs.epoch_permutation(0, 0, 8).tolist() == [6, 3, 5, 0, 7, 2, 1, 4]


def test_draws_do_not_depend_on_the_numpy_version():
    # A generator's raw bits, which numpy does not change either.
    for place, want in (
        ((0, 0, 0), 16412783775159424549),
        ((3, 2, 7), 16173834436121549858),
    ):
        assert inputs.example_generator(*place).bit_generator.random_raw() == want
    second = inputs.example_generator(3, 2, 7, copy=1)
    assert second.bit_generator.random_raw() == 9554939614766032303


def test_draws_depend_on_seed_epoch_index_and_copy():
    """Seed, epoch, index and copy, each separately; and they differ from those of the order."""
    places = itertools.product(range(4), range(4), range(4), range(4))
    draws = [inputs.example_generator(*place, copy=copy).random(3) for *place, copy in places]
    assert len(np.unique(draws)) == 3 * 4**4


def test_orders_depend_on_seed_epoch_and_size():
    orders = {
        (size, tuple(inputs.epoch_permutation(seed, epoch, size).tolist()))
        for seed, epoch, size in itertools.product(range(5), range(5), (30, 31))
    }
    assert len(orders) == 50
    assert len({order[0] for size, order in orders if size == 30}) > 10  # whatever comes first
