"""CLIPTrans on WIT's seven language pairs with the published settings: mBART-large-50 and M-CLIP.

    python -m cliptrans_jax.main --config=configs/cliptrans/wit.py:stage=pipeline,pair=en_ro \\
        --workdir=runs/wit_en_ro --config.data.path=/data/wit/mmt --config.precision=bfloat16 \\
        --config.sources.mbart=/weights/mbart-large-50 \\
        --config.tokenizer.path=/weights/mbart-large-50 \\
        --config.sources.clip_text=/weights/M-CLIP-XLM-Roberta-Large-Vit-B-32 \\
        --config.clip_tokenizer.path=/weights/M-CLIP-XLM-Roberta-Large-Vit-B-32 \\
        --config.sources.clip_image=/weights/clip-vit-base-patch32

Arguments: `stage` as in multi30k.py, `pair` (es_fr, en_ro, en_fr, en_es, en_de, en_af, de_es),
  `prefix`, `scale` and `translator`.
"""

from collections.abc import Iterator

import ml_collections

from common_jax.command_line import load_beside
from common_jax.config import parse_args

PAIRS = ("es_fr", "en_ro", "en_fr", "en_es", "en_de", "en_af", "de_es")
ARGUMENTS = {
    "stage": "pipeline",
    "pair": "en_ro",
    "prefix": 10,
    "scale": 1.0,
    "translator": "mbart",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, ARGUMENTS)
    if args.pair not in PAIRS:
        raise ValueError(f"pair={args.pair!r} must be one of {list(PAIRS)}")
    source, target = args.pair.split("_")
    config = load_beside(__file__, "multi30k").get_config(
        ",".join(f"{name}={args[name]}" for name in ARGUMENTS if name != "pair")
    )
    config.data.source, config.data.path = "wit", "data/wit/mmt"
    config.data.source_language, config.data.target_language = source, target
    config.data.valid_split, config.data.test_split = "valid", "test"
    return config


def sweep() -> Iterator[dict[str, object]]:
    """All pairs, for tools/sweep.py."""
    for pair in PAIRS:
        yield {":pair": pair}
