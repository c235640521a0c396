"""The order of examples in an epoch, and each example's random numbers."""

import functools

import numpy as np

# Two streams of one seed: the order of an epoch must be independent of the examples' draws.
ORDER_STREAM, EXAMPLE_STREAM = 0, 1


@functools.lru_cache(maxsize=4)
def epoch_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order of one epoch: [size] int64, read-only. Raises ValueError for a negative
    seed.

    Uses numpy's legacy generator, whose stream is frozen: a run started under one version of numpy
    resumes exactly under another.
    """
    order = np.random.RandomState(_bits(seed, ORDER_STREAM, epoch)).permutation(size)
    order.flags.writeable = False
    return order


def example_index(seed: int, epoch: int, position: int, *, size: int) -> int:
    """Returns the example at place `position` (0 <= position < size) of an epoch."""
    return int(epoch_permutation(seed, epoch, size)[position])


def example_generator(seed: int, epoch: int, index: int, *, copy: int = 0) -> np.random.Generator:
    """Returns the generator of example `index` in an epoch, the same on any host and worker.

    If an epoch repeats the example, every copy has its own generator.
    """
    path = (epoch, index, copy) if copy else (epoch, index)
    return np.random.Generator(_bits(seed, EXAMPLE_STREAM, *path))


def _bits(seed: int, stream: int, *path: int) -> np.random.MT19937 | np.random.PCG64:
    if seed < 0:
        raise ValueError(f"config.seed={seed} must not be negative; use any integer from 0")
    entropy = np.random.SeedSequence((seed, stream, *path))
    kind = np.random.MT19937 if stream == ORDER_STREAM else np.random.PCG64
    return kind(entropy)


def steps_per_epoch(size: int, batch: int) -> int:
    """Returns the number of complete batches in an epoch, size // batch; training drops an
    incomplete last one. Raises ValueError if the source is smaller than a batch, since every epoch
    would be empty."""
    if not 0 < batch <= size:
        raise ValueError(
            f"config.optim.batch={batch} must be from 1 to {size}, the number of examples in "
            "config.data.train_split; lower config.optim.batch or use more data"
        )
    return size // batch


def host_rows(batch: int, shard: tuple[int, int]) -> slice:
    """Returns the rows of the global batch that host shard[0] of shard[1] yields. Raises ValueError
    if the batch does not divide among the hosts, or there is no such host."""
    host, hosts = shard
    if not 0 <= host < hosts:
        raise ValueError(f"shard={shard} must be (host, hosts) with 0 <= host < hosts")
    if batch < 1 or batch % hosts:
        raise ValueError(
            f"config.optim.batch={batch} must be a positive multiple of the {hosts} hosts; "
            "change config.optim.batch or the number of hosts"
        )
    rows = batch // hosts
    return slice(host * rows, (host + 1) * rows)
