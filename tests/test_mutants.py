"""The list of mistakes fits the code, and the tool that makes them judges correctly."""

import ast
import dataclasses
import subprocess

import mutants
import pytest
from mistakes import MISTAKES
from mistakes.mistake import Mistake

LENGTH = Mistake(
    file="lengths.py",
    what="a length counts one too many",
    right="return len(text)",
    wrong="return len(text) + 1",
    tests="test_lengths.py::test_a_length",
)


@pytest.fixture
def project(tmp_path):
    """A repository with one function and two tests, one of which asserts nothing."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "lengths.py").write_text("def measure(text):\n    return len(text)\n")
    (root / "test_lengths.py").write_text(
        "from lengths import measure\n\n\n"
        "def test_a_length():\n    assert measure('abc') == 3\n\n\n"
        "def test_a_call():\n    measure('abc')\n"
    )
    subprocess.run(("git", "init", "--quiet"), cwd=root, check=True)
    return root


def outcomes(project, tmp_path, *mistakes, jobs=1):
    results = mutants.Results(tmp_path / "results.jsonl")
    return {one.what: x for one, x in mutants.try_all(mistakes, project, results, jobs)}


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_every_mistake_applies(number):
    mistake = MISTAKES[number]
    assert mutants.fault(mistake, mutants.ROOT) == ""
    text = (mutants.ROOT / mistake.file).read_text()
    wrong = ast.parse(text.replace(mistake.right, mistake.wrong))
    assert ast.dump(wrong) != ast.dump(ast.parse(text))  # not in a comment


def test_mistakes_are_many_and_distinct():
    assert len(MISTAKES) >= 120
    assert len({(x.file, x.right, x.wrong) for x in MISTAKES}) == len(MISTAKES)
    assert len({(x.file, x.what) for x in MISTAKES}) == len(MISTAKES)


def test_mistake_is_noticed_by_its_failing_test_or_by_none(project, tmp_path):
    unseen = dataclasses.replace(LENGTH, what="unseen", tests="test_lengths.py::test_a_call")
    broken = dataclasses.replace(LENGTH, what="broken", wrong="return (")
    found = outcomes(project, tmp_path, LENGTH, unseen, broken)
    assert found.pop("broken").kind == "broken"
    assert found == {
        LENGTH.what: mutants.Outcome("noticed", "test_lengths.py::test_a_length"),
        "unseen": mutants.Outcome("passed"),
    }
    assert "return len(text)\n" in (project / "lengths.py").read_text()


def test_tests_that_fail_without_the_mistake_notice_nothing(project, tmp_path):
    (project / "lengths.py").write_text("def measure(text):\n    return len(text)  # or\n")
    (project / "test_lengths.py").write_text("def test_a_length():\n    assert False\n")
    (found,) = outcomes(project, tmp_path, LENGTH).values()
    assert found.kind == "broken" and "fails without the mistake" in found.detail


def test_mistake_is_retried_only_after_a_change(project, tmp_path, monkeypatch):
    calls = []
    run = mutants.Copy.run

    def counted(self, tests):
        calls.append(tests)
        return run(self, tests)

    monkeypatch.setattr(mutants.Copy, "run", counted)
    first = outcomes(project, tmp_path, LENGTH)
    assert len(calls) == 2 and outcomes(project, tmp_path, LENGTH) == first
    assert len(calls) == 2
    with (project / "test_lengths.py").open("a") as file:
        file.write("\n\ndef test_nothing():\n    assert True\n")
    assert outcomes(project, tmp_path, LENGTH) == first
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "gone.py"}, "gone.py does not exist"),
        ({"right": "return size"}, "occurs 0 times in lengths.py and must occur once"),
        ({"right": "t"}, "times in lengths.py"),
        ({"wrong": LENGTH.right}, "right and wrong are the same"),
        ({"tests": "test_lengths.py::test_gone"}, "there is no test test_lengths.py::test_gone"),
        ({"tests": "test_gone.py"}, "there is no test test_gone.py"),
        ({"tests": ""}, "no tests are named"),
    ],
)
def test_invalid_entry_is_reported(project, change, said):
    assert said in mutants.fault(dataclasses.replace(LENGTH, **change), project)


def test_run_passes_if_unnoticed_mistakes_are_few_and_explained():
    explained = dataclasses.replace(LENGTH, equivalent="nobody sees it")
    noticed, passed = mutants.Outcome("noticed", "test"), mutants.Outcome("passed")
    most = [(LENGTH, noticed)] * 19
    assert mutants.summary([*most, (explained, passed)])[1]
    assert not mutants.summary([*most, (LENGTH, passed)])[1]
    assert not mutants.summary([*most[1:], *[(explained, passed)] * 2])[1]
    assert not mutants.summary([*most, (LENGTH, mutants.Outcome("broken"))])[1]
    assert not mutants.summary([])[1]
