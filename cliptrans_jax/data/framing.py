"""The frame that every tokenizer here puts around a sentence.

With a language it is [language, pieces..., </s>], as mBART has source and target; without one it is
[<s>, pieces..., </s>], as the text encoders of M-CLIP and CLIP have it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from common_jax.config import did_you_mean

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

        A long one is cut before its last `</s>`.
        """
        ...

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """The text of ids, up to the first `</s>` after the first id; of what has no text (special
        tokens, languages) nothing is shown."""
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
        return [
            np.array([first, *pieces[: self.limit - 2], self.eos], np.int32)
            for pieces in self.cut(list(texts))
        ]

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        ids = [int(i) for i in ids]
        if self.eos in ids[1:]:
            ids = ids[: ids.index(self.eos, 1)]
        return self.join([i for i in ids if i not in self.special])
