"""Byte-pair encodings (BPE): CLIP's and those trained here work on bytes, Gemma's on characters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from cliptrans_jax.data.tokenizers.framing import UNK
from cliptrans_jax.data.tokenizers.token_files import (
    Sections,
    added_message,
    parsing,
    read_bounded,
    read_record,
    require_sections,
)
from common_jax.untrusted import as_text, brief, plain

CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
# Gemma's first tokens; no text is tokenised to them.
GEMMA_CONTROLS = ("<pad>", "<eos>", "<bos>", "<unk>")
SPACE = "▁"  # in Gemma's pieces
AFFIXES = {"continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
# What Gemma's tokenizer.json may have. Only newer files lower-case; some split at spaces, of which
# the normaliser leaves none.
GEMMA_SECTIONS: Sections = {
    "normalizer": {
        "Lowercase": {},
        "Replace": {"pattern": ({"String": " "},), "content": (SPACE,)},
    },
    "pre_tokenizer": {None: {}, "Split": {"pattern": ({"String": " "},), "invert": (False,)}},
    "model": {None: AFFIXES, "BPE": AFFIXES},
}
WORD_END = "</w>"  # suffix of CLIP's pieces at the end of a word
# CLIP's pre-tokenisation into words. Its two control tokens are left out: in a text they are text.
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def define(tokenizer: tokenizers.Tokenizer) -> bytes:
    """Returns everything that determines a tokenizer's output."""
    return f"tokenizers {tokenizers.__version__}\n{tokenizer.to_str()}".encode()


def clip_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Builds CLIP's tokenizer, without control tokens, from the result of `read_clip_files`.

    Raises:
      ValueError: the library rejects the vocabulary.
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
    # Inverted: keeps what matches, and removes the white space in between.
    words = pre_tokenizers.Split(tokenizers.Regex(CLIP_WORDS), behavior="removed", invert=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def gemma_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], words: list[str]
) -> tokenizers.Tokenizer:
    """Builds Gemma's tokenizer with SigLIP 2's lower-casing, without control tokens, from the
    result of `read_gemma_file`.

    Raises:
      ValueError: the library rejects the vocabulary.
    """
    # Control tokens in a text are ordinary text, so no merge may produce one.
    merges = [pair for pair in merges if "".join(pair) not in GEMMA_CONTROLS]
    model = _model(vocab, merges, unk_token=GEMMA_CONTROLS[UNK], fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    # Matched before the text is lower-cased: "<table>", runs of line breaks and so on.
    tokenizer.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    return tokenizer


def byte_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Builds a tokenizer that was trained here, which splits any text, white space included, as
    bytes.

    Raises:
      ValueError: the library rejects the vocabulary, or it lacks a byte.
    """
    if missing := sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(vocab)):
        raise ValueError(f"its vocabulary lacks {len(missing)} of the 256 bytes")
    return byte_level(_model(vocab, merges))


def byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a byte-level model, which may still be untrained."""
    tokenizer = tokenizers.Tokenizer(model)
    # Callers add the space before a first word themselves.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def parse(record: Mapping[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the vocabulary and merges in the `model` of a `tokenizer.json`.

    Raises:
      ValueError: there is no vocabulary with contiguous ids from 0, or no list of merges.
    """
    model = record.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError("it has no model of type BPE")
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError("its model has no list of merges")
    return require_vocab(model.get("vocab")), [_pair(merge) for merge in merges]


def read_clip_files(folder: Path) -> tuple[Path, dict[str, int], list[tuple[str, str]]]:
    """Reads `tokenizer.json` or, without it, `vocab.json` and `merges.txt` of a folder.

    Returns:
      The file of the vocabulary, the vocabulary, and the merges.

    Raises:
      FileNotFoundError: vocab.json has no merges.txt beside it.
      ValueError: a file with other content; the message names it.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        record = read_record(path)
        try:
            vocab, merges = parse(record)
            known = {token["content"] for token in record.get("added_tokens") or ()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not CLIP's tokenizer.json: {plain(str(error))}") from error
        if added := sorted(map(str, known - set(vocab))):
            raise ValueError(added_message(path, added))
        return path, vocab, merges
    path, merges_path = folder / "vocab.json", folder / "merges.txt"
    if not merges_path.is_file():
        raise FileNotFoundError(f"{path} was found without merges.txt; fetch that file as well")
    try:
        vocab = require_vocab(read_record(path))
    except ValueError as error:
        raise ValueError(f"{path} is not a vocabulary of CLIP: {plain(str(error))}") from error
    try:
        lines = read_bounded(merges_path).decode().split("\n")
        lines = [line.rstrip("\r") for line in lines]
        merges = [_pair(line) for line in lines if line and not line.startswith("#version:")]
    except ValueError as error:
        raise ValueError(f"{merges_path} is not a list of merges: {plain(str(error))}") from error
    return path, vocab, merges


def read_gemma_file(path: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[str]]:
    """Reads a SigLIP 2's `tokenizer.json`.

    Returns:
      The vocabulary, the merges, and the tokens that are matched as whole words, without merges.

    Raises:
      ValueError: a file with other content; the message names it.
    """
    record = read_record(path)
    with parsing(path, "Gemma's tokenizer.json"):
        vocab, merges = parse(record)
        added = record.get("added_tokens") or ()
        known = {as_text(token["content"]): token for token in added}
        require_sections(record, GEMMA_SECTIONS)
    if tuple(sorted(vocab, key=vocab.__getitem__)[:4]) != GEMMA_CONTROLS:
        raise ValueError(
            f"{path} does not begin with {', '.join(GEMMA_CONTROLS)}: it is of another tokenizer"
        )
    count = len({f"<0x{value:02X}>" for value in range(256)} & vocab.keys())
    if count < 256:
        raise ValueError(
            f"{path} has {count} tokens of bytes, and Gemma's has 256: it is of another tokenizer"
        )
    if surplus := sorted(known.keys() - vocab.keys()):
        raise ValueError(added_message(path, surplus))
    words = [name for name, token in known.items() if not token.get("special")]
    return vocab, merges, [name for name in words if name not in GEMMA_CONTROLS]


def require_vocab(vocab: Any) -> dict[str, int]:
    """Returns the vocabulary; raises ValueError unless its ids are 0, 1, 2, ..., each once."""
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError("it has no vocabulary")
    if not all(type(place) is int for place in vocab.values()):
        raise ValueError("its vocabulary has ids that are not integers")
    if sorted(vocab.values()) != [*range(len(vocab))]:
        raise ValueError(f"the ids of its {len(vocab)} tokens are not 0 to {len(vocab) - 1}")
    return vocab


def _pair(merge: Any) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(x, str) for x in parts):
        raise ValueError(f"a merge is {brief(merge)} and not two tokens")
    return parts[0], parts[1]


def _model(vocab: dict[str, int], merges: list[tuple[str, str]], **more: str | bool) -> models.BPE:
    missing = [pair for pair in merges if not {*pair, "".join(pair)} <= vocab.keys()]
    if missing:
        raise ValueError(f"its vocabulary lacks tokens of the merge {brief(missing[0])}")
    try:
        return models.BPE(vocab=vocab, merges=merges, **more)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the library rejects it: {plain(str(error))}") from error
