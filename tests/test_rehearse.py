"""The rehearsal at published sizes: its files are readable, its parts measured and not run
twice."""

import json
import signal
import subprocess

import pytest
import rehearse
from rehearsal import files, parts
from rehearsal.parts import Part

from cliptrans_jax import pretrained
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig, load_tokenizer
from cliptrans_jax.translators.mbart import MBartConfig

WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('done')"


def test_files_are_read_like_published_ones(tmp_path):
    sizes = {"width": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_hidden": 16}
    sizes |= {"encoder_heads": 2, "decoder_heads": 2, "decoder_hidden": 16}
    mbart = MBartConfig(vocab=1054, **sizes)
    files.write_mbart(tmp_path / "mbart", mbart)
    files.write_mclip(tmp_path / "mclip", rehearse.SMALL_MCLIP)
    files.write_clip(tmp_path / "clip", rehearse.SMALL_CLIP)
    files.write_pieces([tmp_path / "mbart", tmp_path / "mclip"], 1000)
    expected = {"mbart": mbart, "mclip": rehearse.SMALL_MCLIP, "clip": rehearse.SMALL_CLIP}
    for name, config in expected.items():
        found = pretrained.load(tmp_path / name)
        assert found.config == config
        assert found.account.assumed == found.account.dropped == ()
    for name, kind, vocab in (("mbart", "mbart50", 1054), ("mclip", "xlmr", 1002)):
        tokenizer = load_tokenizer(
            TokenizerConfig(kind, str(tmp_path / name)), key="config.tokenizer"
        )
        assert tokenizer.vocab == vocab
        (ids,) = tokenizer.encode(["a man runs"], "en" if kind == "mbart50" else None)
        assert len(ids) > 4


@pytest.mark.parametrize("small", [False, True])
def test_parts_follow_the_parts_they_read_from(tmp_path, small):
    for method in (parts.cliptrans, parts.m2mkd):
        made = set()
        for name, part in method(tmp_path, small=small):
            own = tmp_path / part.made
            sources = {text for text in part.command if "sources.m" in text or "sources.s" in text}
            for text in sources:
                for run in set(_runs(text, tmp_path)):
                    assert run in made, f"{name} reads {run}"
            made |= set(own.parents)
        assert len(made) > 5


def _runs(text, root):
    pieces = text.replace("'", '"').replace("=", '"').replace(",", '"').split('"')
    return [root / "runs" / x.partition("/runs/")[2].rstrip(")") for x in pieces if "/runs/" in x]


def test_each_part_is_measured_once(tmp_path, capsys):
    made = tmp_path / "made"
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    listed = {
        "write": Part(("-c", WRITE, str(made)), "made", holds=("weights.bin",)),
        "peer": Part(("-c", "1"), "made", packages=("no_such_package",)),
    }
    calls = []
    for _ in range(2):
        rehearse.rehearse(tmp_path, listed, lambda folder, small: calls.append(folder), small=True)
        made.write_text("changed")
    assert (calls, made.read_text()) == ([tmp_path], "changed")
    found = json.loads((tmp_path / "rehearsal.json").read_text())["write"]
    assert found["ideal"] == 1000 < 1e6 < found["peak"]
    row, skipped = capsys.readouterr().out.splitlines()[-2:]
    assert row.startswith("write | ")
    assert skipped == "peer | skipped: no_such_package not installed"


def test_peak_memory_is_measured_per_part(tmp_path):
    (tmp_path / "made").touch()
    before = rehearse.measure(tmp_path, "before", Part(("-c", "1"), "made"))["peak"]
    most = before + 1_000_000_000
    assert len(bytearray(b"x") * most) == most  # freed at once, but it sets this process's peak
    assert rehearse.measure(tmp_path, "after", Part(("-c", "1"), "made"))["peak"] < most


def test_failing_part_ends_the_rehearsal(tmp_path):
    part = Part(("-c", "import sys; sys.exit('no')"), "made")
    with pytest.raises(SystemExit, match=r"bad failed with status 1; see .*bad\.log"):
        rehearse.measure(tmp_path, "bad", part)
    assert (tmp_path / "bad.log").read_text() == "no\n"


def test_run_is_stopped_after_its_first_line(tmp_path):
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit())\n"
        "pathlib.Path(sys.argv[1]).mkdir()\n"
        "pathlib.Path(sys.argv[1] + '/../metrics.jsonl').write_text('{}')\n"
        "time.sleep(60)\n"
        "sys.exit('never stopped')"
    )
    run = tmp_path / "run"
    run.mkdir()
    part = Part(("-c", code, str(run / "checkpoints")), "run/checkpoints", stopped=True)
    assert rehearse.measure(tmp_path, "stopped", part)["seconds"] < 30


def test_part_is_terminated_with_the_rehearsal(tmp_path, monkeypatch):
    started, real = [], subprocess.Popen

    def start(*arguments, **settings):
        started.append(real(*arguments, **settings))
        return started[-1]

    def asked_to_stop(pid, options):
        raise SystemExit(143)

    monkeypatch.setattr(rehearse.subprocess, "Popen", start)
    monkeypatch.setattr(rehearse.os, "wait4", asked_to_stop)
    with pytest.raises(SystemExit, match="143"):
        rehearse.measure(tmp_path, "sleep", Part(("-c", "import time; time.sleep(60)"), "made"))
    (process,) = started
    assert process.returncode == -signal.SIGTERM
