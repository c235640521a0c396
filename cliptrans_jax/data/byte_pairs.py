"""Byte-pair vocabularies (BPE) over bytes: CLIP's, and those that are trained here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from cliptrans_jax.data.token_files import added_message, bounded, read_record
from common_jax.untrusted import brief, plain

CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # what CLIP's pieces at the end of a word end with
# How CLIP cuts a text into words, before pieces. Its two control tokens are no words here.
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's way to cut a text, by what `read_clip_files` returns; there are no control tokens.

    Raises:
      ValueError: the library refuses the vocabulary.
    """
    model = _model(vocab, merges, unk_token=CLIP_EOS, end_of_word_suffix=WORD_END)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            normalizers.Lowercase(),
        ]
    )
    words = pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def trained(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """The way a tokenizer trained here cuts a text: any text, as bytes, white space included.

    Raises:
      ValueError: the library refuses the vocabulary, or it lacks a byte.
    """
    if lost := sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(vocab)):
        raise ValueError(f"its vocabulary lacks {len(lost)} of the 256 bytes")
    return byte_level(_model(vocab, merges))


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """A tokenizer of a byte-level model, trained or still to be."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def parse(record: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of the `model` of a `tokenizer.json`.

    Raises:
      ValueError: there is no vocabulary of ids from 0 without a gap, or no merges of its tokens.
    """
    model = record.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("it has no model of type BPE")
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError("its model has no list of merges")
    return checked_vocab(model.get("vocab")), [_pair(merge) for merge in merges]


def read_clip_files(folder: Path) -> tuple[Path, dict[str, int], list[tuple[str, str]]]:
    """The file that has the vocabulary, the vocabulary and the merges of a folder: `tokenizer.json`
    or, without it, `vocab.json` and `merges.txt`.

    Raises:
      FileNotFoundError: no merges.txt beside vocab.json.
      ValueError: a file that holds something else; it is named.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        record = read_record(path)
        try:
            vocab, merges = parse(record)
            known = {token["content"] for token in record.get("added_tokens") or ()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no tokenizer.json of CLIP: {plain(str(error))}") from error
        if added := sorted(map(str, known - set(vocab))):
            raise ValueError(added_message(path, added))
        return path, vocab, merges
    path, listed = folder / "vocab.json", folder / "merges.txt"
    if not listed.is_file():
        raise FileNotFoundError(f"{path} is there without merges.txt; fetch it as well")
    try:
        vocab = checked_vocab(read_record(path))
    except ValueError as error:
        raise ValueError(f"{path} is no vocabulary of CLIP: {plain(str(error))}") from error
    try:
        lines = [line.rstrip("\r") for line in bounded(listed).read_bytes().decode().split("\n")]
        merges = [_pair(line) for line in lines if line and not line.startswith("#version:")]
    except ValueError as error:
        raise ValueError(f"{listed} is no list of merges: {plain(str(error))}") from error
    return path, vocab, merges


def checked_vocab(vocab: Any) -> dict[str, int]:
    """A vocabulary whose ids are whole numbers from 0, each once; raises ValueError otherwise."""
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError("it has no vocabulary")
    if not all(type(place) is int for place in vocab.values()):
        raise ValueError("its vocabulary has ids that are no whole numbers")
    if sorted(vocab.values()) != [*range(len(vocab))]:
        raise ValueError(f"the ids of its {len(vocab)} tokens are not 0 to {len(vocab) - 1}")
    return vocab


def _pair(merge: Any) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(x, str) for x in parts):
        raise ValueError(f"a merge is {brief(merge)} and not two tokens")
    return parts[0], parts[1]


def _model(vocab: dict[str, int], merges: list[tuple[str, str]], **more: str) -> models.BPE:
    missing = [pair for pair in merges if not {*pair, "".join(pair)} <= vocab.keys()]
    if missing:
        raise ValueError(f"its vocabulary lacks tokens of the merge {brief(missing[0])}")
    try:
        return models.BPE(vocab=vocab, merges=merges, **more)
    except Exception as error:  # the library raises no narrower one
        raise ValueError(f"the library refuses it: {plain(str(error))}") from error
