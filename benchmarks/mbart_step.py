"""A training step of mBART against transformers, on the same weights and sentences.

Forward pass, cross entropy over labels other than pads, backward pass and AdamW, in float32. Ours
is the step of a run of `cliptrans_jax` without a prefix. The peer is
`MBartForConditionalGeneration` in torch, with fused attention and fused AdamW. Sentences have 8 to
24 tokens, and the longest has 24, so that both pad to 24. In a run, ours pads to 16, 24, 32, 48 or
64 tokens, each compiled once, and torch to the longest sentence. What this costs in tokens, for
sentences of 8 to 40 tokens sorted by length within a window, is counted and printed. The losses of
the first three steps without dropout are compared first; then both are timed without and with
dropout.

    pip install torch "transformers>=5.23"
    python benchmarks/mbart_step.py
"""

import argparse
import dataclasses

import decode
import numpy as np
import timing

from cliptrans_jax.data.feed import BatchingConfig
from cliptrans_jax.models.cliptrans import Translator, partition_rules
from cliptrans_jax.runs.objective import make_loss
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.optim import OptimConfig

OPTIM = OptimConfig(steps=1000, schedule="constant", lr=1e-4, lr_per=None, decay_all=True)
LONGEST = 24
BATCHING = BatchingConfig(bucket=16, half_steps=True)
TOLERANCE = 1e-3
IGNORED = -100  # transformers' label for pads


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__)
    parser.add_argument("--batch", type=int, default=32, help="sentences")
    parser.add_argument("--vocab", type=int, default=10_010)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3, help="layers of encoder and decoder each")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.1)
    return parser.parse_args()


def make_batch(sizes: argparse.Namespace, config: MBartConfig) -> dict[str, np.ndarray]:
    """Sources, and labels with the same lengths in another order."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, LONGEST + 1, sizes.batch)
    lengths[0] = LONGEST
    batch = {}
    for name in ("source", "labels"):
        batch[name] = np.full((sizes.batch, LONGEST), config.pad, np.int32)
        for row, length in zip(batch[name], rng.permutation(lengths), strict=True):
            words = rng.integers(decode.FIRST_WORD, config.vocab, length - 2)
            row[:length] = [decode.LANGUAGE, *words, config.eos]
    return batch


def padding_cost(config: MBartConfig, batch: int) -> float:
    """Ratio of tokens in our batches to those in batches padded to their longest sentence."""
    flags = argparse.Namespace(sentences=64 * batch, batch=batch, vocab=config.vocab)
    longest = [x.shape[1] for x in decode.make_batches(flags, config)]
    return sum(map(BATCHING.padded, longest)) / sum(longest)


def training_step(
    translator: Translator, params: dict, batch: dict[str, np.ndarray], dropout: float
) -> timing.Training:
    """The step of a run that trains only the translator."""
    mbart = dataclasses.replace(translator.config.mbart, dropout=dropout)
    model = Translator(dataclasses.replace(translator.config, mbart=mbart))
    loss, rules = make_loss(model, None, label_smoothing=0.0), partition_rules(model.config)
    task = timing.make_task(loss, lambda key: params, rules, batch, streams=("dropout",))
    return timing.Training(task, OPTIM, batch)


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads, keep_memory=True)
    torch, transformers = timing.import_torch(sizes.threads)
    translator, params = decode.make_model(sizes)
    plain = dataclasses.replace(translator.config.mbart, dropout=0.0)
    batch = make_batch(sizes, plain)
    assert BATCHING.padded(LONGEST) == LONGEST
    source = torch.tensor(batch["source"]).long()
    labels = torch.tensor(np.where(batch["labels"] == plain.pad, IGNORED, batch["labels"])).long()
    mask = (source != plain.pad).long()

    def theirs(dropout: float):
        settings = {"attention_dropout": 0.0, "activation_dropout": 0.0, "dropout": dropout}
        network = decode.make_network(
            torch, transformers, plain, params, attn_implementation="sdpa", **settings
        ).train()

        def loss():
            return network(input_ids=source, attention_mask=mask, labels=labels).loss

        return timing.torch_step(torch, OPTIM, loss, list(network.parameters()))

    def ours(dropout: float) -> timing.Training:
        return training_step(translator, params, batch, dropout)

    cases = {"ours": ours(0.0), "transformers": theirs(0.0)}
    wrong = timing.check_losses(cases, TOLERANCE)
    cases |= {
        "ours, dropout": ours(sizes.dropout),
        "transformers, dropout": theirs(sizes.dropout),
    }
    tokens = int(mask.sum())
    print(
        f"{sizes.batch} sentences, {tokens} of {mask.numel()} tokens are not pads; width "
        f"{sizes.width}, {sizes.layers} + {sizes.layers} layers"
    )
    cost = padding_cost(plain, sizes.batch)
    print(f"in a run, ours has {cost:.2f} times the tokens of padding to the longest sentence")
    times = timing.take_turns(cases, sizes.repeats)
    claims = [
        timing.compare(
            times,
            f"ours{kind}",
            f"transformers{kind}",
            claim=f"training step of mBART{kind}",
            target=1.0,
        )
        for kind in ("", ", dropout")
    ]
    timing.report(
        "mbart_step",
        claims,
        times=times,
        tokens=tokens,
        padding_cost_in_a_run=cost,
        largest_difference_of_losses=wrong,
    )


if __name__ == "__main__":
    main()
