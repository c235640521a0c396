"""CTranslate2's beam search on a transformers network, for `decode.py`."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cliptrans_jax.decode import DecodeConfig
from cliptrans_jax.translators.mbart import MBartConfig


def make_peer(
    network: Any,
    mbart: MBartConfig,
    config: DecodeConfig,
    *,
    language: int,
    compute: str,
    threads: int,
) -> Callable[[np.ndarray], list[list[int]]]:
    """A function from sources [B, S] to the best translation of each, without start and end token.

    Args:
      network: `MBartForConditionalGeneration`, whose config has `normalize_before=True`.
      mbart: its sizes and ids.
      config: settings of the search.
      language: language code of the translations.
      compute: "float32" or "int8".
      threads: number of threads.
    """
    import ctranslate2
    from ctranslate2.converters.transformers import MBartLoader

    # The converter would need a tokenizer from a hub.
    loader = MBartLoader()
    spec = loader.get_model_spec(copy.deepcopy(network))  # quantisation overwrites its tensors
    loader.set_vocabulary(spec, [str(token) for token in range(mbart.vocab)])
    spec.config.bos_token = str(0)
    spec.config.eos_token = str(mbart.eos)
    spec.config.unk_token = str(3)
    spec.config.decoder_start_token = str(mbart.start)
    spec.validate()
    spec.optimize(quantization=None if compute == "float32" else compute)
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        translator = ctranslate2.Translator(
            folder, device="cpu", compute_type=compute, intra_threads=threads
        )
    settings = {
        "beam_size": config.beams,
        "length_penalty": config.length_penalty,
        "max_decoding_length": config.max_new_tokens,
    }

    def translate(batch: np.ndarray) -> list[list[int]]:
        # CTranslate2 takes tokens as strings; here they are the ids in decimal.
        sources = [[str(token) for token in row if token != mbart.pad] for row in batch.tolist()]
        first = [[str(language)]] * len(sources)
        found = translator.translate_batch(sources, first, **settings)
        return [[int(token) for token in one.hypotheses[0]] for one in found]

    return translate


def count_equal(found: Sequence[Sequence[int]], tokens: np.ndarray, lengths: np.ndarray) -> int:
    """How many translations equal ours, the first of `decode.Hypotheses`: [B, W, T] and [B, W]."""
    ours = [row[1:length].tolist() for row, length in zip(tokens[:, 0], lengths[:, 0], strict=True)]
    return sum(mine == list(one) for mine, one in zip(ours, found, strict=True))
