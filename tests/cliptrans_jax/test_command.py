"""The command line: every error is a single message, before anything is written."""

import contextlib
import dataclasses
import errno
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from changed import changed
from etils import epath
from tiny_cliptrans import TEST, VOCAB, tiny_config, write_run

from cliptrans_jax import main as command
from cliptrans_jax.main import DESCRIPTION, main
from cliptrans_jax.runs.initial_weights import check_start
from cliptrans_jax.runs.run_tokenizer import save_tokenizer, train_tokenizer
from common_jax import app
from common_jax.mesh import MeshConfig, make_mesh
from common_jax.workdir import lock

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
import pathlib
from common_jax.config import parse_args, unfreeze
from tiny_cliptrans import tiny_config, tiny_pipeline

def get_config(arg=None):
    stage, root = parse_args(arg, {"stage": "translate"}).stage, pathlib.Path(ROOT)
    return unfreeze(tiny_pipeline(root) if stage == "pipeline" else tiny_config(stage, root))
"""
NO_PREFIX = "--config.model.mapper.prefix=0"


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Workdirs as runs leave them, by name, with untrained parameters."""
    folder = epath.Path(tmp_path_factory.mktemp("runs"))
    plain = tiny_config("translate", corpus)
    mapper = dataclasses.replace(plain.model.mapper, prefix=0)
    configs = {
        "clip": tiny_config("clip", corpus),
        "translate": plain,
        "no_prefix": dataclasses.replace(
            plain, model=dataclasses.replace(plain.model, mapper=mapper)
        ),
    }
    for name, config in configs.items():
        write_run(folder / name, config)
    return folder


def argv(corpus, workdir, *flags, stage="translate"):
    path = corpus.parent / "config.py"
    path.write_text(CONFIG.replace("ROOT", repr(str(corpus))))
    return [
        "cliptrans", f"--config={path}:stage={stage}", f"--workdir={workdir}",
        "--config.mesh.data=8", *flags,
    ]  # fmt: skip


def refusal(capsys, arguments) -> str:
    """The command's message when it refuses, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        app.run(main, DESCRIPTION, arguments)
    message = capsys.readouterr().err
    assert stop.value.code == 2, message
    assert "Traceback" not in message
    return message


@pytest.fixture
def refused(capsys, corpus, tmp_path):
    """refused(flags, said, stage=, corpus=, kept=): the command refuses, its message contains all
    of `said`, and it writes nothing except what is in `kept`."""

    def check(flags, said, *, stage="translate", corpus=corpus, kept=None):
        workdir = tmp_path / "run"
        message = refusal(capsys, argv(corpus, workdir, *flags, stage=stage))
        for text in said:
            assert text in message, message
        if kept is None:
            assert not workdir.exists()
        else:
            assert {path.name for path in workdir.iterdir()} <= kept

    return check


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.optin.batch=8"], ["config has no field 'optin'", "did you mean 'optim'"]),
        (
            ["--config.model.mapper.prefx=4"],
            ["config.model.mapper has no field 'prefx'", "did you mean 'prefix'"],
        ),
        (
            ["--config.data.target_language=dx"],
            ["config.data.target_language='dx'", "'multi30k'", "en, de, fr, cs"],
        ),
        (["--config.data.path=/nowhere"], ["config.data.path='/nowhere'", "multi30k"]),
        (["--config.data.test_split=test_2017"], ["test_2017.en", "the splits", TEST]),
        ([], ["needs features", "config.sources.clip_text", "config.sources.clip"]),
        (
            ["--config.sources.clip_text=/tower"],
            ["config.clip_tokenizer.kind='trained'", "'xlmr' for 'mclip'", "clip_tokenizer.path"],
        ),
        (["--config.mesh.data=3"], ["config.mesh=data 3", "are 8 here", "change config.mesh"]),
        (["--config.optim.batch=12"], ["config.optim.batch", "=12", "8 devices"]),
        (["--config.optim.batch=16", "--config.optim.accumulate=4"], ["accumulate=4", "8 devices"]),
        (["--config.decode.batch=12"], ["config.decode.batch=12", "8 devices"]),
        ([NO_PREFIX, "--config.optim.batch=32"], ["config.optim.batch=32", "1 to 24"]),
        (
            [NO_PREFIX, "--config.model.mbart.vocab=280"],
            ["config.model.mbart.vocab=280", f"{VOCAB} tokens of the tokenizer"],
        ),
        (
            [NO_PREFIX, "--config.mesh.data=1", "--config.mesh.fsdp=8",
             "--config.model.mbart.width=12"],
            ["splits its axis of 12", "config.mesh.fsdp=8"],
        ),
        (["--config.run.best=val/blue"], ["config.run.best='val/blue'", "val/bleu"]),
        (["--config.tokenizer.vocab=100"], ["config.tokenizer.vocab=100", "256 bytes"]),
        (
            ["--config.tokenizer.max_length=30"],
            ["config.model.mbart.positions=32", "set tokenizer.max_length"],
        ),
        (
            ["--config.sources.model=/a", "--config.sources.mbart=/b"],
            ["config.sources.model='/a'", "mbart='/b'"],
        ),
        ([NO_PREFIX, "--config.seed=4294967296"], ["config.seed=4294967296"]),
        ([NO_PREFIX, "--config.sources.model=/nowhere"], ["config.sources.model='/nowhere'"]),
        (
            [NO_PREFIX, "--config.optim.schedule=warmup_cosine", "--config.optim.warmup_epochs=2"],
            ["config.optim.warmup_epochs=2 is a warm-up of 6 steps, and the run has only 6"],
        ),
        (["--wrokdir=x"], ["wrokdir"]),
    ],
    ids=lambda value: value[-1] if value and value[0].startswith("-") else "",
)  # fmt: skip
def test_user_errors_are_raised_before_anything_is_written(refused, flags, said):
    refused(flags, said)


@pytest.mark.parametrize("stage", ["clip", "caption", "triplet"])
def test_missing_images_are_reported(refused, corpus, runs, tmp_path, stage):
    texts = tmp_path / "texts"
    shutil.copytree(corpus, texts, ignore=shutil.ignore_patterns("images"))
    refused(
        [] if stage == "clip" else [f"--config.sources.clip={runs / 'clip'}"],
        ["multi30k train has no images", "none of the 24 images", str(texts / "images")],
        stage=stage,
        corpus=texts,
    )


@pytest.mark.parametrize("stage", ["caption", "text_recon"])
def test_captioning_from_nothing_is_refused(stage, refused):
    refused(
        [NO_PREFIX], ["config.model.mapper.prefix=0 and", f"stage {stage!r} would"], stage=stage
    )
    mesh = make_mesh(MeshConfig(data=8))
    config = tiny_config(stage, None)
    command.check_run(config, mesh)
    plain = changed("model.mapper.prefix", 0, config)
    command.check_run(changed("noise.mask_prob", 0.9, plain), mesh)
    command.check_run(changed("stage", "translate", plain), mesh)


def test_pipeline_that_captions_from_nothing_is_refused(refused):
    said = ["config.noise.mask_prob=1.0", "stage 'caption' would"]
    refused([NO_PREFIX], said, stage="pipeline")


def test_missing_language_file_is_reported(refused, corpus, tmp_path):
    copied = shutil.copytree(corpus, tmp_path / "copied")
    (copied / "raw" / f"{TEST}.de").unlink()
    said = [f"{copied}/raw/{TEST}.de", f"'{TEST}' has the languages en"]
    refused([NO_PREFIX], said, corpus=copied)  # although the test set is only needed at the end


def test_files_of_different_lengths_are_reported_with_counts(refused, corpus, tmp_path):
    copied = shutil.copytree(corpus, tmp_path / "copied")
    with (copied / "raw" / "train.de").open("a") as file:
        file.write("ein Kreis\n")
    said = ["different numbers of lines", "raw/train.en: 24", "raw/train.de: 25"]
    refused([NO_PREFIX], said, corpus=copied)


def test_unreadable_image_is_reported(refused, corpus, runs, tmp_path):
    copied = shutil.copytree(corpus, tmp_path / "copied")
    name = (copied / "image_splits" / "train.txt").read_text().splitlines()[5]
    (copied / "images" / "train" / name).write_bytes(b"no picture")
    refused(
        [f"--config.sources.clip={runs / 'clip'}"],
        [f"images/train/{name}", "a stage with features needs every picture: repair it, or drop"],
        stage="caption",
        corpus=copied,
        kept={"tokenizer.json"},
    )


def test_missing_picture_is_reported_before_the_towers_train(refused, corpus, tmp_path):
    copied = shutil.copytree(corpus, tmp_path / "copied")
    name = (copied / "image_splits" / "train.txt").read_text().splitlines()[5]
    (copied / "images" / "train" / name).unlink()
    said = [f"multi30k train lacks 1 of 24 pictures: {copied}/images/train/{name}; a stage with"]
    # Stage clip alone would allow it.
    refused(["--config.data.bad_share=0.1"], said, stage="pipeline", corpus=copied)


def test_tower_of_another_width_is_refused(refused, runs):
    flags = [f"--config.sources.clip={runs / 'clip'}", "--config.model.mapper.features=16"]
    for stage, tower in (("caption", "image"), ("translate", "text")):
        said = [
            "config.model.mapper.features=16",
            f"must be 8, the width of the {tower} tower's features",
        ]
        refused(flags, said, stage=stage)


def test_sources_of_the_wrong_kind_are_refused(refused, runs):
    refused(
        [f"--config.sources.clip={runs / 'translate'}"],
        ["config.sources.clip=", "a run of stage \"translate\", not of 'clip'"],
    )
    refused([f"--config.sources.clip={runs}"], ["no finished checkpoint", str(runs)])


def test_stage_may_start_from_released_shards(corpus, tmp_path):
    config = tiny_config("translate", corpus)
    sources = dataclasses.replace(config.sources, model=str(tmp_path / "model.pth"))
    config = dataclasses.replace(config, sources=sources)
    with pytest.raises(FileNotFoundError, match=r"config\.sources\.model=.*a released checkpoint"):
        check_start(config, None, {})
    (tmp_path / "model_1.pth").touch()
    check_start(config, None, {})


def test_tokenizer_differing_from_the_source_is_refused(refused, runs):
    for source in ("model", "clip"):
        flags = [f"--config.sources.clip={runs / 'clip'}", "--config.tokenizer.vocab=290"]
        if source == "model":
            flags[0] = NO_PREFIX
            flags.append(f"--config.sources.model={runs / 'no_prefix' / 'checkpoints' / '1'}")
        refused(
            flags, [f"config.sources.{source}: ", "is not the tokenizer of", "config.tokenizer"]
        )


def test_source_without_a_mapper_is_refused(refused, runs):
    sources = [f"--config.sources.{name}={runs / run}"
               for name, run in (("clip", "clip"), ("model", "no_prefix"))]  # fmt: skip
    said = ["mapper/out/kernel of shape (8, 64) is in none of the sources", "config.sources.fresh"]
    refused(sources, said)


def test_mapper_is_not_dropped_silently(refused, runs):
    said = ["mapper/out/kernel of shape (8, 64) has no place", "config.sources.leave"]
    flags = [NO_PREFIX, f"--config.sources.model={runs / 'translate'}"]
    refused(flags, said)


def test_tokenizer_of_a_failed_start_is_replaced(runs, corpus, tmp_path):
    """Otherwise it would refuse the corrected command, as a tokenizer of another config."""
    config, workdir = tiny_config("clip", corpus), epath.Path(tmp_path)
    tokenizer = dataclasses.replace(config.tokenizer, vocab=290)
    for one in (dataclasses.replace(config, tokenizer=tokenizer), config):
        save_tokenizer(train_tokenizer(one, workdir)[1], workdir)
    expected = (runs / "clip" / "tokenizer.json").read_text()
    assert (tmp_path / "tokenizer.json").read_text() == expected


def test_different_config_in_the_same_workdir_is_refused(capsys, corpus, runs):
    for stage in ("translate", "clip"):
        workdir = runs / stage
        before = {path.name: path.stat().mtime for path in workdir.iterdir()}
        flags = ["--config.optim.lr=0.5", "--config.tokenizer.vocab=290"]
        message = refusal(capsys, argv(corpus, workdir, *flags, stage=stage))
        assert "holds a run of another config" in message
        assert "optim.lr: 0.005 -> 0.5" in message
        assert "tokenizer.vocab: 300 -> 290" in message
        assert before == {path.name: path.stat().mtime for path in workdir.iterdir()}


def test_scored_model_must_exist_and_match_the_config(refused, runs):
    refused([NO_PREFIX], ["needs config.sources.model"], stage="evaluate")
    refused(
        [NO_PREFIX, f"--config.sources.model={runs / 'translate'}"],
        ["config.model is not the model of", "mapper/out/kernel (8, 64) has no place"],
        stage="evaluate",
    )
    flags = [NO_PREFIX, f"--config.sources.model={runs / 'no_prefix'}"]
    refused(
        [*flags, "--config.model.mbart.width=32"],
        ["mbart/decoder/embedding_norm/bias is (16,) and should be (32,)"],
        stage="evaluate",
    )
    refused(
        [*flags, "--config.model.mbart.scale_embedding=False"],
        ["scale_embedding=True (here False)", "Give --config.model.mbart.scale_embedding=True"],
        stage="evaluate",
    )
    refused([NO_PREFIX, "--config.sources.model=/nowhere"], ["/nowhere"], stage="evaluate")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.clip.text.features=4"], ["config.clip.text.features=4", "one space"]),
        (["--config.clip.text.vocab=280"], ["config.clip.text.vocab=280", f"{VOCAB} tokens"]),
        (
            ["--config.clip.text.positions=10"],
            ["config.clip.text.positions=10", "room for 8 tokens", "config.tokenizer.max_length"],
        ),
        (["--config.optim.batch=32"], ["config.optim.batch=32", "1 to 24"]),
    ],
)
def test_errors_of_stage_clip(refused, flags, said):
    refused(flags, said, stage="clip")


def test_pipeline_that_cannot_start_leaves_its_workdir_unused(refused):
    refused(["--config.model.mbart.vocab=280"], ["config.model.mbart.vocab=280"], stage="pipeline")
    refused(["--config.recipes={}"], ["config.recipes is empty"], stage="pipeline")


def test_workdir_without_room_for_a_lock_is_reported_first(refused, monkeypatch):
    """Not after all features were computed."""

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock._Lock, "_create", full_disk)
    monkeypatch.setattr(command, "run_stage", None)
    for stage in ("translate", "pipeline"):
        refused([], ["no lock can be written: No space left on device", "Make room"], stage=stage)


@pytest.mark.parametrize("scored", [True, False])
def test_finished_run_needs_no_fitting_mesh(scored, capsys, refused, corpus, tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "result.json").write_text("{}")
    flags = ["--config.decode.batch=12", "--config.run.compilation_cache=None"]
    if not scored:
        refused(flags, ["config.decode.batch=12", "8 devices"], kept={"result.json"})
        return
    (workdir / "scores.json").write_text("{}")
    monkeypatch.setattr(command, "run_stage", lambda *_: {})
    monkeypatch.setattr(command, "reporting", lambda *_: contextlib.nullcontext())
    app.run(main, DESCRIPTION, argv(corpus, workdir, *flags, stage="translate"))


def test_pipeline_is_checked_before_it_starts(refused):
    recipe = "--config.recipes.translate.optim"
    refused(
        [f"{recipe}.schedule=inverse_sqrt", f"{recipe}.warmup_steps=6"],
        ["config.recipes.translate.optim.warmup_steps=6 is a warm-up of 6 steps"],
        stage="pipeline",
    )
    refused([f"{recipe}.batch=32"], ["32 must be from 1 to 24"], stage="pipeline")


def test_help_shows_the_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        app.run(main, DESCRIPTION, ["cliptrans", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(flag in shown for flag in ("--config", "--workdir", "--debug", "emoji.py"))


def test_startup_imports_no_other_frameworks_or_slow_modules():
    slow = "{'tensorflow', 'torch', 'nltk', 'scipy.stats', 'sklearn'}"
    code = f"import sys, cliptrans_jax.main; print(sorted({slow} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=dict(os.environ),
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("stage", "pictures"), [("caption", True), ("text_recon", False)])
def test_command_suggests_how_to_use_a_captioning_run(stage, pictures, caplog):
    with caplog.at_level(logging.INFO):
        command._conclude({}, tiny_config(stage, None), epath.Path("runs/x"))
    wanted = 'cliptrans translate runs/x "SENTENCE"' + " --pictures PICTURE" * pictures
    assert caplog.messages[-1].endswith(wanted)
