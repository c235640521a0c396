"""CLIPTrans' batches, against the original's dataset and loader in torch.

The peer takes the original's steps. An item is the token ids of source and target, from lists,
their masks and the sentence's feature, made into tensors. In captioning, tokens of the source are
dropped at random, by default all of them. A batch is padded to its longest sentences. On both
sides, sentences are already tokenized and features already computed. A turn is an epoch of 29,000
pairs, as in Multi30k, of 8 to 40 tokens. The sentences of an epoch are compared first.

    pip install torch "transformers>=5.23"
    python benchmarks/translation_feed.py
"""

import argparse
import collections
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import timing

from cliptrans_jax.data.examples import NoiseConfig, choose_examples
from cliptrans_jax.data.feed import BatchingConfig, Inputs, TrainFeed
from cliptrans_jax.stages import STAGES
from common_jax.inputs.ragged import Ragged

PAD, WIDTH, SHORTEST, LONGEST = 1, 512, 8, 40
# Case -> (stage, probability of dropping a token).
CASES = {"translate": ("translate", 1.0), "caption": ("caption", 1.0)}
CASES |= {"caption, half dropped": ("caption", 0.5)}


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__, repeats=5)
    parser.add_argument("--pairs", type=int, default=29_000)
    parser.add_argument("--batch", type=int, default=256)
    return parser.parse_args()


def make_tokens(count: int) -> dict[str, Ragged]:
    """Token ids of `count` sentences in two languages."""
    rng = np.random.default_rng(0)
    lengths = {code: rng.integers(SHORTEST, LONGEST + 1, count) for code in ("en", "de")}
    return {
        code: Ragged.of(rng.integers(4, 250_000, size.sum(), dtype=np.int32), size)
        for code, size in lengths.items()
    }


def feed_of(case: str, tokens: dict[str, Ragged], features: np.ndarray, batch: int) -> TrainFeed:
    """Our batches."""
    stage, mask_prob = CASES[case]
    noise = NoiseConfig(mask_prob=mask_prob)
    examples = choose_examples(STAGES[stage], tokens, pair=("en", "de"), train=True, noise=noise)
    inputs = Inputs(examples, features, None, PAD, 1024)
    return TrainFeed(inputs, noise, BatchingConfig(), batch, 0, (0, 1))


def loader_of(
    torch: Any, case: str, tokens: dict[str, Ragged], features: np.ndarray, batch: int
) -> Any:
    """The original's batches."""
    data, pad = torch.utils.data, torch.nn.utils.rnn.pad_sequence
    stage, mask_prob = CASES[case]
    source = [ids.tolist() for ids in tokens["en"]]
    target = source if stage == "caption" else [ids.tolist() for ids in tokens["de"]]
    vectors = torch.tensor(features)

    class Pairs(data.Dataset):
        def __len__(self) -> int:
            return len(source)

        def __getitem__(self, index: int) -> tuple:
            ids = torch.tensor(source[index])[None]
            if stage == "caption":
                keep = torch.rand(ids.shape) > mask_prob
                keep[:, 0] = keep[:, -1] = True
                ids = ids[keep][None]
            labels = torch.tensor(target[index])
            return vectors[index], ids[0], torch.ones_like(ids[0]), labels

    def collate(items: list) -> dict[str, Any]:
        vectors, ids, masks, labels = zip(*items, strict=True)
        return {
            "features": torch.stack(vectors),
            "source": pad(ids, batch_first=True, padding_value=PAD),
            "mask": pad(masks, batch_first=True, padding_value=0),
            "labels": pad(labels, batch_first=True, padding_value=PAD),
        }

    return data.DataLoader(Pairs(), batch, shuffle=True, drop_last=True, collate_fn=collate)


def check_labels(feed: TrainFeed, loader: Any) -> None:
    """Fails unless both yield nearly all sentences, and each of them at most once."""
    ours = itertools.islice(feed.batches(0), feed.steps_per_epoch)
    counts = []
    for batches in (ours, loader):
        rows = (np.asarray(row) for batch in batches for row in batch["labels"])
        counts.append(collections.Counter(tuple(row[row != PAD].tolist()) for row in rows))
    found, wanted = counts
    assert found.total() == wanted.total() and max(found.values()) == max(wanted.values()) == 1
    # Each drops a different remainder of the epoch.
    assert len(found.keys() - wanted.keys()) < feed.batch


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads)
    torch, _ = timing.import_torch(sizes.threads)
    tokens = make_tokens(sizes.pairs)
    features = np.random.default_rng(1).normal(size=(sizes.pairs, WIDTH)).astype("float32")
    cases: dict[str, Callable[[], Any]] = {}
    for case in CASES:
        feed = feed_of(case, tokens, features, sizes.batch)
        loader = loader_of(torch, case, tokens, features, sizes.batch)
        check_labels(feed, loader)
        cases[f"ours, {case}"] = lambda feed=feed: collections.deque(
            itertools.islice(feed.batches(0), feed.steps_per_epoch), maxlen=0
        )
        cases[f"torch, {case}"] = lambda loader=loader: collections.deque(loader, maxlen=0)
    times = timing.take_turns(cases, sizes.repeats)
    claims = [
        timing.compare(
            times,
            f"ours, {case}",
            f"torch, {case}",
            claim=f"batches of CLIPTrans, {case}",
            target=1.0,
        )
        for case in CASES
    ]
    timing.report("translation_feed", claims, times=times)


if __name__ == "__main__":
    main()
