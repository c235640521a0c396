"""A Transformer-Tiny from scratch on Multi30k's texts alone: no pictures, no pretrained weights.

    python -m cliptrans_jax.main --config=configs/cliptrans/multi30k_tiny.py --workdir=runs/tiny \\
        --config.data.path=/data/multi30k

The recipe of the text-only literature (Wu et al. 2021, arXiv 2105.14462): width 128, 4 + 4 layers,
joint BPE of 10,000, dropout 0.3, label smoothing 0.1, Adam with an inverse square root, 8,192
tokens per update (here 256 sentences, of 33 tokens in both languages on average), 8,000 updates. In
place of the last ten checkpoints' average it evaluates a running average. It reports 41.02
tokenised lower-case BLEU on test 2016, en-de.

Arguments: `source` and `target` language, `stage` (translate, evaluate) and `scale`, as in
  multi30k.py.
"""

import ml_collections

from cliptrans_jax.config import Config, Recipe, choose_recipe
from cliptrans_jax.data.corpora import DataConfig
from cliptrans_jax.data.feed import BatchingConfig
from cliptrans_jax.data.tokens import TokenizerConfig
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
    batch=256,
    lr=0.005,
    lr_per=None,
    schedule="inverse_sqrt",
    warmup_steps=2000,
    weight_decay=0.0,
    b2=0.98,
    ema=0.995,
)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """The config; see the file's docstring for the arguments."""
    args = parse_args(arg, {"stage": "translate", "source": "en", "target": "de", "scale": 1.0})
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
            tokenizer=TokenizerConfig(kind="trained", vocab=VOCAB, max_length=64),
            batching=BatchingConfig(bucket=16, half_steps=True, window=113),
            # Steps on a CPU are fastest with few logits at a time.
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
                mapper=MapperConfig(prefix=0),
            ),
            run=RunConfig(best="val/bleu", eval_every=2, checkpoint_every=2),
        )
    )
    recipes = {"translate": Recipe(OPTIM, label_smoothing=0.1)}
    return choose_recipe(config, scale_lengths(recipes, args.scale))
