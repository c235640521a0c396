"""The config of a run of cliptrans_jax, as frozen dataclasses that hold all defaults."""

import dataclasses
from typing import Annotated

import ml_collections
from jax import numpy as jnp

from cliptrans_jax.contrastive.table import CONTRASTIVE
from cliptrans_jax.data.corpora import DataConfig
from cliptrans_jax.data.examples import NoiseConfig
from cliptrans_jax.data.feed import BatchingConfig
from cliptrans_jax.data.pictures import AugmentConfig
from cliptrans_jax.data.tokenizers.published import language_problem
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.decode import DecodeConfig
from cliptrans_jax.evaluators.table import evaluators_of
from cliptrans_jax.models.chunks import CHUNK
from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.models.prefix import PrefixConfig
from cliptrans_jax.stages import (
    CAPTION,
    EVALUATE,
    FREEZES,
    MODEL,
    PIPELINE,
    STAGES,
    TOWERS,
    TRANSLATION_STAGES,
    VALIDATION,
    Side,
    Trains,
    trains,
)
from cliptrans_jax.towers.clip import ACTIVATIONS, ClipVisionConfig
from cliptrans_jax.towers.mclip import MClipConfig
from cliptrans_jax.towers.table import IMAGE_TOWERS, TEXT_TOWERS, section_type
from common_jax.command_line import System
from common_jax.config import FieldError, Section
from common_jax.mesh import MeshConfig
from common_jax.nn.dense import MatmulPrecision
from common_jax.optim import OptimConfig
from common_jax.ranges import (
    BelowOne,
    Count,
    Name,
    Positive,
    Regex,
    Seed,
    Size,
    key_of,
    one_of,
    shown,
)
from common_jax.run_config import RunConfig, apply_recipe

RUNS = (*STAGES, PIPELINE, EVALUATE)
SYSTEM = System("cliptrans_jax", field="stage", others={"phase": "m2mkd_jax"})
# Sections and fields that every run reads.
_ANY = (
    *("stage", "seed", "precision", "matmul_precision", "data", "languages", "tokenizer", "mesh"),
)
_RUN = {
    Trains.TRANSLATOR: ("run",),
    # The newest towers are used, so no metric chooses among their checkpoints.
    Trains.TOWERS: tuple(
        f"run.{x.name}" for x in dataclasses.fields(RunConfig) if x.name != "best"
    ),
}
READS: dict[str, tuple[str, ...]] = {
    **{name: (*_ANY, *_RUN[stage.trains], *stage.reads) for name, stage in STAGES.items()},
    PIPELINE: (*_ANY, "run", *TOWERS, *MODEL, *VALIDATION, *CAPTION, "unfreeze_clip", "recipes"),
    EVALUATE: (*_ANY, "run.compilation_cache", *MODEL, "unfreeze_clip"),
}
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SIDES = {"": None} | {side.value: side for side in Side}
TextSizes, ImageSizes = section_type(TEXT_TOWERS), section_type(IMAGE_TOWERS)


@dataclasses.dataclass(frozen=True)
class ClipConfig(Section):
    """The small M-CLIP that stage "clip" trains on pictures and their names in every language.

    Attributes:
      text: the text tower; its `kind` names a text tower in `TOWERS`.
      image: the image tower; its `kind` names an image tower in `TOWERS`.
      scale: initial exp(log_scale), which multiplies the similarities in the loss "softmax".
      loss: a key of CONTRASTIVE.
      lock_text: trains only the image tower, against the published text tower in
        config.sources.clip_text, which stays frozen; `text` is then not used.
    """

    text: TextSizes = MClipConfig()
    image: ImageSizes = ClipVisionConfig()
    scale: Positive = 1 / 0.07
    loss: Annotated[str, key_of(lambda: CONTRASTIVE)] = "softmax"
    lock_text: bool = False

    def __post_init__(self):
        super().__post_init__()
        default = type(self).scale
        if self.scale != default and not CONTRASTIVE[self.loss].takes_scale:
            raise FieldError(
                f"scale={self.scale} has no effect with loss={self.loss!r}, which has its own "
                "initial value; leave it out"
            )


@dataclasses.dataclass(frozen=True)
class SourcesConfig(Section):
    """Sources of weights. Where a workdir is expected, one of its step folders also works.

    Attributes:
      model: workdir of an earlier stage, or a released CLIPTrans checkpoint, that a stage starts
        from or "evaluate" scores.
      mbart: folder of a published translator of kind config.model.translator, instead of `model`.
      clip: workdir of a "clip" run.
      clip_text, clip_image: folders of published towers, instead of `clip`; the text tower also
        beside a `clip` that was trained with config.clip.lock_text.
      siglip: folder of a published SigLIP 2 with both towers and their tokenizer, instead of
        `clip_text`, `clip_image` and config.clip_tokenizer.
      clip_activation: activation of a published CLIP's MLPs, "quick_gelu" or "gelu", if its files
        do not say.
      clip_text_base: base model of an M-CLIP, if the `modelBase` of its config.json is a missing
        folder: "xlm-roberta-large", or a folder with a config.json.
      weights: which weights to read from a published file with several: a key such as "model_ema",
        or a name prefix such as "teacher.". It is for `mbart` or a released `model` if one of them
        is given, else for the towers.
      fetch: allows `mbart`, `clip_text`, `clip_image` and `siglip` to be Hugging Face hub ids,
        which are downloaded.
      fresh: regex of parameter paths to initialise from scratch even if `model` has them.
      leave: regex of parameter paths in `model` to ignore if this run's model lacks them.
    """

    model: str = ""
    mbart: str = ""
    clip: str = ""
    clip_text: str = ""
    clip_image: str = ""
    siglip: str = ""
    clip_activation: Annotated[str, one_of("", *ACTIVATIONS)] = ""
    clip_text_base: str = ""
    weights: str = ""
    fetch: bool = False
    fresh: Regex = ""
    leave: Regex = ""

    def __post_init__(self):
        super().__post_init__()
        if self.siglip and (self.clip or self.clip_text or self.clip_image):
            raise FieldError(
                f"siglip={shown(self.siglip)} holds both towers: leave out clip, clip_text and "
                "clip_image"
            )
        if self.model and self.mbart:
            raise FieldError(
                f"model={shown(self.model)} and mbart={shown(self.mbart)}: a run starts from only "
                "one of them"
            )
        if self.clip and self.clip_image:
            raise FieldError(
                f"clip={shown(self.clip)} and clip_image={shown(self.clip_image)} both have an "
                "image tower: leave out one of them"
            )

    @property
    def translator(self) -> str:
        """Folder of the published translator, or ""."""
        return self.mbart

    def after(self, stage: str) -> "SourcesConfig":
        """These sources, with the workdir of the previous stage as the model, if there is one. What
        is left out of the user's sources is not left out of that stage's result."""
        if not stage:
            return self
        return dataclasses.replace(self, model=stage, mbart="", fresh="", leave="")


@dataclasses.dataclass(frozen=True)
class Recipe(Section):
    """How one stage is trained.

    Attributes:
      optim: optimizer and length of training.
      label_smoothing: share of the target probability that is spread over all tokens.
    """

    optim: OptimConfig = OptimConfig()
    label_smoothing: BelowOne = 0.0


@dataclasses.dataclass(frozen=True)
class Config(Section):
    """A run of one stage, or of all of them.

    Attributes:
      stage: one of RUNS.
      seed: seed of all randomness.
      precision: dtype of the networks, "float32" or "bfloat16"; parameters, softmax, norm
        statistics, losses and scores of hypotheses are always float32.
      matmul_precision: precision of float32 matrix products on GPUs and TPUs: "default", the
        fastest (TF32 on a GPU, bfloat16 on a TPU), "high", or "highest", full float32. No effect on
        a CPU or on products in bfloat16.
      parity: reproduces the original's inconsistencies: in decoding the prefix precedes `</s>`,
        slots 1 to 10 attend to each other whatever they hold, gradients of micro-batches are summed
        instead of averaged, and evaluation uses pictures whenever test tokens are dropped.
      data: texts and pictures.
      languages: languages of the tokenizer and of stage "clip"; () for the pair in `data`.
      tokenizer: tokenizer of the translation model.
      clip_tokenizer: tokenizer of the text tower in sources.clip_text; stage "clip" uses the
        translation model's.
      clip: the towers that stage "clip" trains.
      augment: augmentation of the training pictures in stage "clip".
      model: the translation model.
      freeze: what captioning stages freeze, a key of `stages.FREEZES`.
      unfreeze_clip: also trains the text tower in stage "translate".
      caption_language: language of captions; "" for English if the pair has it.
      all_languages: whether captioning stages write both languages.
      noise: which source tokens are dropped.
      test_side: the side whose features are used in evaluation, "image" or "text"; "" for the
        stage's default.
      batching: how sentences are padded and grouped into batches.
      decode: the search for translations.
      valid_decode: whether evaluations translate the validation set, which is needed to choose a
        checkpoint by BLEU; otherwise they only compute loss and token accuracy.
      valid_beams: number of beams for translating the validation set; 0 for `decode.beams`.
      label_chunk: memory budget of the label loss in training and validation, as the number of
        labels per device whose float32 logits would fill it. Smaller is slower on a TPU or GPU.
      sources: weights to start from.
      optim, label_smoothing: how the stage is trained, see Recipe; the pipeline has recipes
        instead.
      recipes: how each stage of the pipeline is trained.
      mesh: how devices are arranged.
      run: logging, evaluation, checkpoints.
      features: folder where features of frozen towers and token ids of large corpora are cached; ""
        for one in the workdir.
      keep_text_features: whether a frozen text tower encodes each split once, into `features`;
        otherwise it runs in every step. Features of pictures are always stored.
    """

    stage: Annotated[str, one_of(*RUNS)] = "translate"
    seed: Seed = 0
    precision: Annotated[str, key_of(lambda: PRECISIONS)] = "float32"
    matmul_precision: MatmulPrecision = "default"
    parity: bool = False
    data: DataConfig = DataConfig()
    languages: tuple[Name, ...] = ()
    tokenizer: TokenizerConfig = TokenizerConfig()
    clip_tokenizer: TokenizerConfig = TokenizerConfig()
    clip: ClipConfig = ClipConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    freeze: Annotated[str, one_of(*FREEZES)] = "encoder"
    unfreeze_clip: bool = False
    caption_language: str = ""
    all_languages: bool = False
    noise: NoiseConfig = NoiseConfig()
    test_side: Annotated[str, one_of(*SIDES)] = ""
    batching: BatchingConfig = BatchingConfig()
    decode: DecodeConfig = DecodeConfig()
    valid_decode: bool = True
    valid_beams: Count = 0
    label_chunk: Size = CHUNK
    sources: SourcesConfig = SourcesConfig()
    optim: OptimConfig = OptimConfig()
    label_smoothing: BelowOne = 0.0
    recipes: dict[str, Recipe] = dataclasses.field(default_factory=dict)
    mesh: MeshConfig = MeshConfig()
    run: RunConfig = RunConfig(best="val/bleu")
    features: str = ""
    keep_text_features: bool = True

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.recipes) - set(STAGES):
            raise FieldError(f"recipes has no stages {shown(unknown)}, only {[*STAGES]}")
        if self.unfreeze_clip and self.stage in STAGES and not STAGES[self.stage].unfreezes_tower:
            able = [name for name, stage in STAGES.items() if stage.unfreezes_tower]
            raise FieldError(
                f"unfreeze_clip=True is for stage {' or '.join(map(repr, able))}, not "
                f"{self.stage!r}: the text tower cannot learn from pictures"
            )
        self._check_parity()
        self._check_lock()
        self._check_languages()
        self._check_lengths()
        self._check_best()
        self._check_beams()

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype in which networks compute."""
        return PRECISIONS[self.precision]

    @property
    def known_languages(self) -> tuple[str, ...]:
        """`languages`, or the pair."""
        return self.languages or self.data.pair

    @property
    def sentence_limit(self) -> int:
        """Longest sentence of the translation model in tokens: the tokenizer's limit, or the
        positions left after the prefix if they are fewer."""
        room = self.model.sizes.positions - self.model.mapper.prefix
        return min(self.tokenizer.limit, room)

    @property
    def bleu(self) -> str:
        """The BLEU to watch: "bleu_lower" for a model that only writes lower case."""
        return "bleu_lower" if self.tokenizer.lower else "bleu"

    @property
    def has_prefix(self) -> bool:
        """True if the model takes features."""
        return self.model.mapper.prefix > 0

    @property
    def encodes_texts(self) -> bool:
        """True if text features are computed in the step, not read from a file."""
        return self.has_prefix and (self.unfreeze_clip or not self.keep_text_features)

    def apply_parity(self) -> "Config":
        """The config with the fields that `parity` implies set; call it only once."""
        if not self.parity:
            return self
        # Adam is invariant to the gradient's scale except for eps: summing over k micro-batches
        # equals averaging with eps / k.
        optim = dataclasses.replace(self.optim, eps=self.optim.eps / self.optim.accumulate)
        prefix = PrefixConfig(layout="original", mask="original")
        stage = STAGES.get(self.stage)
        drops = self.noise.test and not self.unfreeze_clip
        pictures = drops and stage is not None and stage.parity_pictures
        side = "image" if pictures else self.test_side
        model = dataclasses.replace(self.model, prefix=prefix)
        return dataclasses.replace(self, optim=optim, model=model, test_side=side)

    def _check_parity(self) -> None:
        sections = {f"recipes.{name}.optim": one.optim for name, one in self.recipes.items()}
        for key, optim in {"optim": self.optim, **sections}.items():
            if self.parity and optim.accumulate > 1 and optim.optimizer != "adamw":
                raise FieldError(
                    f"parity=True sums the gradients of {key}.accumulate={optim.accumulate} "
                    f"micro-batches through AdamW's eps, and {key}.optimizer={optim.optimizer!r} "
                    "has none; set accumulate=1, or optimizer='adamw'"
                )

    def _check_lock(self) -> None:
        trains_towers = self.stage == PIPELINE or trains(self.stage) is Trains.TOWERS
        if self.clip.lock_text and trains_towers and not self.sources.clip_text:
            raise FieldError(
                "clip.lock_text=True needs a trained text tower: give sources.clip_text, "
                "its folder, and clip_tokenizer"
            )

    def _check_lengths(self) -> None:
        count, room = self.model.mapper.prefix, self.model.sizes.positions
        longest = max(self.tokenizer.max_length or 3, self.decode.max_length)
        if trains(self.stage) is not Trains.TOWERS and longest + count > room:
            raise FieldError(
                f"model.{self.model.translator}.positions={room} is less than the longest sentence "
                f"of {longest} "
                f"tokens and model.mapper.prefix={count}; set tokenizer.max_length or "
                "decode.max_new_tokens"
            )

    def _check_languages(self) -> None:
        pair = self.data.pair
        for key, language in zip(("source_language", "target_language"), pair, strict=True):
            if problem := language_problem(self.tokenizer.kind, language):
                raise FieldError(f"data.{key}={problem}")
        if set(pair) - set(self.known_languages):
            raise FieldError(f"languages={shown(self.languages)} must include the pair {pair}")
        if self.caption_language not in ("", *pair):
            raise FieldError(
                f"caption_language={shown(self.caption_language)} must be one of the pair {pair} "
                "or empty"
            )
        stage = TRANSLATION_STAGES.get(self.stage)
        if self.all_languages and stage is not None and not stage.captioning:
            raise FieldError(
                f"all_languages=True is for captioning stages, not {self.stage!r}: a "
                "translation has one target"
            )

    def _check_best(self) -> None:
        stages = STAGES if self.stage == PIPELINE else (self.stage,)
        known = [
            f"val/{metric}"
            for evaluator in evaluators_of(*stages)
            if self.valid_decode or not evaluator.searches
            for metric in evaluator.best
        ]
        if known and self.run.best not in (None, *known):
            raise FieldError(
                f"run.best={shown(self.run.best)} must be one of {known} with "
                f"valid_decode={self.valid_decode}, or None to take the newest checkpoint"
            )

    def _check_beams(self) -> None:
        # A search of W beams needs the 2 W best tokens.
        most = self.model.sizes.vocab // 2
        for name, beams in (("decode.beams", self.decode.beams), ("valid_beams", self.valid_beams)):
            if beams > most:
                raise FieldError(
                    f"{name}={beams} must be at most half of model.{self.model.translator}.vocab="
                    f"{self.model.sizes.vocab}"
                )


def choose_recipe(
    config: ml_collections.ConfigDict, recipes: dict[str, Recipe]
) -> ml_collections.ConfigDict:
    """Applies the recipe of `config.stage`; the pipeline gets all recipes under `recipes`.

    Args:
      config: a ConfigDict of `Config` whose stage is set.
      recipes: recipe of each stage; "evaluate" needs none.

    Raises:
      ValueError: if the stage has no recipe.
    """
    return apply_recipe(config, recipes, kind="stage", bare=(EVALUATE,))
