"""The files of a run's tokenizer for `transformers`."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors

from cliptrans_jax.data.tokenizers import byte_pairs
from cliptrans_jax.data.tokenizers.framing import BOS, EOS, PAD, SPECIAL, UNK
from cliptrans_jax.data.tokenizers.published import MASK, PUBLISHED
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from common_jax.workdir import read_json

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# Files that a published tokenizer may have in addition to those in `PUBLISHED`.
OTHERS = ("special_tokens_map.json", "merges.txt")


def language_token(language: str) -> str:
    """The token of a language in an exported tokenizer that was trained here. The bare code could
    also be a word."""
    return f"__{language}__"


def write_tokenizer(
    folder: Path,
    config: TokenizerConfig,
    trained: epath.Path,
    languages: Sequence[str],
    *,
    limit: int,
    pair: tuple[str, str] | None,
) -> None:
    """Writes the files of a tokenizer that frames sentences as the network expects them.

    Args:
      folder: an existing folder.
      config: config of the tokenizer.
      trained: the run's file with a trained tokenizer.
      languages: languages of a trained tokenizer.
      limit: largest number of tokens per sentence, frame included.
      pair: source and target language of a translator; None for a text tower, whose sentences
        begin with <s>.

    Raises:
      FileNotFoundError: if `config.path` no longer has the published tokenizer's files, or lacks
        one that `transformers` needs.
    """
    settings: dict[str, Any] = {"model_max_length": limit, "clean_up_tokenization_spaces": False}
    if config.is_trained:
        first = SPECIAL[BOS] if pair is None else language_token(pair[0])
        _build(trained, languages, first, lower=config.lower).save(str(folder / FILE))
        tokens = {"bos": BOS, "pad": PAD, "eos": EOS, "unk": UNK}
        settings |= {f"{name}_token": SPECIAL[place] for name, place in tokens.items()}
        settings |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "mask_token": MASK,
            "model_input_names": ["input_ids", "attention_mask"],
        }
    else:
        _copy(folder, config)
        published = PUBLISHED[config.kind]
        settings |= {"tokenizer_class": published.hub_class, **published.hub_settings}
        if pair is not None:
            codes = published.codes
            # M2M-100's class expects "de" for the language whose token is "__de__".
            source, target = (codes[language].strip("_") for language in pair)
            settings |= {"src_lang": source, "tgt_lang": target}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _build(trained: epath.Path, languages: Sequence[str], first: str, *, lower: bool) -> Tokenizer:
    """A trained tokenizer with the ids and the frame of `data.tokens`."""
    vocab, merges = byte_pairs.parse(json.loads(read_json(trained, {"bpe": str})["bpe"]))
    tokenizer = byte_pairs.byte_tokenizer(vocab, merges)
    # The first word is tokenised like the others: with a space before it.
    lowering = [normalizers.Lowercase()] if lower else []
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(" "), *lowering])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    # In this order, languages and mask get the ids after the pieces.
    names = [*SPECIAL, *map(language_token, languages), MASK]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    last = SPECIAL[EOS]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A $B {last}",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in (first, last)],
    )
    return tokenizer


def _copy(folder: Path, config: TokenizerConfig) -> None:
    source = Path(config.path).expanduser()
    published = PUBLISHED[config.kind]
    names = filter(None, [*published.files, published.order, *OTHERS])
    there = [source / name for name in names if (source / name).is_file()]
    if not any(file.name in published.files for file in there):
        raise FileNotFoundError(
            f"{config.path} no longer has the tokenizer of the run; give its folder with "
            "--config.tokenizer.path or --config.clip_tokenizer.path"
        )
    if published.hub_file and not (source / published.hub_file).is_file():
        raise FileNotFoundError(
            f"{config.path} lacks {published.hub_file}, without which transformers assigns other "
            f"ids to tokens; fetch it from {published.repository!r}"
        )
    for file in there:
        shutil.copyfile(file, folder / file.name)
