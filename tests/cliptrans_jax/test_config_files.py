"""Every shipped CLIPTrans config can be frozen, planned and built, without taking a step."""

import dataclasses
import functools
import pathlib
import runpy

import jax
import pytest
from jax import numpy as jnp

from cliptrans_jax.config import Config
from cliptrans_jax.models import cliptrans
from cliptrans_jax.models.cliptrans import Translator
from cliptrans_jax.models.mapper import MapperConfig
from cliptrans_jax.models.prefix import PrefixConfig
from cliptrans_jax.runs import contrastive
from cliptrans_jax.runs.idle import idle
from cliptrans_jax.runs.pipeline import plan
from cliptrans_jax.stages import STAGES, TRANSLATION_STAGES, Side
from cliptrans_jax.translators.mbart import MBartConfig
from common_jax.config import freeze
from common_jax.mesh import MeshConfig, make_mesh, match_rules
from common_jax.run_config import Due

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "cliptrans"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
PAIRS = ("es_fr", "en_ro", "en_fr", "en_es", "en_de", "en_af", "de_es")
# File -> the stages that it has besides "evaluate", and the further arguments it accepts.
STAGES_OF = {
    "emoji": ("pipeline", "clip", *TRANSLATION_STAGES),
    "multi30k": ("pipeline", "caption", "text_recon", "translate", "triplet"),
    "multi30k_tiny": ("translate",),
    "wit": ("pipeline", "caption", "text_recon", "translate", "triplet"),
    "wmt": ("translate",),
}
ARGUMENTS = {
    "emoji": (
        "",
        "model=cliptrans",
        "model=no_captioning",
        "model=text_only",
        "source=ja,target=ar,scale=0.1",
    ),
    "multi30k": (
        "",
        "target=fr",
        "source=de,target=en",
        "prefix=0",
        "translator=nllb",
        "translator=m2m100-1.2B",
    ),
    "multi30k_tiny": ("", "target=fr", "source=de,target=en"),
    "wit": ("", *(f"pair={pair}" for pair in PAIRS), "prefix=0,translator=nllb"),
    "wmt": ("", "target=fr,prefix=0", "source=de,target=en,translator=nllb-3.3B"),
}
MODEL = "some/model"


@functools.cache
def read(name):
    return runpy.run_path(str(FILES[name]))


def load(name, arg, **flags) -> Config:
    config = read(name)["get_config"](arg)
    config.update_from_flattened_dict(flags)
    return freeze(Config, config)


def arguments(stage, rest):
    return f"stage={stage}" + (f",{rest}" if rest else "")


def test_every_config_file_is_covered():
    assert set(FILES) == set(STAGES_OF) == set(ARGUMENTS)


@functools.cache
def build(model):
    """Shapes of a model's parameters and logits, with two of the identical layers."""
    few = dataclasses.replace(model.sizes, encoder_layers=2, decoder_layers=2)
    translator = Translator(dataclasses.replace(model, **{model.translator: few}))
    params = jax.eval_shape(translator.init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    features = jax.ShapeDtypeStruct((2, model.mapper.features), jnp.float32)
    features = features if model.mapper.prefix else None
    logits = jax.eval_shape(translator.train_logits, params, features, ids, ids)
    return params, logits


def check(config: Config) -> None:
    """Checks that a stage can be run."""
    config = config.apply_parity()
    config.optim.total_steps(steps_per_epoch=100)
    if config.stage == "clip":
        tree = jax.eval_shape(functools.partial(contrastive.init, config), jax.random.key(0))
        match_rules(contrastive.partition_rules(config), tree, make_mesh(MeshConfig(fsdp=2)))
        assert config.clip.text.features == config.clip.image.features
        assert config.clip.text.vocab >= config.tokenizer.vocab
        return
    params, logits = build(config.model)
    assert logits.shape == (2, 5, config.model.sizes.vocab)
    assert ("mapper" in params) is config.has_prefix
    match_rules(cliptrans.partition_rules(config.model), params, make_mesh(MeshConfig(fsdp=8)))
    assert config.tokenizer.kind != "trained" or config.tokenizer.vocab <= logits.shape[-1]


@pytest.mark.parametrize(
    ("name", "stage", "rest"),
    [(n, stage, rest) for n, stages in STAGES_OF.items() for stage in stages
     for rest in ARGUMENTS[n]],
)  # fmt: skip
def test_every_stage_can_be_built(name, stage, rest, tmp_path):
    config = load(name, arguments(stage, rest))
    assert config.stage == stage
    for _, one in plan(config, tmp_path):
        check(one)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("own", [{}, {"data.source": "text", "data.path": "texts"}])
def test_config_files_set_no_idle_fields(name, own):
    """Also with other data, their warnings would be of fields that the user has not set."""
    own = own and own | {"data.train_split": "train", "data.further_tests": ()}
    for stage in STAGES_OF[name]:
        for rest in ARGUMENTS[name]:
            assert idle(load(name, arguments(stage, rest), **own)) == {}, (stage, rest)


@pytest.mark.parametrize("name", FILES)
def test_every_stage_can_be_scaled_to_a_tenth(name):
    for stage in STAGES_OF[name]:
        whole, short = (load(name, arguments(stage, f"scale={scale}")) for scale in (1, 0.1))
        recipes = [(whole, short)]
        if stage == "pipeline":
            recipes = [(whole.recipes[key], short.recipes[key]) for key in whole.recipes]
        for before, after in recipes:
            ratio = after.optim.total_steps(100) / before.optim.total_steps(100)
            assert 0.05 < ratio <= 0.2  # at least an epoch out of 5
            after.optim.check_warmup(100)


@pytest.mark.parametrize("name", FILES)
def test_every_config_can_score_a_model(name):
    for rest in ARGUMENTS[name]:
        config = load(name, arguments("evaluate", rest), **{"sources.model": MODEL})
        assert (config.stage, config.sources.model) == ("evaluate", MODEL)
        check(config)


@pytest.mark.parametrize(
    ("name", "rest", "stages"),
    [
        ("emoji", "", ["clip", "caption", "translate"]),
        ("emoji", "model=no_captioning", ["clip", "translate"]),
        ("emoji", "model=text_only", ["translate"]),
        ("multi30k", "", ["caption", "translate"]),
        ("multi30k", "prefix=0", ["translate"]),
        ("wit", "", ["caption", "translate"]),
    ],
)
def test_pipelines_pass_weights_on(name, rest, stages, tmp_path):
    config = load(name, arguments("pipeline", rest))
    runs = plan(config, tmp_path)
    assert [folder for folder, _ in runs] == [one.stage for _, one in runs] == stages
    assert stages == [stage for stage in STAGES if stage in stages]
    last = ""
    for stage, one in runs:
        assert one.optim == config.recipes[stage].optim
        assert one.label_smoothing == config.recipes[stage].label_smoothing
        if stage == "clip":
            continue
        assert one.sources.clip == (str(tmp_path / "clip") if "clip" in stages else "")
        assert one.sources.model == last
        last = str(tmp_path / stage)


def test_pipeline_keeps_given_towers_and_weights(tmp_path):
    given = {"sources.clip": "towers", "sources.mbart": "mbart", "all_languages": True}
    runs = dict(plan(load("emoji", "stage=pipeline", **given), tmp_path))
    assert list(runs) == ["caption", "translate"]
    assert {one.sources.clip for one in runs.values()} == {"towers"}
    assert [one.sources.mbart for one in runs.values()] == ["mbart", ""]
    assert [one.all_languages for one in runs.values()] == [True, False]
    unfrozen = dict(plan(load("emoji", "stage=pipeline", unfreeze_clip=True), tmp_path))
    assert [one.unfreeze_clip for one in unfrozen.values()] == [False, False, True]


@pytest.mark.parametrize("name", [name for name in FILES if "sweep" in read(name)])
def test_every_sweep_item_is_applied(name):
    for item in read(name)["sweep"]():
        assert all(key.startswith(":") for key in item)
        config = load(name, ",".join(f"{key[1:]}={value}" for key, value in item.items()))
        if ":pair" in item:
            assert "_".join(config.data.pair) == item[":pair"]
        if ":prefix" in item:
            assert config.model.mapper.prefix == item[":prefix"]
        if ":target" in item:
            assert config.data.target_language == item[":target"]


@pytest.mark.parametrize(
    ("name", "arg", "said"),
    [
        ("emoji", "stage=captions", r"^stage='captions'"),
        ("emoji", "model=none", "model='none' must be one of"),
        ("emoji", "target=xx", r"^target_language='xx' is not a language"),
        ("emoji", "scale=0", r"^scale=0 must be positive, such as 0\.1"),
        ("multi30k", "target=ro", r"^target_language='ro' is not a language"),
        ("multi30k", "prefix=-1", r"^prefix=-1"),
        ("multi30k", "chips=0", "chips=0 must be at least 1"),
        ("multi30k", "translator=t5", "translator='t5' must be one of"),
        ("multi30k_tiny", "stage=caption", "stage='caption' has no recipe here"),
        ("multi30k_tiny", "stage=text_recon", "needs features of sentences: give text_tower="),
        ("multi30k_tiny", "stage=pipeline", "needs features of sentences: give text_tower="),
        ("wit", "pair=en_ru", "pair='en_ru' must be one of"),
        ("wmt", "stage=pipeline", r"^stage='pipeline' must be one of \['translate', 'evaluate'\]"),
        ("wmt", "stage=text_recon", r"^stage='text_recon' must be one of"),
    ],
)
def test_unknown_arguments_are_refused(name, arg, said):
    with pytest.raises(ValueError, match=said):
        load(name, arg)


# The published settings.


def test_text_only_recipe_matches_the_literature():
    config = load("multi30k_tiny", "target=fr")
    optim, sizes = config.optim, config.model.mbart
    assert (optim.steps, optim.batch, 29_000 // optim.batch, optim.clip) == (8000, 464, 62, 25)
    assert (optim.schedule, optim.peak_lr, optim.warmup_steps) == ("inverse_sqrt", 0.005, 2000)
    assert (optim.b1, optim.b2, optim.eps, optim.weight_decay) == (0.9, 0.98, 1e-8, 0)
    assert (optim.ema, config.run.average_last, config.run.best) == (0, 10, None)
    assert config.run.checkpoint_every == 1 and config.label_smoothing == 0.1
    assert (sizes.width, sizes.encoder_layers, sizes.decoder_layers, sizes.dropout) == (
        128,
        4,
        4,
        0.3,
    )
    assert (sizes.encoder_heads, sizes.encoder_hidden) == (4, 256)
    assert config.tokenizer.lower and config.tokenizer.vocab == sizes.vocab == 10_000
    assert (config.decode.beams, config.decode.length_penalty) == (5, 1)
    assert config.data.pair == ("en", "fr")


def test_text_only_stages_share_a_frozen_text_tower():
    pipeline = load("multi30k_tiny", "stage=pipeline,text_tower=weights/e5,scale=0.5")
    assert list(pipeline.recipes) == ["text_recon", "translate"]
    assert [recipe.optim.steps for recipe in pipeline.recipes.values()] == [2000, 4000]
    assert [recipe.optim.warmup_steps for recipe in pipeline.recipes.values()] == [500, 1000]
    single = load("multi30k_tiny", "stage=text_recon,text_tower=weights/e5")
    assert single.optim.steps == 4000 and single.label_smoothing == 0.1
    for config in (pipeline, single):
        assert config.sources.clip_text == config.clip_tokenizer.path == "weights/e5"
        assert (config.model.mapper.prefix, config.model.mapper.features) == (10, 384)
        assert (config.freeze, config.caption_language) == ("nothing", "de")
    assert load("multi30k_tiny", "").model.mapper.prefix == 0


@pytest.mark.parametrize("scale", [0.002, 0.04, 0.1, 0.5, 3])
def test_short_runs_save_the_checkpoints_they_average(scale):
    config = load("multi30k_tiny", f"scale={scale}")
    optim = config.optim
    due = Due(config.run, 62, optim.total_steps(62))
    assert due.check_average(optim, title="translate", key="config") is None
    assert config.run.average_last == {0.1: 1, 0.5: 5, 3: 10}.get(scale, 1)


@pytest.mark.parametrize("stage", ["caption", "text_recon", "translate", "triplet"])
def test_multi30k_has_the_published_recipe(stage):
    config = load("multi30k", f"stage={stage}")
    optim = config.optim
    assert (optim.optimizer, optim.lr, optim.lr_per, optim.schedule) == (
        "adamw",
        1e-5,
        None,
        "constant",
    )
    assert optim.peak_lr == 1e-5
    assert (optim.b1, optim.b2, optim.eps, optim.weight_decay) == (0.9, 0.98, 1e-6, 0.0)
    assert (optim.batch, optim.accumulate, optim.micro_batch) == (128, 4, 32)
    assert (optim.epochs, optim.steps, optim.clip, optim.ema) == (15, None, None, 0.0)
    assert (config.seed, config.label_smoothing) == (29, 0.0)
    decode = config.decode
    assert (decode.beams, decode.max_new_tokens) == (5, 60)
    assert (decode.length_penalty, decode.early_stopping) == (1.0, True)
    assert config.noise.mask_prob == 1.0
    assert (config.noise.train, config.noise.test, config.freeze) == (False, False, "encoder")
    assert (config.test_side, config.caption_language, config.all_languages) == ("", "", False)
    assert config.run.best == "val/bleu"


def test_multi30k_has_the_published_model():
    config = load("multi30k", "stage=translate")
    assert config.model.mbart == MBartConfig(
        vocab=250054, width=1024, encoder_layers=12, decoder_layers=12, encoder_heads=16,
        decoder_heads=16, encoder_hidden=4096, decoder_hidden=4096, positions=1024, dropout=0.1,
        scale_embedding=True, pad=1, eos=2, start=2,
    )  # fmt: skip
    assert config.model.mapper == MapperConfig(kind="mlp", prefix=10, features=512)
    params = jax.eval_shape(Translator(config.model).init, jax.random.key(0))
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert sizes == {"mbart": 610_879_488 + 250_054, "mapper": 5_253_121}
    assert (config.tokenizer.kind, config.clip_tokenizer.kind) == ("mbart50", "xlmr")


@pytest.mark.parametrize("pair", PAIRS)
def test_wit_shares_the_settings_of_multi30k(pair):
    source, target = pair.split("_")
    wit, other = load("wit", f"pair={pair}"), load("multi30k", None)
    assert (wit.data.source, wit.data.pair) == ("wit", (source, target))
    assert (wit.data.valid_split, wit.data.test_split) == ("valid", "test")
    assert dataclasses.replace(wit, data=other.data) == other


def test_parity_sets_the_original_values():
    config = load("multi30k", "stage=translate")
    assert config.apply_parity() is config
    asked = load("multi30k", "stage=translate", parity=True)
    meant = asked.apply_parity()
    assert meant.optim == dataclasses.replace(asked.optim, eps=1e-6 / 4)
    assert meant.model.prefix == PrefixConfig(layout="original", mask="original")
    assert meant.test_side == ""
    changed = {"optim": asked.optim, "model": asked.model}
    assert dataclasses.replace(meant, **changed) == asked


@pytest.mark.parametrize(
    ("stage", "test", "side"),
    [("translate", True, "image"), ("translate", False, ""), ("triplet", True, "")],
)
def test_parity_uses_images_when_test_tokens_are_dropped(stage, test, side):
    flags = {"noise.test": test, "parity": True}
    assert load("multi30k", f"stage={stage}", **flags).apply_parity().test_side == side
    assert load("multi30k", f"stage={stage}", **flags | {"parity": False}).apply_parity() == load(
        "multi30k", f"stage={stage}", **flags | {"parity": False}
    )
    assert TRANSLATION_STAGES[stage].test is Side.TEXT


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("nllb", 615e6), ("nllb-1.3B", 1.37e9), ("nllb-3.3B", 3.34e9), ("m2m100", 484e6)],
)
def test_translators_have_their_published_sizes(name, parameters):
    config = load("multi30k", f"stage=translate,translator={name}")
    shapes = config.model.architecture.shapes(config.model.sizes)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert abs(count / parameters - 1) < 0.01
    assert config.tokenizer.kind == ("m2m100" if name == "m2m100" else "nllb")
