"""Benchmarks still fit the code that they time: they are built at tiny sizes, without timing.

`make bench` runs them all, but needs half an hour and PyTorch.
"""

import argparse
import importlib
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from flax import traverse_util

from common_jax import checkpoint
from common_jax.commands.plan.flops import Flops, count_flops
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac import model

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a benchmark the way the other files in its folder do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_vmoe_block_matches_the_textbook_block():
    sizes = {"examples": 2, "tokens": 4, "width": 8, "heads": 1, "hidden": 8, "experts": 2}
    flags = [f"--{name}={size}" for name, size in (sizes | {"groups": 2, "chosen": 1}).items()]
    command = [sys.executable, BENCHMARKS / "vmoe_block.py", "--repeats=5", "--threads=1", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {claim["peer"] for claim in result["claims"]} == {"textbook block", "textbook layer"}


def test_results_and_losses_that_differ_or_are_not_numbers_fail(load):
    timing, right = load("timing"), {"x": np.ones(2), "y": np.full(3, 4.0), "z": np.zeros(1)}
    close = right | {"x": np.asarray([1, 1 + 1e-6])}
    assert timing.check_results(close, right, 1e-4) == pytest.approx(1e-6, rel=0.1)
    changes = {"x": np.asarray([1, 1.1])}, {"y": np.asarray([4, 4, np.nan])}, {"x": np.ones(1)}
    for change in changes:
        with pytest.raises(AssertionError, match="differ"):
            timing.check_results(right | change, right, 1e-4)
    with pytest.raises(AssertionError, match="losses differ"):
        cases = {"ours": 1.0, "close": 1.0, "not a number": np.nan}
        timing.check_losses({name: lambda x=x: x for name, x in cases.items()}, 1e-4)


SMALL = {
    "nac_read_in": "--receivers 3 --tokens 5 --token-width 4 --head-width 2 --large 1 2 3",
    "moe_layer": "--experts 2 --width 4 --hidden 8 --examples 1 --tokens 8",
    "checkpoint": "--large 1 --small 1",
}


def zeros(shape):
    return np.zeros(shape.shape, shape.dtype)


@pytest.mark.parametrize("name", SMALL)
def test_wrong_results_are_not_timed(load, monkeypatch, name):
    benchmark = load(name)
    wrong = {
        "nac_read_in": ("pool_tokens", lambda *_: 2 * benchmark.naive.pool_tokens(*_)),
        "moe_layer": ("grouped_mlp", lambda x, *_: jax.numpy.ones_like(x)),
        "checkpoint": ("Checkpoints.restore_latest", lambda _, state: jax.tree.map(zeros, state)),
    }
    target, replacement = wrong[name]
    monkeypatch.setattr(f"{name}.{target}", replacement)
    timed = []
    monkeypatch.setattr(benchmark.timing, "start", lambda *_, **__: None)
    monkeypatch.setattr(benchmark.timing, "seconds_of", lambda *_: timed.append(_))
    monkeypatch.setattr(sys, "argv", [name, *SMALL[name].split()])
    with pytest.raises(AssertionError, match=r"results differ|not restored"):
        benchmark.main()
    assert not timed


def test_other_ids_than_the_peers_fail(load, capsys):
    corpus, words = load("corpus"), ["a b", "b a b", "c"]
    model = tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>")
    peer = tokenizers.Tokenizer(model)
    peer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = {"bpe": [[1, 2], [2, 1, 2], [0]], "unigram": [[2, 3], [3, 2, 3], [3]]}
    for name, ids in rows.items():
        flat, lengths = [], []
        for row in ids:
            flat += [9, *row, 2]
            lengths.append(len(row) + 2)
        ours = corpus.Ragged.of(np.asarray(flat, np.int32), np.asarray(lengths))
        corpus.check_ids(name, ours, corpus.encode_parts(peer, words))
        assert "100.00%" in capsys.readouterr().out
        other = "unigram" if name == "bpe" else "bpe"
        with pytest.raises(AssertionError, match="have the peer's ids"):
            corpus.check_ids(other, ours, corpus.encode_parts(peer, words))


def test_other_translations_end_the_beam_search_benchmark(load, capsys):
    check = load("decode").check_equal
    check({"torch": 20, "CTranslate2": 19, "CTranslate2, int8": 3}, 20)
    assert "equal to CTranslate2: 19 of 20\n" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="translations differ"):
        check({"torch": 20, "CTranslate2": 18}, 20)


def test_mbart_training_step_has_a_positive_loss(load):
    mbart_step, decode = load("mbart_step"), load("decode")
    sizes = argparse.Namespace(batch=2, vocab=50, width=8, layers=1, heads=2)
    translator, params = decode.make_model(sizes)
    batch = mbart_step.make_batch(sizes, translator.config.mbart)
    step = mbart_step.training_step(translator, params, batch, dropout=0.1)
    assert float(step()) > 0


def test_nac_step_receives_all_its_random_numbers(load):
    nac_step, (config, side, labels) = load("nac_step"), model.preset("tinyimagenet")
    network = model.build(config, Interface(side, 3, labels), drop_path=nac_step.DROP_PATH)
    noise = traverse_util.unflatten_dict(nac_step.make_noise(config, 2), sep="/")

    def logits(images, noise):
        # Without keys, draws that are missing or have the wrong shape raise an error.
        params = network.init(jax.random.key(0))
        return network.apply(params, images, train=True, noise=noise)[0]

    images = jax.ShapeDtypeStruct((2, side, side, 3), "float32")
    assert jax.eval_shape(logits, images, noise).shape == (2, labels)


def test_nac_peers_are_skipped_without_torch(load, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    sizes = argparse.Namespace(dtype="float32", threads=1)
    assert load("nac_step").make_peers(sizes, model.NacConfig(), {}, {}, {}) == {}
    assert capsys.readouterr().out.startswith("skipping torch: import of torch halted")


def test_untrained_distillation_sources_are_found(load, tmp_path):
    all_pairs = load("all_pairs")
    config = all_pairs.load("configs/m2mkd/digits.py", {})
    all_pairs.save_helpers(config, tmp_path)
    for role in ("meta", "teacher"):
        params = checkpoint.load(tmp_path / role, subtree=role)
        assert sorted(params) == [f"stage_{stage}" for stage in range(len(config.meta.depths))]


def test_run_starts_on_a_large_corpus(load, tmp_path, capsys):
    corpus = load("corpus")
    sentences = corpus.base_sentences(None)
    corpus.write_unigram(tmp_path / "unigram", sentences["de"])
    corpus.write_corpus(tmp_path, sentences, 2 * len(sentences["en"]))
    lines = {(tmp_path / "wmt_en_de" / f"train.{code}").read_text() for code in ("en", "de")}
    assert [text.count("\n") for text in lines] == [2 * len(sentences["en"])] * 2
    corpus.start_run(str(tmp_path), str(tmp_path / "run"))
    started = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert started["processor"] > 0 and started["all"] >= 0
    peer = corpus.peer_of_unigram(tmp_path / "unigram" / "sentencepiece.bpe.model")
    assert peer.encode(sentences["de"][0]).ids


def test_gpu_cases_match_their_files(load):
    cases = load("gpu").CASES
    for file in sorted({case.file for case in cases.values()}):
        listed = {name for name, case in cases.items() if case.file == file}
        assert set(load(file).CASES) == listed, file


def test_nothing_is_measured_without_a_gpu(load, monkeypatch, tmp_path):
    gpu, out = load("gpu"), tmp_path / "out"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(sys, "argv", ["gpu.py", f"--out={out}"])
    with pytest.raises(SystemExit, match=r"no NVIDIA GPU; its device is 'cpu'.*add --tiny"):
        gpu.main()
    assert not out.exists()


def test_ceilings_run_at_small_sizes(load, monkeypatch, tmp_path):
    gpu = load("gpu")
    monkeypatch.setattr(sys, "argv", f"gpu.py --tiny --only ceiling --out {tmp_path}".split())
    gpu.main()
    machine, *results = json.loads((tmp_path / "results.json").read_text())
    assert machine["card"] == "cpu"
    before = json.loads((BENCHMARKS / "h200.json").read_text())
    cases = [result["case"] for result in before if result["of"] == "ceiling"]
    assert [result["case"] for result in results] == cases
    assert all(result["ms"] > 0 for result in results if "ms" in result)


def test_attention_counts_the_flops_of_values_and_gradients(load):
    layers = load("gpu_layers")
    for shape in layers.SHAPES.values():
        small = shape._replace(batch=2, tokens=6, heads=3)
        whole = small.batch, small.tokens, small.heads, small.width
        operands = [layers.normal(seed, *whole) for seed in range(4)]
        if small.visible in ("each", "shared"):
            operands.append(layers.log_affinities(small))
        run = layers.with_gradients(layers.attend(small, "xla"))
        assert count_flops(run, *operands) == Flops(model=layers.attention_flops(small))


def test_rates_of_the_h200_are_those_of_the_cases(load):
    layers = load("gpu_layers")
    product = layers.MoeSizes().product_flops
    wanted = dict.fromkeys(("moe_layer", "moe_torch"), 6 * product) | {"ceiling": 2 * 8192**3}
    rates = 0
    for result in json.loads((BENCHMARKS / "h200.json").read_text()):
        case, part = result["case"], result["of"]
        if "tflops" not in result or part not in (*wanted, "attention"):
            continue
        if part == "attention":
            name, _, _ = case.removeprefix("attention_").rpartition("_")
            flops = layers.attention_flops(layers.SHAPES[name])
        else:
            flops = product if "gmm_" in case else wanted[part]
        assert result["tflops"] * result["ms"] * 1e9 == pytest.approx(flops), case
        rates += 1
    assert rates == 28


def test_case_that_takes_too_long_is_reported(load, tmp_path):
    gpu = load("gpu")
    log = tmp_path / "ceiling.log"
    (result,) = gpu.run("ceiling", log, gpu.environment(tiny=True), tiny=True, limit=0.01)
    assert result["of"] == "ceiling" and result["failed"]
    assert result["error"].startswith("took more than 0 seconds")


def test_failing_peer_is_reported_and_left_out(load, capsys):
    in_turns = load("input_pipeline").in_turns
    turns = []

    def timm():
        turns.append(len(turns))
        if len(turns) == 3:
            raise ValueError("no bits")
        return 1.0

    rates = in_turns({"ours": lambda: 2.0, "timm": timm}, 4)
    assert rates == {"ours": [2.0] * 4} and len(turns) == 3
    assert "skipping timm: ValueError: no bits" in capsys.readouterr().out
    with pytest.raises(ZeroDivisionError):
        in_turns({"ours": lambda: 1 / 0}, 1)


def test_input_pipeline_limits_its_threads_before_anything_is_timed(load, monkeypatch):
    pipeline, calls = load("input_pipeline"), []
    monkeypatch.setattr(pipeline.timing, "start", lambda threads: calls.append(threads))
    monkeypatch.setattr(pipeline, "make_images", lambda *_: None)
    monkeypatch.setattr(pipeline, "measure", lambda *_: calls.append("measured"))
    monkeypatch.setattr(sys, "argv", ["input_pipeline.py", "--threads", "1"])
    pipeline.main()
    assert calls == [1, "measured"]


def test_every_benchmark_limits_its_threads(load):
    for name, _ in load("run_all").BENCHMARKS:
        assert "timing.start(" in (BENCHMARKS / f"{name}.py").read_text(), name


def test_input_pipeline_reports_both_clocks_and_the_threads_of_one_thread(
    load, monkeypatch, capsys
):
    pipeline = load("input_pipeline")
    monkeypatch.setattr(pipeline, "in_memory", lambda count: 1.0)
    alone = {"ours, one thread": [0.25, 0.125], "PIL, one thread": [0.375, 0.0625]}
    alone["PIL, decoding alone"] = [0.25, 0.03125]
    # Processes that are still running have no CPU time.
    workers = {"ours": [0.25, np.nan], "PIL": [0.125, np.nan], "timm": [0.5, np.nan]}
    seconds = alone | workers | {"step": [2.5, 3.0]}
    sizes = argparse.Namespace(images=8, side=8, workers=2, small=8)
    pipeline.report(sizes, {name: 5 * [np.asarray(x)] for name, x in seconds.items()}, 2)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["images_per_second"]["ours, one thread"] == [4.0] * 5
    assert found["decoding_share"] == 0.5
    claims = {claim["peer"]: claim for claim in found["claims"]}
    one = claims.pop("PIL, one thread")
    assert (one["ratio"], one["processor"], one["threads"]) == (1.5, 0.5, 1)
    assert {peer: claim["ratio"] for peer, claim in claims.items()} == {
        "PIL": 0.5,
        "step": 10.0,
        "timm": 2.0,
    }
    assert not any(claim["processor"] or "threads" in claim for claim in claims.values())


STAND_IN = """
import os, sys
kept = "GLIBC_TUNABLES" in os.environ
for number, _ in enumerate(sys.stdin):
    print(2.5 - number, *((1, 2) if kept else (3, 3)), flush=True)
"""


def test_kept_memory_steps_are_compared_with_default_ones(load, tmp_path, monkeypatch):
    kept_memory, stand_in = load("kept_memory"), tmp_path / "steps.py"
    stand_in.write_text(STAND_IN)
    monkeypatch.setattr(kept_memory, "__file__", str(stand_in))
    flags = argparse.Namespace(threads=1, batch=2, repeats=5)
    claim, times = kept_memory.compare("NAC", flags)
    assert (claim["ratio"], claim["processor"], claim["repeats"]) == (3, 1.5, 5)
    assert {name: turns.shape for name, turns in times.items()} == {
        "NAC, memory kept": (5, 2),
        "NAC, glibc's defaults": (5, 2),
    }
    stand_in.write_text("raise SystemExit(7)")
    with pytest.raises(SystemExit, match="ended with status 7"):
        kept_memory.compare("NAC", flags)


def test_unmeasured_ratio_leaves_its_cell_empty(load, capsys):
    run_all, timing = load("run_all"), load("timing")
    claim = {"claim": "reading", "peer": "PIL", "ratio": 1.5, "low": 1.0, "high": 2.0}
    claim |= {"processor": None, "repeats": 5, "target": 1.0}
    timing.report("reading", [claim])
    said = "reading: PIL / ours 1.50 (1.00 to 2.00, 5 turns, target 1.0)"
    assert capsys.readouterr().out.splitlines()[0] == said
    flags = ["--threads", "2", "--repeats", "5", "--threads", "1"]
    result = {"benchmark": "reading", "claims": [claim], "flags": flags, "load_before": 0.5}
    (row,) = run_all.rows(result)
    cells = ["reading", "PIL", "1.50 (1.00 to 2.00)", "", "5", "1", "0.5", "1.0", "yes"]
    assert [cell.strip() for cell in row.split("|")][1:10] == cells
    result |= {"claims": [claim | {"threads": 3}]}
    (row,) = run_all.rows(result)
    assert [cell.strip() for cell in row.split("|")][6] == "3"
    claim |= {"ratio": None, "low": None, "high": None, "processor": 0.5}
    result |= {"claims": [claim]}
    (row,) = run_all.rows(result)
    cells = ["reading", "PIL", "", "0.50", "5", "1", "0.5", "1.0", ""]
    assert [cell.strip() for cell in row.split("|")][1:10] == cells
    assert run_all.misses([result]) == []


def test_processor_seconds_include_child_processes(load):
    timing = load("timing")
    busy = "import time\nwhile time.process_time() < 0.5: pass"
    clock, processor = timing.seconds_of(lambda: subprocess.run([sys.executable, "-c", busy]))
    assert 0.5 <= processor <= clock + 0.2
