"""docs/performance.md shows the results of all benchmarks, and what they were measured with."""

import importlib
import json
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PERFORMANCE = ROOT / "docs" / "performance.md"
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


def miss(claim, peer, **changes):
    return CLAIM | {"claim": claim, "peer": peer, "ratio": 0.9, "target": 1.0} | changes


def test_reasons_for_misses_are_those_of_the_peer_and_agree_with_the_figures(run_all):
    vit, beams = "training step of a dense ViT", "beam search of mBART"
    unknown = "not been investigated"

    def reason(benchmark, claim, peer, processor):
        claims = [miss(claim, peer, processor=processor)]
        (paragraph,) = run_all.misses([result(benchmark, claims=claims)])
        return paragraph

    assert "In CPU time, the ratio is above 1." in reason("vit_step", vit, "torch", 1.05)
    for processor in (0.8, 1.0, None):
        assert unknown in reason("vit_step", vit, "torch", processor)
    assert "In CPU time" not in reason("vit_step", vit, "torch", 0.8)
    assert unknown in reason("decode", beams, "torch", 1.0)
    assert "GFLOP" not in reason("decode", beams, "torch", 1.0)
    for processor, same in ((1.0, True), (0.8, False), (None, False)):
        text = reason("decode", beams, "CTranslate2", processor)
        assert "636 GFLOP" in text and ("the same CPU time" in text) == same


def page_rows():
    """The cells of each row of docs/performance.md."""
    for line in PERFORMANCE.read_text().splitlines():
        if line.startswith("|") and "../benchmarks/" in line:
            yield line, [cell.strip() for cell in line.split("|")[1:-1]]


def page_claims():
    """The claims of docs/performance.md by benchmark, as far as its rows show them."""
    claims = {}
    for _, (claim, peer, ratios, processor, repeats, threads, _, target, _, link) in page_rows():
        ratio, low, high = map(float, re.findall(r"[\d.]+", ratios)) if ratios else 3 * (None,)
        shown = {"claim": claim, "peer": peer, "ratio": ratio, "low": low, "high": high}
        shown["processor"] = float(processor) if processor else None
        shown |= {"repeats": int(repeats), "threads": int(threads)}
        shown["target"] = float(target) if target else None
        claims.setdefault(link.split("]")[0][1:], []).append(shown)
    return claims


def test_rows_of_the_page_are_those_that_the_tool_writes(run_all):
    claims = page_claims()
    for line, cells in page_rows():
        name = cells[-1].split("]")[0][1:]
        shown = result(name, claims=[claims[name].pop(0)], load_before=float(cells[6]))
        assert run_all.rows(shown) == [line]


def test_every_reason_is_of_a_claim_on_the_page(run_all):
    claims = page_claims()
    found = {(name, x["claim"], x["peer"]) for name, rows in claims.items() for x in rows}
    assert set(run_all.REASONS) <= found


def test_page_gives_the_reasons_that_the_tool_would_write(run_all):
    results = [result(name, claims=claims) for name, claims in page_claims().items()]
    paragraphs = [run_all.fill(text) for text in run_all.misses(results)]
    section = PERFORMANCE.read_text().split("## Claims that miss their target\n\n")[1]
    assert section.startswith("\n\n".join(paragraphs) + "\n\n## ")


def test_page_has_the_head_and_the_notes_of_the_tool(run_all):
    text = PERFORMANCE.read_text()
    assert text.startswith(run_all.HEADER) and text.endswith(run_all.NOTES.read_text())


def test_page_states_the_versions_and_processor_that_each_benchmark_ran_with(run_all, monkeypatch):
    common = {"processor": "EPYC", "cores": 2, "Python": "3.11.7", "jax": "0.10.2", "torch": "2.14"}
    machines = {
        "moe_layer": common,
        "decode": common | {"torch": "2.13", "processor": "Xeon"},
        "vit_step": common | {"torch": None, "jax": "0.10.3"},
        "corpus": common | {"torch": "2.13", "jax": "0.10.3"},
        "checkpoint": common,
    }
    monkeypatch.setattr(run_all, "VERSIONS", ("jax", "torch"))
    results = [result(name, machine=values) for name, values in machines.items()]
    assert run_all.machine(results) == (
        "Machine: EPYC (decode: Xeon), 2 cores, no accelerator. Python 3.11.7, jax 0.10.2 "
        "(vit_step, corpus: 0.10.3), torch 2.14 (decode, corpus: 2.13; vit_step: not installed). "
        "2 minutes."
    )
    (older,) = [result("decode")]
    assert "torch 2.14 (decode: not recorded)" in run_all.machine([*results[:1], older])


def test_result_has_the_versions_and_processor(run_all, monkeypatch):
    line = json.dumps({"benchmark": "decode", "claims": [CLAIM], "seconds": {}})
    (run_all.ROOT / "benchmarks" / "decode.py").write_text(f"print({line!r})")
    monkeypatch.setattr(run_all, "VERSIONS", ("jax", "no-such-package"))
    found = run_all.run("decode", ("--threads", "2"))["machine"]
    assert found["jax"] == jax.__version__ and found["no-such-package"] is None
    assert found["processor"] and found["cores"] > 0 and found["Python"].startswith("3.")
