"""Programs with several commands: `dispatch`, and how fast they respond."""

import dataclasses
import subprocess
import sys
from typing import Annotated

import pytest

import cliptrans_jax.commands
import m2mkd_jax.commands
from common_jax.command_line import Command, dispatch, read_settings
from common_jax.commands.field_docs import list_fields
from common_jax.commands.output import check_npz, format_table
from common_jax.commands.show import format_field
from common_jax.ranges import key_of, one_of


def add_arguments(parser):
    parser.add_argument("place")


def run(args):
    if args.place == "nowhere":
        raise FileNotFoundError("nowhere does not exist")
    if args.place == "bug":
        raise TypeError("a bug")
    print(args.place, *args.rest)
    return 3 if args.place == "three" else None


def refuse(args):
    raise FileNotFoundError(args.rest[0])


COMMANDS = {
    "pass": Command("pass arguments on", lambda parser: None, refuse, ("",)),
    "look": Command("look at a place", add_arguments, run, ("--config.",)),
    "all": Command("take anything", lambda parser: None, lambda args: len(args.rest), ("",)),
}


def call(*argv):
    return dispatch("tool", COMMANDS, argv)


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",), ("help",)])
def test_help_lists_the_commands(argv, capsys):
    assert call(*argv) == 0
    assert "  look  look at a place\n" in capsys.readouterr().out


def test_arguments_are_parsed_or_passed_through(capsys):
    assert call("look", "--config.a=1", "here", "--config.b=x y") == 0
    assert capsys.readouterr().out == "here --config.a=1 --config.b=x y\n"
    assert call("look", "three") == 3
    assert call("all", "--help", "--debug", "x") == 3


def test_user_error_prints_one_line_and_returns_2(capsys):
    assert call("look", "nowhere") == 2
    assert capsys.readouterr().err == "error: nowhere does not exist\n"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        call("look", "nowhere", "--debug")
    with pytest.raises(TypeError, match="a bug"):
        call("look", "bug")
    assert call("pass", "on") == 2
    with pytest.raises(FileNotFoundError, match="on"):
        call("pass", "on", "--debug")  # the command itself may read this flag too


def test_unknown_command_error_suggests_the_nearest(capsys):
    assert call("lok") == 2
    assert (
        "no command 'lok' (did you mean 'look'?); it has pass, look, all" in capsys.readouterr().err
    )


def test_read_settings_splits_paths_and_values():
    assert read_settings(["--config.data.path=/x=y", "--data.name=a"]) == {
        "data.path": "/x=y",
        "data.name": "a",
    }
    with pytest.raises(ValueError, match=r"--config\.seed lacks a value"):
        read_settings(["--config.seed"])


def test_table_columns_fit_their_cells():
    lines = format_table(("name", "images"), [("a", 1), ("long name", 200)]).splitlines()
    assert lines == ["name       images", "a               1", "long name     200"]


def test_npz_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "a.npz").mkdir()
    assert check_npz(f"{tmp_path}/b.npz") == tmp_path / "b.npz"
    with pytest.raises(ValueError, match=r"^--out=b must be a name that ends in \.npz"):
        check_npz("b")
    with pytest.raises(IsADirectoryError, match=r"^--out='.*/a\.npz' cannot be written"):
        check_npz(f"{tmp_path}/a.npz")
    with pytest.raises(FileNotFoundError, match=r"^--out='.*/c/b\.npz' cannot be written"):
        check_npz(f"{tmp_path}/c/b.npz")


@pytest.mark.parametrize("package", [m2mkd_jax, cliptrans_jax])
def test_export_checks_its_output_before_it_reads_the_run(package, tmp_path, capsys):
    (tmp_path / "file").touch()
    argv = ["export", "/nowhere", f"{tmp_path}/file/out"]
    assert dispatch("program", package.commands.COMMANDS, argv) == 2
    assert capsys.readouterr().err.startswith(f"error: OUT='{tmp_path}/file/out' cannot be made")


@pytest.mark.parametrize(
    ("package", "command", "flag", "least"),
    [
        (m2mkd_jax, "evaluate RUN", "batch", 1),
        (m2mkd_jax, "evaluate RUN", "worst", 1),
        (m2mkd_jax, "evaluate RUN", "module", 0),
        (m2mkd_jax, "predict RUN PICTURE", "batch", 1),
        (m2mkd_jax, "predict RUN PICTURE", "top", 1),
        (m2mkd_jax, "predict RUN PICTURE", "module", 0),
        (m2mkd_jax, "features RUN PICTURE --out=x.npz", "batch", 1),
        (m2mkd_jax, "features RUN PICTURE --out=x.npz", "size", 1),
        (m2mkd_jax, "features RUN PICTURE --out=x.npz", "stage", 0),
        (m2mkd_jax, "export RUN OUT", "module", 0),
        (cliptrans_jax, "translate RUN red", "beams", 1),
        (cliptrans_jax, "translate RUN red", "n-best", 1),
        (cliptrans_jax, "translate RUN red", "batch", 1),
    ],
)
def test_number_out_of_range_is_refused(package, command, flag, least, capsys):
    for text in (str(least - 1), "-7", "x", "1.5", "", "9" * 5000):
        with pytest.raises(SystemExit) as end:
            dispatch("program", package.commands.COMMANDS, [*command.split(), f"--{flag}={text}"])
        assert end.value.code == 2
        expected = f"argument --{flag}: {text[:100]!r} must be a whole number from {least} to"
        assert expected in capsys.readouterr().err
    argv = [*command.split(), f"--{flag}={least}"]
    assert dispatch("program", package.commands.COMMANDS, argv) == 2
    assert capsys.readouterr().err.startswith("error: ")  # of what follows: nothing is named RUN


@pytest.mark.parametrize("package", ["m2mkd_jax", "cliptrans_jax"])
def test_listing_commands_does_not_import_jax(package):
    code = (
        f"import sys; from {package}.commands import main; sys.argv = ['x', '--help']; main(); "
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\n  train " in done.stdout and "\n  evaluate " in done.stdout


TABLE = {"adamw": 1}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A config.

    way: how it is done.
    """

    way: Annotated[str, key_of(lambda: TABLE)] = "adamw"
    order: Annotated[int, one_of(1, 2)] | None = None
    only: Annotated[str, one_of("vit")] = "vit"


def test_choices_of_a_field_follow_its_table(monkeypatch):
    monkeypatch.setitem(TABLE, "lion", 2)
    assert [format_field(field) for field in list_fields(Chosen())] == [
        "config.way = 'adamw'\n    how it is done. One of 'adamw', 'lion'.",
        "config.order = None\n    One of 1, 2.",
        "config.only = 'vit'",
    ]
