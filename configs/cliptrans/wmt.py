"""Text-only translation on WMT with the published settings. There are no pictures: the prefix is
made from the text, and the run starts from the captioning stage of another run.

    python -m cliptrans_jax.main --config=configs/cliptrans/wmt.py:target=de \\
        --workdir=runs/wmt --config.data.path=/data/wmt --config.precision=bfloat16 \\
        --config.sources.model=runs/multi30k/caption \\
        --config.tokenizer.path=/weights/mbart-large-50 \\
        --config.sources.clip_text=/weights/M-CLIP-XLM-Roberta-Large-Vit-B-32 \\
        --config.clip_tokenizer.path=/weights/M-CLIP-XLM-Roberta-Large-Vit-B-32

Arguments: `stage` (translate, evaluate), `source` and `target` language, `prefix`, `scale` and
  `translator`, as in multi30k.py.
"""

import ml_collections

from common_jax.command_line import load_beside
from common_jax.config import parse_args

STAGES = ("translate", "evaluate")
ARGUMENTS = {
    "stage": "translate",
    "source": "en",
    "target": "de",
    "prefix": 10,
    "scale": 1.0,
    "translator": "mbart",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, ARGUMENTS)
    if args.stage not in STAGES:
        raise ValueError(
            f"stage={args.stage!r} must be one of {list(STAGES)}; captioning "
            "is another run, in config.sources.model"
        )
    config = load_beside(__file__, "multi30k").get_config(
        ",".join(f"{name}={args[name]}" for name in ARGUMENTS)
    )
    config.data.source, config.data.path = "wmt", "data/wmt"
    config.data.valid_split, config.data.test_split = "valid", "test"
    return config
