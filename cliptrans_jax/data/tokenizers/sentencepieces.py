"""SentencePiece models, unigram or BPE, from either of the files in which they are published.

Whichever file the pieces come from, the library itself tokenises, as in the original: other
implementations of its normaliser differ for decomposed Hangul and kana, accents after wide letters,
and white space. The library treats a token such as "</s>" in a sentence as text.
"""

import base64
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from cliptrans_jax.data.tokenizers import byte_pairs
from cliptrans_jax.data.tokenizers.framing import SPECIAL, UNK
from cliptrans_jax.data.tokenizers.token_files import (
    Sections,
    parsing,
    read_bounded,
    read_record,
    require_sections,
    steps_of,
)
from common_jax.untrusted import as_text, brief, plain

# The first tokens of a model; no text is tokenised to them.
CONTROLS = ("<unk>", "<s>", "</s>")
# What a tokenizer.json may have: what SentencePiece does by itself, as written by `transformers`
# from 4.0 on. The names of fields changed, and some versions split at white space first.
SECTIONS: Sections = {
    "normalizer": {
        None: {},  # reported by `processor`, which knows who writes such files
        "Precompiled": {},
        "Replace": {"pattern": ({"Regex": " {2,}"},), "content": (" ", "▁")},
        "Strip": {},
    },
    "pre_tokenizer": {
        "WhitespaceSplit": {},
        "Metaspace": {
            "replacement": ("▁",),
            "str_rep": ("▁",),
            "add_prefix_space": (True,),
            "prepend_scheme": ("always", "first"),
        },
    },
    "model": {None: {}, "Unigram": {}, "BPE": byte_pairs.AFFIXES},
}
# Wide letters and digits, and their NFKC form after the library's leading space.
PROBE = ("ＡＢＣ１２３", "▁ABC123")


@dataclasses.dataclass(frozen=True)
class PieceModel:
    """A vocabulary of pieces with their scores.

    Attributes:
      path: the file, for messages.
      pieces: (piece, score), without special tokens and languages.
      extra: tokens after the pieces, such as languages; () if the file does not list them.
      charsmap: the normaliser in SentencePiece's compiled form.
      bpe: whether sentences are split by merging pairs, highest score first; otherwise into the
        pieces with the largest sum of scores (unigram).
    """

    path: Path
    pieces: tuple[tuple[str, float], ...]
    extra: tuple[str, ...]
    charsmap: bytes
    bpe: bool = False

    def __post_init__(self):
        names = {*CONTROLS, *(piece for piece, _ in self.pieces)}
        if not self.pieces or len(names) != len(self.pieces) + len(CONTROLS):
            raise ValueError(f"{self.path} has no pieces, or duplicates; fetch it again")
        if not all(piece and math.isfinite(score) for piece, score in self.pieces):
            raise ValueError(
                f"{self.path} has an empty piece, or a score that is not finite; fetch it again"
            )

    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """Returns SentencePiece's processor, in which piece i is number i + 3.

        Raises:
          ValueError: the library rejects the model, or it does not normalise text to NFKC.
        """
        # Checked before the library sees it, which would follow a wrong offset out of bounds.
        _check_charsmap(self.path, self.charsmap)
        # Rebuilt rather than passed on, so that a file cannot switch on anything else: other fields
        # of the model keep the library's defaults.
        model = sentencepiece_model_pb2.ModelProto()
        kinds = model.SentencePiece.Type
        for name, kind in zip(CONTROLS, (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL), strict=True):
            model.pieces.add(piece=name, type=kind)
        try:
            for piece, score in self.pieces:
                model.pieces.add(piece=piece, score=score)
            model.trainer_spec.model_type = _model_type(model, self.bpe)
            model.normalizer_spec.name = "nmt_nfkc"
            model.normalizer_spec.precompiled_charsmap = self.charsmap
            processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
            normalised = processor.normalize(PROBE[0])
        # For pieces that are not UTF-8 protobuf raises ValueError; the library raises RuntimeError.
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.path} is rejected by sentencepiece: {plain(str(error))}"
            ) from error
        # The library accepts an empty normaliser, which would silently change the ids.
        if normalised != PROBE[1]:
            raise ValueError(
                f"{self.path} does not normalise text (NFKC): {PROBE[0]!r} becomes {normalised!r}, "
                f"not {PROBE[1]!r}. transformers 5.0 to 5.2 write such files; fetch the published "
                "one, or put sentencepiece.bpe.model beside it"
            )
        return processor


def read_model(path: Path, *, bpe: bool) -> PieceModel:
    """Reads the model in a `sentencepiece.bpe.model`, which must be BPE if `bpe`, else unigram.

    Raises:
      ValueError: the file is not such a model, or has pieces of other types.
    """
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(read_bounded(path))
    except DecodeError as error:
        raise ValueError(
            f"{path} is not a SentencePiece model ({plain(str(error))}); fetch it again"
        ) from error
    kinds = model.SentencePiece.Type
    first = tuple(piece.piece for piece in model.pieces[: len(CONTROLS)])
    normal = all(piece.type == kinds.NORMAL for piece in model.pieces[len(CONTROLS) :])
    same = model.trainer_spec.model_type == _model_type(model, bpe)
    spec = model.normalizer_spec
    usual = spec.add_dummy_prefix and spec.remove_extra_whitespaces and spec.escape_whitespaces
    usual = usual and not model.trainer_spec.treat_whitespace_as_suffix
    if first != CONTROLS or not (normal and same and usual):
        raise ValueError(
            f"{path} is not a {_name(bpe)} model that begins with {', '.join(CONTROLS)} and then "
            f"has plain pieces, with spaces before words (it begins with {brief(first)}); fetch it "
            "again"
        )
    pieces = tuple((piece.piece, piece.score) for piece in model.pieces[len(CONTROLS) :])
    return PieceModel(path, pieces, (), spec.precompiled_charsmap, bpe)


def read_tokenizer_json(path: Path, extra: Collection[str], *, bpe: bool) -> PieceModel:
    """Reads the model in a `tokenizer.json`: special tokens, pieces, then extra tokens.

    Args:
      path: the file.
      extra: tokens that may follow the pieces; the pieces end before the first of these.
      bpe: whether the model is BPE; otherwise it is unigram.

    Raises:
      ValueError: the file is not such a model, has another order, or another normaliser.
    """
    record = read_record(path)
    with parsing(path, f"a tokenizer.json of a {_name(bpe)} model"):
        model = record["model"]
        if model.get("type", _name(bpe)) != _name(bpe) or model.get("byte_fallback"):
            raise ValueError(f"its model is of type {model.get('type')!r}")
        require_sections(record, SECTIONS)
        scored = _ranked(record) if bpe else model["vocab"]
        vocab = tuple((as_text(token), float(score)) for token, score in scored)
        names = [token for token, _ in vocab]
        names += _added(record.get("added_tokens") or (), names)
        charsmap = _charsmap(record["normalizer"])
    if tuple(names[: len(SPECIAL)]) != SPECIAL or model.get("unk_id", UNK) != UNK:
        raise ValueError(
            f"{path} begins with the tokens {brief(names[: len(SPECIAL)])} and not with "
            f"{', '.join(SPECIAL)}: it belongs to another tokenizer"
        )
    # Some files list languages in the vocabulary, others among the added tokens. Stopping at the
    # first language gives the same pieces for both.
    ends = [place for place, name in enumerate(names) if name in extra]
    end = min([*ends, len(vocab)])
    return PieceModel(path, vocab[len(SPECIAL) : end], tuple(names[end:]), charsmap, bpe)


def added_tokens(folder: Path) -> list[str]:
    """Returns the tokens that other files of a folder add to a `sentencepiece.bpe.model`.

    Raises:
      ValueError: a file is not in the format of `transformers`.
    """
    added: list[str] = []
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        record = read_record(folder / name)
        try:
            if name == "added_tokens.json":
                added += map(as_text, record)
            else:
                tokens = record.get("added_tokens_decoder") or {}
                added += [as_text(token["content"]) for token in tokens.values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{folder / name} has no added tokens in the form of transformers "
                f"({type(error).__name__}: {plain(str(error))}); fetch it again"
            ) from error
    return added


def _name(bpe: bool) -> str:
    return "BPE" if bpe else "Unigram"


def _model_type(model: sentencepiece_model_pb2.ModelProto, bpe: bool) -> int:
    types = model.trainer_spec.ModelType
    return types.BPE if bpe else types.UNIGRAM


def _ranked(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Returns the tokens of a BPE model in the order of their ids, with scores as SentencePiece's
    trainer writes them: each is 1 less than the one before.

    Raises:
      ValueError: the merges have another order, which would split sentences differently.
    """
    vocab, merges = byte_pairs.parse(record)
    places = [vocab.get(left + right, -1) for left, right in merges]
    if places != sorted(places) or -1 in places:
        raise ValueError("its merges are not in the order of its vocabulary")
    return [
        (token, -float(place)) for place, token in enumerate(sorted(vocab, key=vocab.__getitem__))
    ]


def _added(tokens: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Returns the added tokens after the vocabulary, in the order of their ids."""
    places = {int(token["id"]): as_text(token["content"]) for token in tokens}
    count = len(names)
    # Some added tokens repeat entries of the vocabulary and must agree with them; the others extend
    # it without a gap.
    within = all(names[place] == token for place, token in places.items() if 0 <= place < count)
    after = sorted(place for place in places if not 0 <= place < count)
    if not within or after != [*range(count, count + len(after))]:
        raise ValueError(f"added_tokens have ids that do not fit a vocabulary of {count}")
    return [places[place] for place in after]


def _charsmap(normalizer: Mapping[str, Any] | None) -> bytes:
    """Returns SentencePiece's compiled normaliser; b"" if there is none."""
    charsmap = b""
    for step in steps_of(normalizer):
        if step.get("type") == "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"], validate=True)
    return charsmap


def _check_charsmap(path: Path, charsmap: bytes) -> None:
    """Raises ValueError if any offset in a compiled normaliser points outside of it.

    The library follows the offsets without checks. A normaliser consists of the length of a
    double-array trie in bytes, the trie, and the zero-terminated texts that its leaves point to.
    """
    if not charsmap:
        return  # the probe of `processor` detects this
    size = int.from_bytes(charsmap[:4], "little")
    texts = charsmap[4 + size :]
    sound = size % 1024 == 0 and size > 0 and texts.endswith(b"\0")
    if sound:
        units = np.frombuffer(charsmap, "<u4", size // 4, 4)
        # The layout of Darts-clone: a unit's children are at its index XOR its offset XOR a byte,
        # its leaf at byte 0. Bit 31 marks leaves, bit 8 units that have a leaf, and bit 9 offsets
        # that are shifted by 8.
        offsets = (units >> 10).astype(np.int64) << np.where(units & 0x200, 8, 0)
        inner = np.flatnonzero(units < 1 << 31)
        children = inner ^ offsets[inner]
        # Indices of a unit's children differ only in the low byte, so checking the largest is
        # enough.
        sound = bool(np.all(children | 0xFF < len(units)))
    if sound:
        leaves = units[children[(units[inner] & 0x100) > 0]] & 0x7FFFFFFF
        sound = bool(np.all(leaves < len(texts)))
    if not sound:
        raise ValueError(f"{path} has a normaliser that points outside of itself; fetch it again")
