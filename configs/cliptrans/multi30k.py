"""CLIPTrans on Multi30k with the published settings (arXiv 2308.15226, section 4): mBART-large-50,
M-CLIP's XLM-R-large and CLIP ViT-B/32.

    python -m cliptrans_jax.main --config=configs/cliptrans/multi30k.py:stage=pipeline,target=fr \\
        --workdir=runs/multi30k --config.data.path=/data/multi30k --config.precision=bfloat16 \\
        --config.sources.mbart=/weights/mbart-large-50 \\
        --config.tokenizer.path=/weights/mbart-large-50 \\
        --config.sources.clip_text=/weights/M-CLIP-XLM-Roberta-Large-Vit-B-32 \\
        --config.clip_tokenizer.path=/weights/M-CLIP-XLM-Roberta-Large-Vit-B-32 \\
        --config.sources.clip_image=/weights/clip-vit-base-patch32

Arguments: `stage` (pipeline, caption, text_recon, translate, triplet, evaluate), `source` and
  `target` language, `prefix` (10; 0 is the plain translator, which has no captioning stage),
  `scale`, which multiplies the length of every stage (`scale=0.1` for a quick try), `chips`, and
  `translator`: mbart, as published, or instead nllb (NLLB-200-distilled-600M), nllb-1.3B,
  nllb-3.3B, m2m100 (418M) or m2m100-1.2B, whose folder goes into config.sources.mbart and
  config.tokenizer.path.

With `chips`, the number of chips in a pod, matrices are sharded over up to 16 chips (fsdp), and
batches are rounded up to a multiple of `chips`, with fewer than four micro-batches if they cannot
be split further: above 128 chips the batch is larger than published. Use the same number for
tools/compile_for_pod.py.
"""

import dataclasses
import math
from collections.abc import Iterator

import ml_collections

from cliptrans_jax.config import Config, Recipe, choose_recipe
from cliptrans_jax.data.corpora import DataConfig
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.decode import DecodeConfig
from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.stages import TRANSLATION_STAGES
from cliptrans_jax.translators.nllb import PUBLISHED
from common_jax.config import parse_args, unfreeze
from common_jax.loop import RunConfig
from common_jax.mesh import MeshConfig
from common_jax.optim import OptimConfig, scale_lengths

OPTIM = OptimConfig(
    epochs=15,
    batch=128,
    accumulate=4,
    lr=1e-5,
    lr_per=None,
    # The original's polynomial decay ends at the rate that it starts from, which is the same.
    schedule="constant",
    warmup_epochs=0,
    weight_decay=0.0,
    b2=0.98,
    eps=1e-6,
)
DECODE = DecodeConfig()
ARGUMENTS = {
    "stage": "pipeline",
    "source": "en",
    "target": "de",
    "prefix": 10,
    "chips": 1,
    "scale": 1.0,
    "translator": "mbart",
}
# Name on the Hugging Face hub, and kind of tokenizer.
TRANSLATORS = {
    "mbart": ("mbart-large-50", "mbart50"),
    "nllb": ("nllb-200-distilled-600M", "nllb"),
    "nllb-1.3B": ("nllb-200-1.3B", "nllb"),
    "nllb-3.3B": ("nllb-200-3.3B", "nllb"),
    "m2m100": ("m2m100_418M", "m2m100"),
    "m2m100-1.2B": ("m2m100_1.2B", "m2m100"),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, ARGUMENTS)
    if args.translator not in TRANSLATORS:
        raise ValueError(f"translator={args.translator!r} must be one of {list(TRANSLATORS)}")
    name, tokenizer = TRANSLATORS[args.translator]
    translator = {"translator": "nllb", "nllb": PUBLISHED[name]} if name in PUBLISHED else {}
    chips = args.chips
    if chips < 1:
        raise ValueError(f"chips={chips} must be at least 1")
    batch, decoded = (-(-size // chips) * chips for size in (OPTIM.batch, DECODE.batch))
    accumulate = math.gcd(OPTIM.accumulate, batch // chips)
    recipe = Recipe(dataclasses.replace(OPTIM, batch=batch, accumulate=accumulate))
    config = unfreeze(
        Config(
            stage=args.stage,
            seed=29,
            data=DataConfig(
                source="multi30k",
                path="data/multi30k",
                source_language=args.source,
                target_language=args.target,
                test_split="test_2016_flickr",
            ),
            tokenizer=TokenizerConfig(kind=tokenizer, path=f"weights/{name}"),
            clip_tokenizer=TokenizerConfig(kind="xlmr", path="weights/xlm-roberta-large"),
            model=ModelConfig(mapper=MapperConfig(prefix=args.prefix), **translator),
            decode=dataclasses.replace(DECODE, batch=decoded),
            mesh=MeshConfig(fsdp=math.gcd(chips, 16)),
            run=RunConfig(best="val/bleu"),
        )
    )
    stages = ("caption", "translate") if args.prefix else ("translate",)
    single = {args.stage: recipe} if args.stage in TRANSLATION_STAGES else {}
    recipes = dict.fromkeys(stages, recipe) | single
    return choose_recipe(config, scale_lengths(recipes, args.scale))


def sweep() -> Iterator[dict[str, object]]:
    """The published pairs, with and without the prefix, for tools/sweep.py."""
    for target in ("de", "fr"):
        for prefix in (10, 0):
            yield {":target": target, ":prefix": prefix}
