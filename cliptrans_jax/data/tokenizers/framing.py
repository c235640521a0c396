"""The frame that every tokenizer here puts around a sentence.

With a language it is [language, pieces..., </s>], for the translator's source and target. Without
one it is [<s>, pieces..., </s>], for the text encoders of M-CLIP and CLIP, or [pieces..., </s>],
for SigLIP 2's.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent import futures
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64

from common_jax.config import did_you_mean
from common_jax.inputs.ragged import Lines, Ragged
from common_jax.untrusted import brief

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
# Published tables have at most as many rows without a token: they are padded to multiples of 128.
PADDING = 127
PART = 4096  # sentences that a thread encodes per call
Part = tuple[Int32[np.ndarray, " _"], Int32[np.ndarray, " _"]]  # flat ids, and their counts


@runtime_checkable
class Tokenizer(Protocol):
    """Converts sentences to ids and back.

    Attributes:
      vocab: number of ids, which is the number of rows of an embedding.
      pad: id of padding.
      eos: id of the last token of every sentence.
      languages: the codes that `language_id` knows.
    """

    vocab: int
    pad: int
    eos: int

    @property
    def languages(self) -> tuple[str, ...]: ...

    def language_id(self, language: str) -> int:
        """Returns the token of a language; raises ValueError, listing the known ones, for
        others."""
        ...

    def encode(self, texts: Sequence[str], language: str | None) -> Ragged:
        """Returns int32 ids of each text: [language, pieces..., </s>], or without a language [<s>,
        pieces..., </s>], or [pieces..., </s>] if the tokenizer has no <s>.

        Control tokens in a text are ordinary text: "</s>" is four characters, not the end.
        Sentences that are too long are truncated but keep the final `</s>`; the log says how many.

        Raises:
          ValueError: an unknown language, or texts that are not a sequence of valid Unicode
            strings.
        """
        ...

    def encode_parts(self, texts: Sequence[str], language: str | None) -> Iterator[Part]:
        """Yields the result of `encode` in consecutive parts, computed on all cores."""
        ...

    def fingerprint(self, language: str | None) -> str:
        """Returns a digest of everything that determines the output of `encode`, except the
        texts."""
        ...

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """Returns the text of the ids, up to the first `</s>` after the first id.

        Special tokens and language codes have no text and are left out.
        """
        ...


@dataclasses.dataclass(frozen=True)
class FramedTokenizer:
    """A `Tokenizer` that adds the frame, given functions that split and join text.

    Attributes:
      cut: maps texts to ids of their pieces; must be thread-safe.
      join: maps ids of pieces to text.
      definition: returns everything that determines the result of `cut`.
      vocab, pad, eos: as in `Tokenizer`.
      language_ids: token id of each language.
      special: ids without text.
      limit: largest number of tokens per sentence, frame included.
      bos: first token of a sentence without a language; None for none.
    """

    # Functions, not a subclass per kind: tokenizers differ only in how they split and join.
    cut: Callable[[list[str]], list[list[int]]]
    join: Callable[[list[int]], str]
    definition: Callable[[], bytes]
    vocab: int
    language_ids: Mapping[str, int]
    special: frozenset[int]
    limit: int
    bos: int | None = BOS
    pad: int = PAD
    eos: int = EOS

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.language_ids)

    def language_id(self, language: str) -> int:
        """See `Tokenizer.language_id`."""
        if language not in self.language_ids:
            known = ", ".join(self.language_ids) or "none; encode for language None"
            raise ValueError(
                f"the tokenizer has no language {language!r}"
                f"{did_you_mean(language, list(self.language_ids))}; it has {known}"
            )
        return self.language_ids[language]

    def encode(self, texts: Sequence[str], language: str | None) -> Ragged:
        """See `Tokenizer.encode`."""
        flats, lengths = zip(*self.encode_parts(texts, language), strict=True)
        return Ragged.of(np.concatenate(flats), np.concatenate(lengths))

    def encode_parts(self, texts: Sequence[str], language: str | None) -> Iterator[Part]:
        """See `Tokenizer.encode_parts`."""
        start = self._start(language)
        texts = texts if isinstance(texts, Lines) else require_texts(texts)
        # At least one part, even if it is empty.
        pieces = [texts[first : first + PART] for first in range(0, len(texts) or 1, PART)]
        encode, too_long = functools.partial(self._encode_part, start), 0
        with contextlib.ExitStack() as stack:
            encoded = map(encode, pieces)
            if len(pieces) > 1:
                # Threads are enough: the tokenizer libraries release the GIL.
                pool = futures.ThreadPoolExecutor(os.cpu_count())
                # A caller that stops early, for example because the disk is full, does not wait.
                stack.callback(pool.shutdown, cancel_futures=True)
                encoded = pool.map(encode, pieces)
            for flat, lengths, count in encoded:
                too_long += count
                yield flat, lengths
        if too_long:
            logging.warning(
                "%d of %d sentences%s have more than %d tokens and are truncated; with room in the "
                "network, raise the tokenizer's max_length",
                *(too_long, len(texts), f" in {language}" if language else ""),
                self.limit - len(start) - 1,
            )

    def _encode_part(
        self, start: Sequence[int], texts: Sequence[str]
    ) -> tuple[Int32[np.ndarray, " _"], Int32[np.ndarray, " B"], int]:
        """Returns the ids of all texts, the ids per text, and how many texts were too long."""
        texts = list(texts)
        sentences = self.cut(texts)
        counts = np.fromiter(map(len, sentences), np.int64, len(texts))
        pieces = np.fromiter(itertools.chain.from_iterable(sentences), np.int64, counts.sum())
        self._check(texts, counts, pieces)
        # Pieces are truncated before framing, so a sentence of any length keeps its frame.
        room = self.limit - len(start) - 1
        too_long = int(np.sum(counts > room))
        if too_long:
            places = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
            pieces, counts = pieces[places < room], np.minimum(counts, room)
        lengths = counts + len(start) + 1
        ends = np.cumsum(lengths)
        flat = np.empty(lengths.sum(), np.int32)
        inner = np.ones(len(flat), bool)
        for place, token in [*((ends - lengths, token) for token in start), (ends - 1, self.eos)]:
            flat[place], inner[place] = token, False
        flat[inner] = pieces
        return flat, lengths.astype(np.int32), too_long

    def _check(
        self, texts: Sequence[str], counts: Int64[np.ndarray, " B"], pieces: Int64[np.ndarray, " _"]
    ) -> None:
        """Raises ValueError, quoting the text, for a piece that must not occur in text."""
        # Checked here, since beyond its table a tower's embedding silently returns NaN, and a
        # translator's its last row.
        beyond = (pieces < 0) | (pieces >= self.vocab)
        # A piece may be the unknown token, but no other special token. CLIP's unknown token is also
        # its end token, and would end the sentence.
        wrong = beyond | np.isin(pieces, [*(self.special - {UNK})])
        if wrong.any():
            place = np.argmax(wrong)
            text = brief(texts[np.searchsorted(np.cumsum(counts), place, side="right")])
            if beyond[place]:
                raise ValueError(f"an id beyond the tokenizer's {self.vocab} for {text}")
            raise ValueError(f"the tokenizer's vocabulary lacks characters of {text}")

    def _start(self, language: str | None) -> list[int]:
        """Returns the ids that precede the pieces."""
        first = self.bos if language is None else self.language_id(language)
        return [] if first is None else [first]

    def fingerprint(self, language: str | None) -> str:
        """See `Tokenizer.fingerprint`."""
        frame = (self._start(language), self.eos, self.limit, self.vocab, sorted(self.special))
        return hashlib.sha256(repr(frame).encode() + b"\n" + self.definition()).hexdigest()

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """See `Tokenizer.decode`."""
        ids = [int(i) for i in ids]
        # The first id may be `</s>`, as decoding starts with it.
        if self.eos in ids[1:]:
            ids = ids[: ids.index(self.eos, 1)]
        return self.join([i for i in ids if i not in self.special])


def require_fits(
    tokenizer: Tokenizer,
    *,
    vocab: int,
    special: Mapping[str, int],
    key: str,
    spare: int | None = None,
) -> None:
    """Raises ValueError unless a network can read the tokenizer's ids.

    Args:
      tokenizer: the tokenizer.
      vocab: rows of the network's embedding table. An id beyond them gives NaN in a tower, and the
        last row in a translator.
      special: the network's ids of "pad" and "eos", as far as it has them.
      key: path of the network's config, for messages.
      spare: most rows without a token; None for any number, which is harmless in training from
        scratch.
    """
    if tokenizer.vocab > vocab:
        raise ValueError(
            f"{key}.vocab={vocab} is less than the {tokenizer.vocab} tokens of the tokenizer; "
            "raise it, or use the tokenizer that the weights were trained with"
        )
    if spare is not None and vocab - tokenizer.vocab > spare:
        raise ValueError(
            f"{key}.vocab={vocab} is far above the {tokenizer.vocab} tokens of the tokenizer, so "
            "that its ids, those of languages included, mean something else in the published "
            "weights; give the folder of the tokenizer that they were trained with"
        )
    for name, place in special.items():
        if place != getattr(tokenizer, name):
            raise ValueError(
                f"{key}.{name}={place} must be the tokenizer's, {getattr(tokenizer, name)}"
            )


def require_texts(texts: object, *, name: str = "texts") -> list[str]:
    """Returns the texts as a list.

    Args:
      texts: the texts.
      name: name of the argument, for messages.

    Raises:
      ValueError: a single string instead of several, anything that is not a string, or a string
        with an unpaired surrogate, which is not a character.
    """
    # A str is a sequence of str: without this check each of its characters would be a sentence.
    if isinstance(texts, str | bytes | Mapping | Set) or not isinstance(texts, Iterable):
        hint = f"; give [{brief(texts)}] for one" if isinstance(texts, str) else ""
        raise ValueError(
            f"{name} must be a list of sentences and is {brief(texts)}, of type "
            f"{type(texts).__name__}{hint}"
        )
    texts = list(texts)
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(
                f"{name}[{place}] must be a str and is {brief(text)}, of type {type(text).__name__}"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{name}[{place}] has half of a surrogate pair, which is not a character: "
                f"{brief(text)}; decode its file as a whole, as UTF-8 or UTF-16"
            ) from None
    return texts
