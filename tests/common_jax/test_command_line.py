"""The command line: all forms of a flag are equivalent, and errors take one line."""

import itertools
import os
import random
import re

import ml_collections
import pytest

from common_jax import app
from common_jax.command_line import System, check_system, read_config_file, set_field
from common_jax.config import freeze
from m2mkd_jax.config import Config

CONFIG = """
import ml_collections

def get_config(arg=None):
    config = ml_collections.ConfigDict(
        {
            "optim": {"lr": 0.1, "steps": 3, "clip": 1.0, "no_decay": ".*"},
            "model": {"depths": (1, 1), "pairs": ((1, 2), (3, 4)), "names": ("a",)},
            "run": {"best": "val/loss", "every": None},
            "parity": False,
            "path": "",
            "phase": arg or "",
        }
    )
    config.optim.ema = ml_collections.config_dict.placeholder(float)
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def read(file):
    return lambda *flags: app.read_config(["run", f"--config={file}", "--workdir=w", *flags])


@pytest.mark.parametrize(
    ("flags", "path", "expected"),
    [
        # The last one counts, in any form.
        (["--config.optim.clip=None", "--config.optim.clip=2.0"], "optim.clip", 2.0),
        (["--config.optim.clip=2.0", "--config.optim.clip=None"], "optim.clip", None),
        (["--config.optim.clip=None", "--config.optim.clip=None"], "optim.clip", None),
        (["-config.optim.clip", "None", "--config.optim.clip=3"], "optim.clip", 3.0),
        (["--config.model.depths=(1,2)", "--config.model.depths=(3,)"], "model.depths", (3,)),
        (["--config.parity", "--noconfig.parity"], "parity", False),
        # None, in every form and for every type.
        (["-config.run.best=None"], "run.best", None),
        (["--config.run.best", "None"], "run.best", None),
        (["-config.run.best", "None"], "run.best", None),
        (["--config.model.depths=None"], "model.depths", None),
        (["--config.optim.ema=None"], "optim.ema", None),
        (["--config.run.best=none"], "run.best", "none"),
        # Numbers.
        (["--config.optim.lr", "-1e-3"], "optim.lr", -0.001),
        (["--config.optim.lr=5"], "optim.lr", 5.0),
        (["--config.optim.ema", "0.5"], "optim.ema", 0.5),
        (["--config.optim.steps=1e3"], "optim.steps", 1000),
        (["--config.optim.steps=-2"], "optim.steps", -2),
        # Booleans.
        (["--config.parity"], "parity", True),
        (["-config.parity"], "parity", True),
        (["--config.parity=TRUE"], "parity", True),
        (["-noconfig.parity"], "parity", False),
        (["--config.parity=0"], "parity", False),
        # Text is taken literally, including an empty one.
        (["--config.path="], "path", ""),
        (["--config.path", "a=b,c"], "path", "a=b,c"),
        (["--config.path=1"], "path", "1"),
        (["--config.path=-x"], "path", "-x"),
        (["--config.optim.no_decay=("], "optim.no_decay", "("),
        # Tuples.
        (["--config.model.depths=(2,3)"], "model.depths", (2, 3)),
        (["--config.model.depths", "[2,3]"], "model.depths", (2, 3)),
        (["--config.model.depths=2,3"], "model.depths", (2, 3)),
        (["--config.model.depths=2"], "model.depths", (2,)),
        (["--config.model.depths=()"], "model.depths", ()),
        (["--config.model.pairs=((5,6),)"], "model.pairs", ((5, 6),)),
        (["--config.model.names=('b','c')"], "model.names", ("b", "c")),
        (["--config.model.names=runs/lr=[1e-3],x"], "model.names", ("runs/lr=[1e-3],x",)),
        # If the config has None without a type, any literal is accepted.
        (["--config.run.every=4"], "run.every", 4),
        (["--config.run.every=(1,2)"], "run.every", (1, 2)),
        (["--config.run.every=steps"], "run.every", "steps"),
    ],
)
def test_all_flag_forms_are_equivalent(read, tmp_path, flags, path, expected):
    flagfile = tmp_path / "flags"
    flagfile.write_text("# one argument a line\n" + "\n".join(flags) + "\n")
    for one in (flags, [f"--flagfile={flagfile}"], ["-flagfile", str(flagfile)]):
        value = read(*one)
        for key in path.split("."):
            value = value[key]
        assert value == expected and type(value) is type(expected)


def test_overrides_may_precede_the_config_file(file):
    argv = ["run", "--config.optim.steps", "7", "-workdir", "w", "-config", str(file)]
    assert app.read_config(argv).optim.steps == 7


def test_dict_flag_replaces_a_section_and_later_flags_change_it(read):
    config = read("--config.optim={'lr': 2}", "--config.optim.steps=5")
    assert config.optim.to_dict() == {"lr": 2, "steps": 5}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.optim.lrr=1"], ["config.optim has no field 'lrr'", "did you mean 'lr'"]),
        (["-config.optim.lrr=1"], ["config.optim has no field 'lrr'"]),
        (["--config.optim.lrr", "1"], ["config.optim has no field 'lrr'"]),
        (["--noconfig.optim.lrr"], ["config.optim has no field 'lrr'"]),
        (["--noconfig.optim.lr"], ["--noconfig.optim.lr is for booleans", "--config.optim.lr="]),
        (["--noconfig.parity=true"], ["--noconfig.parity=true does not take an argument"]),
        (["--config.lr=1"], ["did you mean --config.optim.lr?"]),
        (["--config.recipes.optim.lr=1"], ["did you mean --config.optim.lr?"]),
        (["--config.optim.lr.x=1"], ["config.optim.lr is a value and has no fields"]),
        (["--config.=1"], ["config has no field ''"]),
        (["--lr=1e-3"], ["there is no flag --lr", "did you mean --config.optim.lr?"]),
        (["--optim.lr", "1e-3"], ["there is no flag --optim.lr", "--config.optim.lr?"]),
        (["--no-decay=x"], ["did you mean --config.optim.no_decay?"]),
        (["config.optim.lr=1"], ["did you mean --config.optim.lr=1?"]),
        (["--config.optim.lr"], ["Missing value for flag --config.optim.lr"]),
        (["--config.path", "--config.optim.lr=1"], ["--config.path lacks a value"]),
        (["--workdir", "--config.optim.lr=1"], ["--workdir lacks a value"]),
        (["--config.optim.lr="], ["--config.optim.lr= must be a number"]),
        (["--config.optim.steps=1.5"], ["--config.optim.steps=1.5 must be a whole number"]),
        (["--config.optim.steps=1e-3"], ["--config.optim.steps=1e-3 must be a whole number"]),
        (["--config.optim.steps=1e999"], ["must be a whole number"]),
        (["--config.optim.steps=" + "9" * 5000], ["must be a whole number"]),
        (["--config.parity=maybe"], ["--config.parity=maybe must be true or false"]),
        (["--config.parity", "True"], ["arguments ['True'] are not understood"]),
        (["--config.model.depths=(1,2"], ["--config.model.depths=(1,2 must be a tuple"]),
        (["--config.model.depths="], ["--config.model.depths= must be a tuple", "() is the empty"]),
        (["--config.model.depths={1,2}"], ["must be a tuple"]),
        (["--config.optim=3"], ["--config.optim=3: config.optim is a section"]),
        (["--config.optim={1: 2}"], ["config.optim is a section"]),
        (["--config.optim.lr=1", "--config.optim={}"], ["undoes the earlier --config.optim.lr"]),
        (["--config.optim=None", "--config.optim.lr=1"], ["--config.optim.lr: an earlier flag"]),
        (["--processes=x"], ["--processes=x", "invalid literal"]),
        (["--hosts=some"], ["--hosts=some", "one of"]),
        (["--flagfile=/nowhere/flags"], ["--flagfile", "/nowhere/flags"]),
        (["--config.path=\n\x00\x1b[31m", "x"], ["not understood"]),
        (["--config.optim.lr=\n\x00\x1b[31m"], [r"--config.optim.lr=\n\x00\x1b[31m must be"]),
    ],
)
def test_invalid_flags_are_reported(read, flags, said):
    with pytest.raises((ValueError, OSError)) as caught:
        read(*flags)
    for text in said:
        assert text in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_invalid_flag_file_is_reported(read, tmp_path):
    (tmp_path / "flags").write_bytes(b"\xff\xfe--config")
    with pytest.raises(ValueError, match=r"--flagfile=.*/flags is not a file of flags"):
        read(f"--flagfile={tmp_path}/flags")


def test_pipeline_field_error_suggests_its_recipes():
    from sweeps import ROOT

    argv = ["run", f"--config={ROOT}/configs/m2mkd/digits.py:phase=pipeline", "--workdir=w"]
    with pytest.raises(ValueError, match=r"did you mean .*--config\.recipes\.distill\.optim\.lr"):
        app.read_config([*argv, "--config.optim.lr=1"])
    config = app.read_config([*argv, "--config.recipes.distill.optim.lr=0.25"])
    assert freeze(Config, config).recipes["distill"].optim.lr == 0.25


# Config files.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def get_config(:\n", ["is not Python", "line 1"]),
        ("\nimport nowhere_to_be_found\n", ["ModuleNotFoundError in", "line 2", "nowhere_to_be"]),
        ("def get_config():\n    return {}['lr']\n", ["KeyError in", "line 2", "'lr'"]),
        ("def get_config():\n    return int('a')\n", ["invalid literal", "line 2"]),
        ("def get_config():\n    open('/nowhere/x')\n", ["FileNotFoundError in", "line 2"]),
        ("def get_config():\n    return get_config()\n", ["RecursionError in", "line 2"]),
        ("def get_config():\n    assert False\n", ["AssertionError in", "line 2"]),
        ("def get_config():\n    return {}\n", ["returned dict", "ConfigDict"]),
        ("def get_config():\n    pass\n", ["returned NoneType", "ConfigDict"]),
        ("def config():\n    pass\n", ["has no function get_config()"]),
        ("", ["has no function get_config()"]),
        ("\x00", ["config.py"]),
        ("def get_config():\n    raise ValueError('x' * 10000)\n", ["line 2"]),
    ],
)
def test_config_file_error_gives_file_and_line(tmp_path, text, said):
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_config_file(str(file))
    for part in (*said, str(file)):
        assert part in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_unexpected_config_arguments_are_reported(tmp_path):
    (tmp_path / "config.py").write_text("def get_config():\n    return 1\n")
    with pytest.raises(ValueError, match=r"config.py: TypeError.*positional argument"):
        read_config_file(f"{tmp_path}/config.py:phase=x")


def test_missing_config_file_error_suggests_paths(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config_file("config.py:a").phase == "a"
    with pytest.raises(FileNotFoundError, match=rf"no such file in {tmp_path} \(did you mean 'con"):
        read_config_file("confg.py")
    with pytest.raises(FileNotFoundError, match=rf"relative paths start at {tmp_path}$"):
        read_config_file("other.py")
    missing = rf"no folder {tmp_path}/configs/m2mkd; only {tmp_path} exists.* start at {tmp_path}$"
    with pytest.raises(FileNotFoundError, match=missing):
        read_config_file("configs/m2mkd/mine.py")
    with pytest.raises(FileNotFoundError, match=r"\(did you mean 'm2mkd/digits.py'\?\)"):
        read_config_file("m2mkd/digitz.py")
    (tmp_path / "config.json").write_text('{"seed": true}')
    with pytest.raises(ValueError, match=r"config\.json is JSON, and a config is a Python file"):
        read_config_file("config.json")
    with pytest.raises(
        FileNotFoundError, match=r"^--config=/nowhere/x.py: there is no folder /now"
    ):
        read_config_file("/nowhere/x.py")
    with pytest.raises(FileNotFoundError, match=r"no folder .*/config.py;"):
        read_config_file("config.py/x.py")
    with pytest.raises(IsADirectoryError, match=rf"is a folder.*{tmp_path}/config.py"):
        read_config_file(str(tmp_path))
    with pytest.raises(ValueError, match="must be a local file"):
        read_config_file("gs://bucket/config.py")


def test_config_file_without_a_suffix_is_never_stale(tmp_path):
    file = tmp_path / "config"
    for best in ("a", "b"):  # within a second and equally long: no stale bytecode is used
        file.write_text(CONFIG.replace("val/loss", best))
        os.utime(file, (1e9, 1e9))
        assert read_config_file(str(file)).run.best == best
    assert {path.name for path in tmp_path.iterdir()} == {"config"}


def test_load_beside_works_from_any_working_directory(tmp_path, monkeypatch):
    """Two folders have files of the same name, and neither is mistaken for the other."""
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "shared.py").write_text(f"VALUE = {value}\n")
        (tmp_path / folder / "config.py").write_text(
            "import ml_collections\n"
            "from common_jax.command_line import load_beside\n"
            'shared = load_beside(__file__, "shared")\n'
            "def get_config():\n"
            "    return ml_collections.ConfigDict({'value': shared.VALUE})\n"
        )
    (tmp_path / "elsewhere").mkdir()
    for here, prefix in ((tmp_path / "elsewhere", "../"), (tmp_path, "")):
        monkeypatch.chdir(here)
        for folder, value in (("a", 1), ("b", 2)):
            assert read_config_file(f"{prefix}{folder}/config.py").value == value
            assert read_config_file(f"{tmp_path}/{folder}/config.py").value == value
    (tmp_path / "b" / "shared.py").unlink()
    with pytest.raises(ValueError, match=r"config\.py, line 3.*shared\.py"):
        read_config_file(f"{tmp_path}/b/config.py")


def test_a_config_of_the_other_system_is_refused():
    system = System("drawing", field="pencil", others={"brush": "painting"})
    check_system({"pencil": "x"}, system, "W")
    with pytest.raises(
        ValueError, match=r"^W belongs to painting, and this is drawing; use python -m"
    ):
        check_system({"brush": "x"}, system, "W")
    with pytest.raises(ValueError, match=r"^W has no field 'pencil', which every config of "):
        check_system({"chalk": "x"}, system, "W")


# Odd command lines.

FORMS = ("--config.{}={}", "-config.{}={}", "--config.{} {}", "-config.{} {}", "--{}={}")
FIELDS = (
    "optim.lr", "optim.steps", "optim.clip", "optim.ema", "model.depths", "model.pairs",
    "model.names", "run.best", "run.every", "parity", "path", "optim", "model", "run", "phase",
    "optim.", ".optim", "optim..lr", "opt", "path.x", "depths", "", "keys", "__class__", "lr ", "=",
)  # fmt: skip
TEXTS = ("run.best", "path", "model.depths", "optim.clip")
VALUES = (
    "", "None", "none", "0", "-1", "1e3", "1e-3", "nan", "-inf", "1_000", "0x10", "9" * 400, "true",
    "(1,2)", "(1,", "[1,[2]]", "((1,2),(3,4))", "('a',)", "{}", "{'lr': 1}", "{1: 2}", "{[]: 1}",
    "'", '"""', "\\", "\x00", "\n", "é", "\udcff", "(" * 300, "-" * 3, "--", "-h=", "x" * 3000,
    "lambda: 1", "b'a'", "1j", "{'a.b': 1}", "{'items': 1}", "=", "a=b", "--config.optim.lr=1",
)  # fmt: skip
OTHERS = (
    "--", "-", "---", "extra", "--debug", "--nodebug", "--debug=x", "--processes=1e3", "--process",
    "--hosts=one", "--hosts", "--undefok=lr", "--undefok", "--flagfile=", "--flagfile", "--lr 1",
    "--noconfig.parity", "--noconfig.optim.lr", "--noconfig.", "--config.parity", "--config",
    "--config=", "--workdir=", "-workdir", "--config.", "-=3", "--=", "--no", "--flagfile=/",
)  # fmt: skip


def test_random_command_lines_never_end_in_a_traceback(file):
    """1,500 odd ones: each is accepted, or refused with a short, printable message."""
    drawn, refused = random.Random(0), 0
    for _ in range(1500):
        groups = [[f"--config={file}"], ["--workdir=w"]]
        for _ in range(drawn.randint(1, 3)):
            form, field, value = map(drawn.choice, (FORMS, FIELDS, VALUES))
            if drawn.random() < 0.5:  # often a valid choice
                form, field, value = FORMS[drawn.randrange(4)], drawn.choice(TEXTS), "None"
            text = form.format(field, value) if drawn.random() < 0.8 else drawn.choice(OTHERS)
            groups.append([part for part in text.split(" ", 1) if part])
        drawn.shuffle(groups)
        argv = ["run", *itertools.chain(*groups)]
        try:
            config = app.read_config(argv)
        except (ValueError, OSError) as error:
            refused += 1
            message = str(error)
            assert 0 < len(message) < 2000, argv
            assert re.sub(r"[\ud800-\udfff]", "", message).isprintable(), argv
        else:
            assert isinstance(config, ml_collections.ConfigDict), argv
    assert 300 < refused < 1200  # both happen often


def test_set_field_parses_values_like_flags(file):
    config = read_config_file(str(file))
    set_field(config, "model.depths", "6,6")
    set_field(config, "run.best", "None")
    assert config.model.depths == (6, 6) and config.run.best is None


def test_run_starts_and_warns_about_flags_it_does_not_read(file, capsys):
    called = []
    argv = ["run", f"--config={file}:one", "--workdir=w", "--config.optim.lr=2"]
    main = lambda config, workdir: called.append(config.optim.lr)  # noqa: E731
    app.run(main, "", argv)
    system = System("this", field="phase")
    app.run(main, "", argv, system=system)
    assert "changes nothing" not in capsys.readouterr().err
    app.run(main, "", argv, system=system, reads={"one": ("model",), "two": ("optim",)})
    assert (
        "--config.optim.lr changes nothing: phase='one' does not read it" in capsys.readouterr().err
    )
    assert called == [2.0] * 3


def test_epochs_replaced_by_updates_give_a_warning(capsys):
    config = "--config=m2mkd/cifar10_vmoe.py:phase=end_to_end"
    argv = ["run", config, "--workdir=w", "--config.optim.epochs=5"]
    app.run(lambda config, workdir: None, "", argv)
    said = "--config.optim.epochs changes nothing: config.optim.steps=390 is used in its place"
    assert said in capsys.readouterr().err


def test_only_the_length_in_use_is_said_to_have_no_effect(capsys):
    flags = ("optim.warmup_epochs=1", "optim.warmup_steps=3", "optim.schedule=epoch_cosine")
    config = "--config=m2mkd/cifar10_vmoe.py:phase=end_to_end"
    argv = ["run", config, "--workdir=w", *(f"--config.{flag}" for flag in flags)]
    app.run(lambda config, workdir: None, "", argv)
    assert "warmup_epochs changes nothing" not in capsys.readouterr().err
    app.run(lambda config, workdir: None, "", [*argv, "--config.optim.schedule=warmup_cosine"])
    assert "warmup_epochs changes nothing: config.optim.warmup_steps=3" in capsys.readouterr().err


def test_project_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m2mkd/digits.py", "configs/m2mkd/digits.py"):
        assert read_config_file(f"{name}:phase=distill").phase == "distill"
    with pytest.raises(ValueError, match=r"\(.*/m2mkd/digits\.py, line \d+\)$"):
        read_config_file("m2mkd/digits.py:fase=distill")
    # A file of that name in the working directory takes precedence.
    (tmp_path / "m2mkd").mkdir()
    (tmp_path / "m2mkd" / "digits.py").write_text(CONFIG)
    assert "parity" in read_config_file("m2mkd/digits.py")


def test_help_with_a_config_shows_its_arguments(capsys):
    with pytest.raises(SystemExit):
        app.read_config(["tool", "--config=m2mkd/vmoe_base.py:size=base", "--help"])
    out = capsys.readouterr().out
    assert "m2mkd/vmoe_base.py:size=base:\n" in out and "Defaults: phase=pipeline, module=" in out
