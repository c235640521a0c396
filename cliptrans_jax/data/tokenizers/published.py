"""The published tokenizers of mBART-50, NLLB-200, M2M-100, XLM-R, CLIP, SigLIP 2 and LaBSE, read
from local folders."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from cliptrans_jax.data.tokenizers import byte_pairs, sentencepieces
from cliptrans_jax.data.tokenizers.framing import SPECIAL, UNK, FramedTokenizer
from cliptrans_jax.data.tokenizers.sentencepieces import PieceModel
from cliptrans_jax.data.tokenizers.token_files import (
    Sections,
    added_message,
    parsing,
    read_bounded,
    read_record,
    require_fields,
    require_sections,
)
from cliptrans_jax.translators.nllb_languages import (
    M2M100_CODES,
    M2M100_UNUSED,
    NLLB_CODES,
    NLLB_TOKENS,
)
from common_jax.ranges import did_you_mean, shown
from common_jax.untrusted import as_text, plain

# mBART-50's language tokens, in the order of their ids.
MBART50_TOKENS = (
    *("ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN"),
    *("it_IT", "ja_XX", "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO"),
    *("ru_RU", "si_LK", "tr_TR", "vi_VN", "zh_CN", "af_ZA", "az_AZ", "bn_IN", "fa_IR", "he_IL"),
    *("hr_HR", "id_ID", "ka_GE", "km_KH", "mk_MK", "ml_IN", "mn_MN", "mr_IN", "pl_PL", "ps_AF"),
    *("pt_XX", "sv_SE", "sw_KE", "ta_IN", "te_IN", "th_TH", "tl_XX", "uk_UA", "ur_PK", "xh_ZA"),
    *("gl_ES", "sl_SI"),
)
MBART50_CODES: Mapping[str, str] = {token[:2]: token for token in MBART50_TOKENS}
MASK = "<mask>"
MOST = 100  # languages to list in a message
# The pieces of a model that may be missing in its vocabulary, as a share; a published one has
# nearly all.
FEW = 0.01
BERT_FRAME, BERT_UNK = ("[CLS]", "[SEP]", "[PAD]"), "[UNK]"
LABSE_SECTIONS: Sections = {
    "normalizer": {
        "BertNormalizer": {
            "clean_text": (True,),
            "handle_chinese_chars": (True,),
            "strip_accents": (None, False),
            "lowercase": (False,),
        }
    },
    "pre_tokenizer": {"BertPreTokenizer": {}},
    "model": {
        "WordPiece": {
            "unk_token": (BERT_UNK,),
            "continuing_subword_prefix": ("##",),
            "max_input_chars_per_word": (100,),
        }
    },
}
# Settings in tokenizer_config.json, by which `transformers` replaces the normaliser's.
LABSE_SETTINGS = {
    "do_lower_case": (False,),
    "strip_accents": (None, False),
    "tokenize_chinese_chars": (True,),
}


@dataclasses.dataclass(frozen=True)
class PublishedTokenizer:
    """A published tokenizer.

    Attributes:
      repository: its repository on the Hugging Face hub.
      files: files any one of which contains the whole tokenizer, except for `order`.
      limit: largest number of tokens per sentence, which is the network's number of positions.
      hub_class: class of `transformers` that reads it.
      hub_file: the file without which that class assigns other ids, if there is one.
      hub_settings: settings of that class that differ from its defaults.
      codes: token of each language.
      last: tokens that follow the pieces, in the order of their ids.
      bpe: whether SentencePiece merges pairs, see `sentencepieces.PieceModel`.
      order: another required file, with the ids of special tokens and pieces; "" if ids follow the
        order of the model.
      read: (folder, limit) -> tokenizer; None for SentencePiece with fairseq's ids, to which the
        four fields above belong.
    """

    repository: str
    files: tuple[str, ...]
    limit: int
    hub_class: str
    hub_file: str = ""
    hub_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    codes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    last: tuple[str, ...] = ()
    bpe: bool = False
    order: str = ""
    read: Callable[[Path, int], FramedTokenizer] | None = None


PIECES, JSON, WORDS = "sentencepiece.bpe.model", "tokenizer.json", "vocab.txt"
SETTINGS = "tokenizer_config.json"


def language_problem(kind: str, language: str) -> str | None:
    """Says why a tokenizer with a fixed set of languages cannot have this one; None if it can."""
    codes = PUBLISHED[kind].codes if kind in PUBLISHED else {}
    if not codes or language in codes:
        return None
    names = sorted(codes)
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return (
        f"{shown(language)} is not a language of tokenizer.kind={kind!r}"
        f"{did_you_mean(language, codes)}, which has {', '.join(names[:MOST])}{more}"
    )


def load_published(kind: str, path: str, *, limit: int, key: str) -> FramedTokenizer:
    """Loads a published tokenizer from a folder.

    Args:
      kind: a key of PUBLISHED.
      path: the folder, as given in the config.
      limit: largest number of tokens per sentence, frame included.
      key: path of the config's section, for messages.

    Raises:
      FileNotFoundError: the folder lacks the files of the kind.
      ValueError: its files are not a tokenizer of the kind.
    """
    published, folder = PUBLISHED[kind], Path(path).expanduser()
    needed = [published.files, *([(published.order,)] if published.order else [])]
    missing = [names for names in needed if not any((folder / name).is_file() for name in names)]
    if missing:
        raise FileNotFoundError(
            f"{key}.path={path!r} lacks {' and '.join(map(' or '.join, missing))}; "
            f"fetch them from {published.repository!r}, for example with "
            f"huggingface_hub.snapshot_download({published.repository!r}, local_dir=...)"
        )
    try:
        if published.read is not None:
            return published.read(folder, limit)
        model = _find_model(kind, folder)
        return _sentencepiece(model, _read_order(model, published, folder), published, limit)
    except ValueError as error:
        raise ValueError(
            f"{key}.path={path!r} does not have the tokenizer of {key}.kind={kind!r} "
            f"({published.repository}): {error}"
        ) from error


def _find_model(kind: str, folder: Path) -> PieceModel:
    """Returns the model of a folder.

    SentencePiece's own file takes precedence over tokenizer.json; if both exist, they must agree.
    """
    published, model = PUBLISHED[kind], None
    if (folder / PIECES).is_file():
        model = sentencepieces.read_model(folder / PIECES, bpe=published.bpe)
    if JSON in published.files and (folder / JSON).is_file():
        # Includes tokens of other kinds, so that their files are recognised.
        last = {token for other in PUBLISHED.values() for token in other.last}
        json_model = sentencepieces.read_tokenizer_json(folder / JSON, last, bpe=published.bpe)
        _require_last(kind, json_model.path, json_model.extra)
        if model is None:
            return json_model
        if [piece for piece, _ in model.pieces] != [piece for piece, _ in json_model.pieces]:
            raise ValueError(
                f"{model.path} and {json_model.path.name} beside it have different pieces; remove "
                "the one that is not the tokenizer's"
            )
    known = {*SPECIAL, *published.last}
    if added := [token for token in sentencepieces.added_tokens(folder) if token not in known]:
        raise ValueError(added_message(folder, added))
    assert model is not None, "neither file exists"
    return model


def _require_last(kind: str, path: Path, last: tuple[str, ...]) -> None:
    """Raises ValueError unless a file's last tokens are those of the kind."""
    ours = PUBLISHED[kind].last
    if last == ours:
        return
    if last[: len(ours)] == ours:
        raise ValueError(added_message(path, last[len(ours) :]))
    others = [
        name
        for name, other in PUBLISHED.items()
        if other.last and other.last == last[: len(other.last)]
    ]
    hint = f"it is the tokenizer of kind {others[0]!r}" if others else "fetch its files again"
    raise ValueError(
        f"{path} has other tokens after its pieces than it should have: {_first(last)}, not "
        f"{_first(ours)}; {hint}"
    )


def _first(tokens: tuple[str, ...]) -> str:
    """Lists the first few tokens, for a message."""
    more = f" and so on, {len(tokens)} in all" if len(tokens) > 3 else ""
    return f"{plain(', '.join(tokens[:3])) or 'none'}{more}"


def _read_order(model: PieceModel, published: PublishedTokenizer, folder: Path) -> list[str]:
    """Returns the special tokens and pieces in the order of their ids."""
    if not published.order:
        return [*SPECIAL, *(piece for piece, _ in model.pieces)]
    path = folder / published.order
    try:
        vocab = byte_pairs.require_vocab(read_record(path))
        order = sorted(vocab, key=vocab.__getitem__)
        if tuple(order[: len(SPECIAL)]) != SPECIAL:
            raise ValueError(f"it does not begin with {', '.join(SPECIAL)}")
    except ValueError as error:
        raise ValueError(f"{path} is not a vocabulary: {plain(str(error))}") from error
    missing = tuple(piece for piece, _ in model.pieces if piece not in vocab)
    if len(missing) > FEW * len(model.pieces):
        raise ValueError(
            f"{path} lacks many of the {len(model.pieces)} pieces of {model.path} and would make "
            f"them {SPECIAL[UNK]}: {_first(missing)}; fetch both files again"
        )
    return order


def _sentencepiece(
    model: PieceModel, order: list[str], published: PublishedTokenizer, limit: int
) -> FramedTokenizer:
    """Builds the tokenizer with fairseq's ids: special tokens, pieces, last tokens."""
    processor = model.processor()
    names, first = [*order, *published.last], len(order)
    ids_of = {name: place for place, name in enumerate(order)}
    # Indexed by SentencePiece's id. Its first three are <unk>, <s> and </s>, of which it only
    # outputs <unk>.
    ids_of_pieces = [UNK] * 3 + [ids_of.get(piece, UNK) for piece, _ in model.pieces]
    places = {name: first + place for place, name in enumerate(published.last)}

    def cut(texts: list[str]) -> list[list[int]]:
        # One thread per call, since `FramedTokenizer` makes several calls at a time.
        ids = processor.encode(texts, num_threads=1)
        return [[ids_of_pieces[i] for i in pieces] for pieces in ids]

    def definition() -> bytes:
        version = f"sentencepiece {sentencepiece.__version__} {ids_of_pieces}\n"
        return version.encode() + processor.serialized_model_proto()

    def join(ids: list[int]) -> str:
        pieces = (names[i] for i in ids if 0 <= i < len(names))
        return "".join(pieces).replace("▁", " ").removeprefix(" ")

    return FramedTokenizer(
        cut=cut,
        join=join,
        definition=definition,
        vocab=len(names),
        language_ids={language: places[code] for language, code in published.codes.items()},
        special=frozenset({*range(len(SPECIAL)), *range(first, len(names))}),
        limit=limit,
    )


def _cut(tokenizer: tokenizers.Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def _clip(folder: Path, limit: int) -> FramedTokenizer:
    path, vocab, merges = byte_pairs.read_clip_files(folder)
    bos, eos = len(vocab) - 2, len(vocab) - 1
    if (vocab.get(byte_pairs.CLIP_BOS), vocab.get(byte_pairs.CLIP_EOS)) != (bos, eos):
        raise ValueError(
            f"{path} does not end with {byte_pairs.CLIP_BOS} and {byte_pairs.CLIP_EOS}, which the "
            "tower needs; fetch its files again"
        )
    try:
        tokenizer = byte_pairs.clip_tokenizer(vocab, merges)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    def join(ids: list[int]) -> str:
        text = tokenizer.decode(ids, skip_special_tokens=False)
        return text.replace(byte_pairs.WORD_END, " ").strip()

    return FramedTokenizer(
        cut=_cut(tokenizer),
        join=join,
        definition=functools.partial(byte_pairs.define, tokenizer),
        vocab=len(vocab),
        language_ids={},
        special=frozenset({bos, eos}),
        limit=limit,
        bos=bos,
        eos=eos,
    )


def _siglip2(folder: Path, limit: int) -> FramedTokenizer:
    path = folder / JSON
    vocab, merges, words = byte_pairs.read_gemma_file(path)
    try:
        tokenizer = byte_pairs.gemma_tokenizer(vocab, merges, words)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return FramedTokenizer(
        cut=_cut(tokenizer),
        join=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        definition=functools.partial(byte_pairs.define, tokenizer),
        vocab=len(vocab),
        language_ids={},
        special=frozenset(range(len(byte_pairs.GEMMA_CONTROLS))),
        limit=limit,
        bos=None,
        pad=0,
        eos=1,
    )


def _labse(folder: Path, limit: int) -> FramedTokenizer:
    """BERT's cased WordPiece, framed as [CLS], ..., [SEP]."""
    path, vocab = _read_words(folder)
    if missing := [name for name in (*BERT_FRAME, BERT_UNK) if name not in vocab]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; fetch it again")
    model = models.WordPiece(vocab, unk_token=BERT_UNK, max_input_chars_per_word=100)
    tokenizer = tokenizers.Tokenizer(model)
    # Accents stay as well: by default, they are stripped only together with lower-casing.
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    bos, eos, pad = (vocab[name] for name in BERT_FRAME)
    return FramedTokenizer(
        cut=_cut(tokenizer),
        join=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        definition=functools.partial(byte_pairs.define, tokenizer),
        vocab=len(vocab),
        language_ids={},
        special=frozenset({bos, eos, pad}),
        limit=limit,
        bos=bos,
        pad=pad,
        eos=eos,
    )


def _read_words(folder: Path) -> tuple[Path, dict[str, int]]:
    """A WordPiece vocabulary, and the file that it comes from."""
    path = folder / SETTINGS
    if path.is_file():
        with parsing(path, "LaBSE's tokenizer_config.json"):
            require_fields(read_record(path), LABSE_SETTINGS, "tokenizer")
    path = folder / JSON
    if not path.is_file():
        path = folder / WORDS
        lines = read_bounded(path).decode().rstrip("\r\n").split("\n")
        words = [line.rstrip("\r") for line in lines]
        return path, byte_pairs.require_vocab({word: place for place, word in enumerate(words)})
    record = read_record(path)
    with parsing(path, "LaBSE's tokenizer.json"):
        require_sections(record, LABSE_SECTIONS)
        vocab = byte_pairs.require_vocab(record["model"]["vocab"])
        known = {as_text(token["content"]) for token in record.get("added_tokens") or ()}
    if added := sorted(known - vocab.keys()):
        raise ValueError(added_message(path, added))
    return path, vocab


PUBLISHED: Mapping[str, PublishedTokenizer] = {
    "mbart50": PublishedTokenizer(
        "facebook/mbart-large-50",
        (JSON, PIECES),
        limit=1024,
        hub_class="MBart50Tokenizer",
        codes=MBART50_CODES,
        last=(*MBART50_TOKENS, MASK),
    ),
    "nllb": PublishedTokenizer(
        "facebook/nllb-200-distilled-600M",
        (JSON, PIECES),
        limit=1024,
        hub_class="NllbTokenizer",
        codes=NLLB_CODES,
        last=(*NLLB_TOKENS, MASK),
        bpe=True,
        hub_file=JSON,
    ),
    "m2m100": PublishedTokenizer(
        "facebook/m2m100_418M",
        (PIECES,),
        limit=1024,
        hub_class="M2M100Tokenizer",
        codes=M2M100_CODES,
        last=(*M2M100_CODES.values(), *M2M100_UNUSED),
        bpe=True,
        order="vocab.json",
    ),
    "xlmr": PublishedTokenizer(
        "M-CLIP/XLM-Roberta-Large-Vit-B-32",
        (JSON, PIECES),
        limit=512,
        hub_class="XLMRobertaTokenizer",
        last=(MASK,),
    ),
    "clip": PublishedTokenizer(
        "openai/clip-vit-base-patch32",
        (JSON, "vocab.json"),
        limit=77,
        hub_class="CLIPTokenizer",
        last=(byte_pairs.CLIP_BOS, byte_pairs.CLIP_EOS),
        read=_clip,
    ),
    "siglip2": PublishedTokenizer(
        "google/siglip2-base-patch16-224",
        (JSON,),
        limit=64,
        hub_class="Siglip2Tokenizer",
        # The default is the side for generative models.
        hub_settings={"padding_side": "right"},
        read=_siglip2,
    ),
    "labse": PublishedTokenizer(
        "M-CLIP/LABSE-Vit-L-14",
        (JSON, WORDS),
        limit=512,
        hub_class="BertTokenizer",
        hub_settings={"do_lower_case": False},
        read=_labse,
    ),
}
