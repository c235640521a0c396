"""The frame that every tokenizer here puts around a sentence.

With a language it is [language, pieces..., </s>], as the translator has source and target; without
one it is [<s>, pieces..., </s>], as the text encoders of M-CLIP and CLIP have it.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Protocol, runtime_checkable

import numpy as np

from common_jax.config import did_you_mean
from common_jax.untrusted import brief

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


@runtime_checkable
class Tokenizer(Protocol):
    """Sentences to ids and back.

    Attributes:
      vocab: number of ids, the rows of an embedding.
      pad: what fills up a batch.
      eos: the last token of every sentence.
      languages: the codes that `language_id` knows.
    """

    vocab: int
    pad: int
    eos: int

    @property
    def languages(self) -> tuple[str, ...]: ...

    def language_id(self, language: str) -> int:
        """The token of a language; raises ValueError with the known ones."""
        ...

    def encode(self, texts: Sequence[str], language: str | None) -> list[np.ndarray]:
        """int32 ids [LID, pieces..., </s>] of each text; for no language [<s>, pieces..., </s>].

        All of a text is text: "</s>" in it is four characters and no end. A long one is cut before
        its last `</s>`, and the log says how many were.

        Raises:
          ValueError: an unknown language, or texts that are no sequence of Unicode texts.
        """
        ...

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of ids, up to the first `</s>` after the first id; what has no text (special
        tokens, languages) is left out."""
        ...


@dataclasses.dataclass(frozen=True)
class FramedTokenizer:
    """A way to cut text into pieces, and the frame around them.

    Attributes:
      cut: texts -> ids of their pieces.
      join: ids of pieces -> text.
      vocab, pad, eos: as in `Tokenizer`.
      bos: the first token where there is no language.
      language_ids: language -> its token.
      special: ids that have no text.
      limit: tokens of a sentence, frame included.
    """

    cut: Callable[[list[str]], list[list[int]]]
    join: Callable[[list[int]], str]
    vocab: int
    language_ids: Mapping[str, int]
    special: frozenset[int]
    limit: int
    bos: int = BOS
    pad: int = PAD
    eos: int = EOS

    @property
    def languages(self) -> tuple[str, ...]:
        return tuple(self.language_ids)

    def language_id(self, language: str) -> int:
        if language not in self.language_ids:
            known = ", ".join(self.language_ids) or "none; encode for language None"
            raise ValueError(
                f"the tokenizer has no language {language!r}"
                f"{did_you_mean(language, list(self.language_ids))}; it has {known}"
            )
        return self.language_ids[language]

    def encode(self, texts: Sequence[str], language: str | None) -> list[np.ndarray]:
        first = self.bos if language is None else self.language_id(language)
        texts = checked_texts(texts)
        sentences = self.cut(texts)
        room, frame = self.limit - 2, self.special - {UNK}
        for text, pieces in zip(texts, sentences, strict=True):
            # A table gives NaN for an id that it lacks, and CLIP's unknown token is its end.
            if pieces and not (min(pieces) >= 0 and max(pieces) < self.vocab):
                raise ValueError(f"an id beyond the tokenizer's {self.vocab} for {brief(text)}")
            if not frame.isdisjoint(pieces):
                raise ValueError(f"the tokenizer's vocabulary lacks characters of {brief(text)}")
        if cut := sum(len(pieces) > room for pieces in sentences):
            logging.warning(
                "%d of %d sentences have more than %d tokens, and are cut there",
                *(cut, len(sentences), room),
            )
        return [np.array([first, *pieces[:room], self.eos], np.int32) for pieces in sentences]

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        ids = [int(i) for i in ids]
        if self.eos in ids[1:]:
            ids = ids[: ids.index(self.eos, 1)]
        return self.join([i for i in ids if i not in self.special])


def require_fits(tokenizer: Tokenizer, *, vocab: int, special: Mapping[str, int], key: str) -> None:
    """Raises ValueError unless a network can read a tokenizer's ids.

    Args:
      vocab: rows of the network's table; an id beyond them gives NaN.
      special: the network's ids of "pad" and "eos", as far as it has them.
      key: of the network's config, for messages.
    """
    if tokenizer.vocab > vocab:
        raise ValueError(
            f"{key}.vocab={vocab} is less than the {tokenizer.vocab} tokens of the tokenizer; "
            "raise it, or take the tokenizer that the weights were trained with"
        )
    for name, place in special.items():
        if place != getattr(tokenizer, name):
            raise ValueError(
                f"{key}.{name}={place} must be the tokenizer's, {getattr(tokenizer, name)}"
            )


def checked_texts(texts: object, *, name: str = "texts") -> list[str]:
    """The texts as a list.

    Args:
      name: of the argument, for messages.

    Raises:
      ValueError: one text in place of several, anything that is no text, or a text with half of a
        surrogate pair, which is no character.
    """
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
                f"{name}[{place}] has half of a surrogate pair, which is no character: "
                f"{brief(text)}; decode what it was read from as a whole, as UTF-8 or UTF-16"
            ) from None
    return texts
