"""docs/performance.md shows the results of all benchmarks, and what they were measured with."""

import importlib
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CLAIM = {
    "claim": "MoE layer",
    "peer": "dense MLP",
    "ratio": 0.8,
    "low": 0.7,
    "high": 0.9,
    "processor": 0.8,
    "repeats": 9,
    "target": 0.67,
}


@pytest.fixture
def run_all(monkeypatch, tmp_path):
    """The tool, in a folder of its own, with two benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tool = importlib.import_module("run_all")
    for folder in ("benchmarks", "docs"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "PAGE", tmp_path / "docs" / "performance.md")
    monkeypatch.setattr(tool, "BENCHMARKS", (("moe_layer", ()), ("decode", ())))
    tool.PAGE.write_text("the page\n")
    return tool


def result(name, **changes):
    made = {"benchmark": name, "claims": [CLAIM], "flags": ["--threads", "2"]}
    return made | {"load_before": 1.0, "took": 30.0} | changes


def start(tool, monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["run_all.py", "--results", str(tool.ROOT / "bench"), *flags])
    tool.main()


def test_page_is_not_written_without_the_results_of_all_benchmarks(run_all, monkeypatch):
    ran = []
    monkeypatch.setattr(run_all, "run", lambda name, flags: ran.append(name) or result(name))
    with pytest.raises(SystemExit, match=r"no result of decode.*without --only"):
        start(run_all, monkeypatch, "--only", "moe_layer")
    stored = run_all.ROOT / "bench"
    stored.mkdir()
    (stored / "decode.json").write_text(json.dumps(result("decode", claims=[], error="failed")))
    with pytest.raises(SystemExit, match=r"no result of decode.*without --only"):
        start(run_all, monkeypatch, "--only", "moe_layer")
    assert ran == [] and run_all.PAGE.read_text() == "the page\n"
    start(run_all, monkeypatch)
    assert ran == ["moe_layer", "decode"]
    start(run_all, monkeypatch, "--only", "decode")
    assert ran == ["moe_layer", "decode", "decode"]
    rows = [line for line in run_all.PAGE.read_text().splitlines() if line.startswith("| MoE")]
    assert [row.split("(")[-1] for row in rows] == [
        f"../benchmarks/{name}.py) |" for name in ("moe_layer", "decode")
    ]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "moe_layer ended with status 3"),
        ("import time\ntime.sleep(60)", "moe_layer took more than 1 seconds"),
    ],
)
def test_failing_benchmark_keeps_its_earlier_result(run_all, monkeypatch, code, message):
    (run_all.ROOT / "benchmarks" / "moe_layer.py").write_text(code)
    monkeypatch.setattr(run_all, "LIMIT", 1 if "sleep" in code else 60)
    stored = run_all.ROOT / "bench"
    stored.mkdir()
    for name, _ in run_all.BENCHMARKS:
        (stored / f"{name}.json").write_text(json.dumps(result(name)))
    before = (stored / "moe_layer.json").read_text()
    with pytest.raises(SystemExit, match=message):
        start(run_all, monkeypatch, "--only", "moe_layer")
    assert (stored / "moe_layer.json").read_text() == before
    assert run_all.PAGE.read_text().count("| MoE layer |") == 2


def test_page_is_left_as_it_is_if_a_benchmark_fails_without_an_earlier_result(run_all, monkeypatch):
    (run_all.ROOT / "benchmarks" / "moe_layer.py").write_text("raise SystemExit(3)")
    line = json.dumps({"benchmark": "decode", "claims": [CLAIM], "seconds": {}})
    (run_all.ROOT / "benchmarks" / "decode.py").write_text(f"print({line!r})")
    with pytest.raises(SystemExit, match=r"status 3.*no result of moe_layer"):
        start(run_all, monkeypatch)
    assert run_all.PAGE.read_text() == "the page\n"
    assert [path.name for path in (run_all.ROOT / "bench").iterdir()] == ["decode.json"]
