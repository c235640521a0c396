"""Beam search of `cliptrans_jax.decode` against `transformers` and CTranslate2 on the same CPU.

All translate the same sentences with the same weights (mBART, random), the same settings and the
same batches, sorted by length, in turns, on the same number of threads. torch pads a batch to its
longest sentence, ours to 16, 32 or 64 tokens as in a run. First all translations are compared
token by token. Those that differ from torch's are printed with both scores and with the margin
between our two best, which is tiny if rounding decides. It fails unless 95 % are equal to those of
each peer in float32. Compilation is timed separately. Then it
prints sentences per second, the share of our time that all matrix products would take at the speed
of one large product measured in the same turns, and the ratios; the last line is JSON. CTranslate2
runs in float32 and, for reference, in int8; it is skipped if it is not installed.

    pip install torch "transformers>=5.23" ctranslate2
    python benchmarks/decode.py
"""

import argparse
import importlib.util
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import decode_ctranslate2
import jax
import numpy as np
import timing
from flax import traverse_util

from cliptrans_jax.data.feed import BatchingConfig
from cliptrans_jax.decode import FIRST, DecodeConfig, Hypotheses, Search, short_length
from cliptrans_jax.models.cliptrans import ModelConfig, Params, Translator
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.translators import mbart_names, transformer_names
from cliptrans_jax.translators.mbart import OFFSET, MBartConfig
from common_jax.weights import table as tables

CTRANSLATE2 = {"CTranslate2": "float32", "CTranslate2, int8": "int8"}
SAME = 0.95  # least share of equal translations; in the others, rounding swaps two hypotheses
TARGETS = {"torch": 1.5, "CTranslate2": 1.0, "CTranslate2, int8": None}
LANGUAGE = 9  # the only language code
FIRST_WORD = 10
# Scales that make random weights behave like trained ones: peaked distributions, and translations
# of 10 to 40 tokens without repetition loops.
GAIN = 0.5  # scale of weight matrices, relative to 1 / sqrt(fan in)
EMBEDDING = 0.15  # scale of token embeddings
POSITION = 0.5  # scale of position embeddings, relative to token embeddings
END, MIDDLE = 0.2, 30  # preference for the end token, and the position where it starts

Batch = np.ndarray  # [B, S] tokens, pads at the end
Translate = Callable[[Batch], Any]


def parse_sizes() -> argparse.Namespace:
    parser = timing.parser(__doc__, repeats=5)
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=60, help="longest translation")
    parser.add_argument("--vocab", type=int, default=10_010, help="tokens, ten of them special")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6, help="layers of encoder and decoder each")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--growth", type=int, default=DecodeConfig.growth)
    parser.add_argument("--halvings", type=int, default=DecodeConfig.halvings)
    return parser.parse_args()


def make_model(sizes: argparse.Namespace) -> tuple[Translator, Params]:
    """mBART without a prefix, and its weights."""
    config = MBartConfig(
        vocab=sizes.vocab,
        width=sizes.width,
        encoder_layers=sizes.layers,
        decoder_layers=sizes.layers,
        encoder_heads=sizes.heads,
        decoder_heads=sizes.heads,
        encoder_hidden=4 * sizes.width,
        decoder_hidden=4 * sizes.width,
    )
    translator = Translator(ModelConfig(config, MapperConfig(prefix=0)))
    shapes = jax.eval_shape(translator.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        noise = rng.normal(size=leaf.shape).astype("float32")
        if path.endswith("positions/embedding"):
            flat[path] = POSITION * EMBEDDING * math.sqrt(config.width) * noise
        elif path.endswith("embedding"):
            flat[path] = EMBEDDING * noise
        elif path.endswith("kernel"):
            fan_in = math.prod(leaf.shape[:-1]) if "/out/" in path else leaf.shape[0]
            flat[path] = GAIN / math.sqrt(fan_in) * noise
        else:  # norm scales of both signs, so that tokens do not predict themselves
            flat[path] = noise if path.endswith("scale") else np.zeros_like(noise)
    favour_end(flat, config, rng)
    return translator, traverse_util.unflatten_dict(flat, sep="/")


def favour_end(flat: dict[str, np.ndarray], config: MBartConfig, rng: np.random.Generator) -> None:
    """Makes the end token likelier with each position: one direction of the decoder's states grows
    with the position, and the end token's embedding has a component along it."""
    direction = rng.normal(size=config.width).astype("float32")
    slope = (np.arange(config.positions + OFFSET, dtype="float32") - MIDDLE) / MIDDLE
    flat["mbart/decoder/positions/embedding"] += np.outer(slope, direction)
    gains = flat["mbart/decoder/embedding_norm/scale"] * flat["mbart/decoder/norm/scale"]
    flat["mbart/embedding"][config.eos] += END * direction * gains


def make_batches(sizes: argparse.Namespace, config: MBartConfig) -> list[Batch]:
    """Sentences of 8 to 40 tokens, 17 on average, about as long as Multi30k's, sorted by length."""
    rng = np.random.default_rng(1)
    lengths = np.sort(np.clip(rng.gamma(6.0, 2.8, sizes.sentences).round(), 8, 40).astype(int))
    batches = []
    for part in np.split(lengths, range(sizes.batch, sizes.sentences, sizes.batch)):
        batch = np.full((len(part), part.max()), config.pad, np.int32)
        for row, length in zip(batch, part, strict=True):
            words = rng.integers(FIRST_WORD, sizes.vocab, length - 2)
            row[:length] = [LANGUAGE, *words, config.eos]
        batches.append(batch)
    return batches


def compile_ours(
    translator: Translator, params: Params, config: DecodeConfig, batches: Sequence[Batch]
) -> tuple[Translate, dict[tuple[int, ...], float]]:
    """A function from a batch to its hypotheses, and the compile time of each padded shape."""
    run = jax.jit(Search(translator, config).run)
    params, programs, seconds = jax.device_put(params), {}, {}

    def arguments(batch: Batch) -> tuple:
        room = BatchingConfig(config.bucket).padded(batch.shape[1]) - batch.shape[1]
        pad = translator.config.mbart.pad
        source = np.pad(batch, ((0, 0), (0, room)), constant_values=pad)
        return params, None, source, np.full(len(batch), LANGUAGE, np.int32)

    for batch in batches:
        call = arguments(batch)
        if call[2].shape not in programs:
            start = time.perf_counter()
            programs[call[2].shape] = run.lower(*call).compile()
            seconds[call[2].shape] = time.perf_counter() - start

    def translate(batch: Batch) -> Hypotheses:
        call = arguments(batch)
        return jax.device_get(programs[call[2].shape](*call))

    return translate, seconds


def make_network(
    torch: Any, transformers: Any, config: MBartConfig, params: Params, **settings: Any
) -> Any:
    """`MBartForConditionalGeneration` with our weights."""
    theirs = transformers.MBartConfig(
        vocab_size=config.vocab,
        d_model=config.width,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_attention_heads=config.encoder_heads,
        decoder_attention_heads=config.decoder_heads,
        encoder_ffn_dim=config.encoder_hidden,
        decoder_ffn_dim=config.decoder_hidden,
        max_position_embeddings=config.positions,
        scale_embedding=config.scale_embedding,
        **settings,
    )
    network = transformers.MBartForConditionalGeneration(theirs)
    tensors = tables.write(mbart_names.table(config), params["mbart"])
    tensors |= {alias: tensors[name] for alias, name in transformer_names.ALIASES.items()}
    network.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    return network


def make_theirs(
    torch: Any, network: Any, ours: MBartConfig, config: DecodeConfig
) -> tuple[Translate, Translate]:
    """Two functions from a batch to the result of `generate`: without and with scores."""

    def generate(batch: Batch, scores: bool) -> Any:
        source = torch.tensor(batch, dtype=torch.int64)
        with torch.inference_mode():
            return network.generate(
                input_ids=source,
                attention_mask=(source != ours.pad).long(),
                num_beams=config.beams,
                do_sample=False,
                max_new_tokens=config.max_new_tokens,
                length_penalty=config.length_penalty,
                early_stopping=config.early_stopping,
                decoder_start_token_id=ours.start,
                forced_bos_token_id=LANGUAGE,
                forced_eos_token_id=ours.eos,
                return_dict_in_generate=scores,
                output_scores=scores,
            )

    return (lambda batch: generate(batch, False)), (lambda batch: generate(batch, True))


def differences(mine: Hypotheses, theirs: Any, end: int) -> list[str]:
    """One line for each translation in a batch that differs."""
    lines = []
    for row, expected in enumerate(theirs.sequences.tolist()):
        length, scores = mine.lengths[row, 0], mine.scores[row]
        got = [*mine.tokens[row, 0, :length].tolist(), end]
        expected = expected[: expected.index(end, 1) + 1]
        if got != expected:
            pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(got, expected))  # noqa: B905
            score = theirs.sequences_scores[row]
            lines.append(
                f"differs from token {sum(1 for _ in pairs)} of {len(got)} on: score "
                f"{scores[0]:.6f}, torch's {score:.6f}; our two best are "
                f"{scores[0] - scores[1]:.1e} apart"
            )
    return lines


def check_equal(counts: Mapping[str, int], total: int) -> None:
    """Prints how many translations are equal to each peer's, and fails if too few are to those of a
    peer in float32."""
    for name, count in counts.items():
        print(f"equal to {name}: {count} of {total}")
    exact = [name for name in counts if CTRANSLATE2.get(name) != "int8"]
    assert all(counts[name] >= SAME * total for name in exact), "translations differ"


def work(mine: Hypotheses, config: DecodeConfig) -> np.ndarray:
    """For every step [T, 2]: the number of examples that ours computes, and the number of steps
    their cache has room for. With early stopping, an example ends with its last hypothesis."""
    ends = mine.lengths.max(axis=1) - FIRST + 1
    size, halvings, steps = len(ends), config.halvings, []
    for step in range(1, ends.max() + 1):
        parts = config.parts if size == len(ends) else config.parts[-1:]
        steps.append((size, next(part for part in parts if part >= step)))
        while halvings and size % 2 == 0 and np.sum(ends > step) <= size // 2:
            size, halvings = size // 2, halvings - 1
    return np.asarray(steps)


def products(
    sizes: argparse.Namespace, config: DecodeConfig, steps: np.ndarray, source: int, encoded: int
) -> dict[str, int]:
    """FLOPs of our matrix products for a batch, with a multiply-add counted as two.

    Args:
      steps: see `work`.
      source: padded length of the source.
      encoded: how many of its columns the encoder computes.
    """
    examples, room = steps.T
    batch, rows = int(examples[0]), int(config.beams * examples.sum())
    linear, width = 2 * sizes.layers * sizes.width**2, sizes.width * sizes.layers
    attended = int(np.sum(examples * (2 + config.beams * room + source)))
    return {
        # An encoder layer has 12 D^2 weights; keys and values of its output for a decoder layer
        # take 2 D^2.
        "encoder": batch * (encoded * (linear * 12 + 4 * encoded * width) + source * linear * 2),
        "decoder": (rows + 2 * batch) * linear * 14,
        "attention": 4 * config.beams * attended * width,
        "vocabulary": 2 * (rows + batch) * sizes.width * sizes.vocab,
    }


def make_product(sizes: argparse.Namespace) -> tuple[Callable[[], Any], int]:
    """The product of a step's rows and an MLP's matrix, and its FLOPs."""
    rows, width = sizes.batch * sizes.beams, sizes.width
    x, kernel = np.ones((rows, width), "float32"), np.ones((width, 4 * width), "float32")
    arguments = jax.device_put((x, kernel))
    compiled = jax.jit(lambda x, kernel: x @ kernel).lower(*arguments).compile()
    return lambda: compiled(*arguments), 8 * rows * width**2


def take_turns(
    cases: dict[str, Translate], product: Callable[[], Any], batches: list[Batch], repeats: int
) -> tuple[dict[str, np.ndarray], float]:
    """Wall-clock and CPU seconds for all batches [repeats, 2], with turns after every batch, and
    the median seconds of the product."""
    times, single = {name: [] for name in cases}, []
    for _ in range(max(timing.LEAST, repeats)):
        totals = {name: np.zeros(2) for name in cases}
        for batch in batches:
            for name, translate in cases.items():
                totals[name] += timing.seconds_of(translate, batch)
            single += [timing.seconds_of(product)[0] for _ in range(20)]
        for name, seconds in totals.items():
            times[name].append(seconds)
    return {name: np.stack(turns) for name, turns in times.items()}, statistics.median(single)


def main() -> None:
    sizes = parse_sizes()
    timing.start(sizes.threads, keep_memory=True)
    translator, params = make_model(sizes)
    mbart = translator.config.mbart
    config = DecodeConfig(
        beams=sizes.beams,
        max_new_tokens=sizes.new_tokens,
        batch=sizes.batch,
        growth=sizes.growth,
        halvings=sizes.halvings,
    )
    batches = make_batches(sizes, mbart)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, {sizes.threads} threads")
    torch, transformers = timing.import_torch(sizes.threads)
    # CTranslate2 asks for `normalize_before`; transformers' mBART always does.
    network = make_network(torch, transformers, mbart, params, normalize_before=True).eval()
    theirs, theirs_scored = make_theirs(torch, network, mbart, config)
    others = {}
    if importlib.util.find_spec("ctranslate2"):
        others = {
            name: decode_ctranslate2.make_peer(
                network, mbart, config, language=LANGUAGE, compute=compute, threads=sizes.threads
            )
            for name, compute in CTRANSLATE2.items()
        }
    else:
        print("skipping CTranslate2, which is not installed (pip install ctranslate2)")
    ours, compiling = compile_ours(translator, params, config, batches)
    shapes = ", ".join(f"{seconds:.0f} s for {shape}" for shape, seconds in compiling.items())
    print(f"ours compiled in {sum(compiling.values()):.0f} s: {shapes}\n")

    lines, written, counts, same = [], [], [], dict.fromkeys(others, 0)
    for number, batch in enumerate(batches):
        mine = ours(batch)
        unequal = differences(mine, theirs_scored(batch), mbart.eos)
        lines += [f"  batch {number}, {line}" for line in unequal]
        written += mine.lengths[:, 0].tolist()
        for name, other in others.items():
            same[name] += decode_ctranslate2.count_equal(other(batch), mine.tokens, mine.lengths)
        steps = work(mine, config)
        padded = BatchingConfig(config.bucket).padded(batch.shape[1])
        short = short_length(padded)
        encoded = short if batch.shape[1] <= short else padded
        counts.append(products(sizes, config, steps, padded, encoded))
        print(
            f"batch {number}: {len(batch)} sources of up to {batch.shape[1]} tokens, {len(steps)} "
            f"steps with {steps[:, 0].mean():.0f} examples on average"
        )
    equal = len(written) - len(lines)
    print("\n".join(lines))
    check_equal({"torch": equal} | same, len(written))
    print(
        f"lengths: {min(written)} to {max(written)} tokens, {statistics.mean(written):.0f} on "
        "average\n"
    )

    product, single_flops = make_product(sizes)
    cases = {"ours": ours, "torch": theirs} | others
    times, single = take_turns(cases, product, batches, sizes.repeats)
    rates = {name: (sizes.sentences / turns[:, 0]).tolist() for name, turns in times.items()}
    for name, rate in rates.items():
        middle = statistics.median(rate)
        print(f"{name:18s}{middle:7.2f} sentences/s  ({min(rate):.2f} to {max(rate):.2f})")
    flops = {name: sum(count[name] for count in counts) for name in counts[0]}
    total = sum(flops.values())
    speed = single_flops / single
    share = total / speed / float(np.median(times["ours"][:, 0]))
    print("  ".join(f"{name} {count / 1e9:.0f}" for name, count in flops.items()), "GFLOP")
    print(f"one product runs at {speed / 1e9:.0f} GFLOP/s; at that speed, all products would take")
    print(f"  {share:.0%} of our time")
    claims = [
        timing.compare(times, "ours", name, claim="beam search of mBART", target=TARGETS[name])
        for name in cases
        if name != "ours"
    ]
    details = {
        "sentences": sizes.sentences,
        "batch": sizes.batch,
        "beams": sizes.beams,
        "equal": {"torch": equal} | same,
        "sentences_per_second": rates,
        "compile_seconds": sum(compiling.values()),
        "gflop": total / 1e9,
        "product_gflop_per_second": speed / 1e9,
        "share_of_products": share,
    }
    timing.report("decode", claims, times=times, **details)


if __name__ == "__main__":
    main()
