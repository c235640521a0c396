"""A sample of what `make fuzz` tries: corrupted and forged files are read correctly or refused."""

import dataclasses
import json

import fuzz
import pytest
from fuzz_formats import FORMATS

COUNT = 100
COSTLY = {"prior npz": 10}  # every broken cache is rebuilt


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:Corrupt EXIF", "ignore:Truncated File")
@pytest.mark.parametrize("name", FORMATS)
def test_mutated_files_are_read_correctly_or_refused(tmp_path, name):
    form = FORMATS[name]()
    form.prepare(tmp_path)
    for sample in form.samples:
        (tmp_path / form.file).write_bytes(sample)
        assert form.agree(form.read(tmp_path / form.file), form.plain(tmp_path / form.file, sample))
    results = [fuzz.try_mutant(form, tmp_path, 1, n) for n in range(COSTLY.get(name, COUNT))]
    assert [r for r in results if r.outcome == "wrong"] == []
    assert "refused" in {r.outcome for r in results}


def test_seed_and_number_identify_a_mutant():
    one, same = (FORMATS["config.json"]() for _ in "ab")
    assert fuzz.make_mutant(one, 0, 3) == fuzz.make_mutant(same, 0, 3)
    assert fuzz.make_mutant(one, 0, 3) != fuzz.make_mutant(one, 1, 3)


def careless(read):
    """A format with the given reading function."""
    return dataclasses.replace(FORMATS["config.json"](), read=read)


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (lambda path: json.loads(path.read_bytes()), "without the file's name"),
        (lambda path: json.loads(path.read_bytes())["seed"], "KeyError|TypeError|file's name"),
        (lambda path: json.loads(FORMATS["config.json"]().samples[0]) | {"seed": 5}, "read as"),
    ],
)
def test_careless_readers_are_caught(tmp_path, read, why):
    form = careless(read)
    results = [fuzz.try_mutant(form, tmp_path, 0, number) for number in range(30)]
    wrong = [result.detail for result in results if result.outcome == "wrong"]
    assert any(word in detail for detail in wrong for word in why.split("|"))
