"""Beam search with the cache of `cliptrans_jax.decode` against `transformers` on the same CPU.

Both translate the same sentences with the same random weights, settings and batches, sorted by
length, in turns; torch pads a batch to its longest sentence, ours to a multiple of 16 tokens. What
they write is compared token by token, with the score of every translation that differs. The ratio
of sentences a second is printed last but one, below how fast a step could be if its matrix products
ran at the speed of the machine's largest, and the last line is JSON.

    pip install torch "transformers>=5.23"
    python benchmarks/decode.py
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import numpy as jnp

from cliptrans_jax import names
from cliptrans_jax.convert import ALIASES, mbart_table
from cliptrans_jax.decode import DecodeConfig, Search
from cliptrans_jax.models.cliptrans import ModelConfig, Params, Translator
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.models.mbart import MBartConfig

LANGUAGE = 9  # stands for every language code
FIRST_WORD = 10
# Gains of weight matrices over 1 / sqrt(fan in), and what the end is favoured by: chosen so that
# distributions are as peaked as a trained model's and sentences end after 5 to 60 tokens.
GAIN, EMBEDDING, END = 1.0, 0.15, 4.0

Batch = np.ndarray  # [B, S] tokens, pads at the end


def parse_sizes() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=60, help="longest translation")
    parser.add_argument("--vocab", type=int, default=10_010)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6, help="of the encoder and of the decoder")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timings of each over all sentences")
    return parser.parse_args()


def make_model(sizes: argparse.Namespace) -> tuple[Translator, Params]:
    """mBART with random weights and gains, so that what follows a token is another one."""
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
        if path.endswith("embedding"):
            flat[path] = EMBEDDING * noise
        elif path.endswith("kernel"):
            fan_in = leaf.size // sizes.width if "/out/" in path else leaf.shape[0]
            flat[path] = GAIN / math.sqrt(fan_in) * noise
        elif path.endswith("scale"):
            flat[path] = noise
        else:
            flat[path] = 0 * noise
    flat["mbart/logits_bias"][config.eos] = END
    return translator, traverse_util.unflatten_dict(flat, sep="/")


def make_batches(sizes: argparse.Namespace, pad: int, end: int) -> list[Batch]:
    """Sentences of 8 to 40 tokens, most of about 16, as Multi30k's are; sorted, in batches."""
    rng = np.random.default_rng(1)
    lengths = np.sort(np.clip(rng.gamma(6.0, 2.8, sizes.sentences).round(), 8, 40).astype(int))
    batches = []
    for part in np.split(lengths, range(sizes.batch, sizes.sentences, sizes.batch)):
        batch = np.full((len(part), part.max()), pad, np.int32)
        for row, length in zip(batch, part, strict=True):
            row[:length] = [LANGUAGE, *rng.integers(FIRST_WORD, sizes.vocab, length - 2), end]
        batches.append(batch)
    return batches
