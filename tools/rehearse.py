"""Runs both methods' published commands at published sizes on one machine, and measures them.

Makes files of the published shapes with random weights (mBART-large-50, M-CLIP XLM-R-Large, CLIP
ViT-B/32, ViT-Large, V-MoE-Base), then trains, resumes, evaluates and exports with few steps on
small batches. For each part it prints

    part | seconds | peak memory of the process | ideal | ratio

where the ideal is the float32 memory of parameters, optimizer, gradients and activations, as
planned for the compiled step. For a command without a step, it is the weights that the command
holds. Run it again to resume: finished parts are skipped. Needs 24 GB of memory, and up to 20 GB of
disk in --workdir; each method's files are deleted when its parts are done, unless --keep. If memory
runs out, the kernel kills only the part.

    python tools/rehearse.py --workdir runs/rehearsal
    python tools/rehearse.py --workdir /tmp/try --small       the same on narrow networks
"""

import argparse
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from rehearsal import files, parts
from rehearsal.parts import Part

from cliptrans_jax.config import Config as CliptransConfig
from cliptrans_jax.towers.clip import ClipVisionConfig
from cliptrans_jax.towers.mclip import MClipConfig
from common_jax import app
from common_jax.config import freeze
from common_jax.signals import ends_quietly
from common_jax.weights import write_torch
from common_jax.workdir import write_json
from m2mkd_jax import pretrained
from m2mkd_jax.config import Config as M2mkdConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
# Baseline: a process that has imported both programs and read nothing.
ALONE = Part(("-c", "import jax, cliptrans_jax.main, m2mkd_jax.main; jax.devices()"), ".")
HEADER = ("part", "seconds", "peak memory of the process", "ideal", "ratio")
SMALL_MCLIP = MClipConfig(vocab=1002, width=64, layers=1, heads=4, hidden=64)
SMALL_CLIP = ClipVisionConfig(width=64, layers=1, heads=4, hidden=64)


@ends_quietly
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/rehearsal"))
    parser.add_argument("--small", action="store_true", help="narrow networks, for a quick try")
    parser.add_argument("--keep", action="store_true", help="delete no files")
    parser.add_argument("--only", choices=("cliptrans", "m2mkd"), help="rehearse only one method")
    flags = parser.parse_args()
    root = flags.workdir.resolve()
    root.mkdir(parents=True, exist_ok=True)
    methods = {"cliptrans": (make_cliptrans, parts.cliptrans), "m2mkd": (make_m2mkd, parts.m2mkd)}
    print(" | ".join(HEADER), flush=True)
    for method, (make, list_parts) in methods.items():
        if flags.only not in (None, method):
            continue
        folder = root / (f"{method}_small" if flags.small else method)
        listed = {"imports alone": ALONE} | dict(list_parts(folder, small=flags.small))
        rehearse(folder, listed, make, small=flags.small)
        if not flags.keep:
            for made in ("weights", "runs", "exported"):
                shutil.rmtree(folder / made, ignore_errors=True)
            record = folder / "rehearsal.json"
            write_json(record, json.loads(record.read_text()) | {"deleted": True})


def rehearse(folder: pathlib.Path, listed: Mapping[str, Part], make, *, small: bool) -> None:
    """Runs the unfinished parts, and prints the rows of all parts."""
    folder.mkdir(exist_ok=True)
    record = folder / "rehearsal.json"
    rows = json.loads(record.read_text()) if record.exists() else {}
    if not all(name in rows for name in listed) and "files" not in rows:
        make(folder, small)
        write_json(record, rows := rows | {"files": True})
    for name, part in listed.items():
        missing = [x for x in part.packages if importlib.util.find_spec(x) is None]
        if missing:
            print(f"{name} | skipped: {' and '.join(missing)} not installed", flush=True)
            continue
        if name not in rows:
            if "deleted" in rows:
                sys.exit(
                    f"{name} reads files that were deleted after the other parts finished; give "
                    "another --workdir, and --keep if you want to add parts later"
                )
            write_json(record, rows := rows | {name: measure(folder, name, part)})
        print(as_row(name, rows[name]), flush=True)


def as_row(name: str, found: Mapping[str, float]) -> str:
    """A row of the table, with sizes in GB (1e9 bytes)."""
    peak, ideal = found["peak"], found["ideal"]
    numbers = (f"{found['seconds']:.0f}", f"{peak / 1e9:.2f} GB", f"{ideal / 1e9:.2f} GB")
    return " | ".join((name, *numbers, f"{peak / ideal:.2f}" if ideal else "-"))


def measure(folder: pathlib.Path, name: str, part: Part) -> dict[str, float]:
    """Runs a part; returns its wall-clock seconds, and its peak and ideal memory in bytes."""
    if part.step:
        command = ("-m", "rehearsal.ideal", str(parts.TOKENS), *part.step)
        ideal = int(
            subprocess.check_output([sys.executable, *command], env=environment(), cwd=ROOT)
        )
    else:
        ideal = sum(size_of(folder / held) for held in part.holds)
    if available() < ideal:
        sys.exit(
            f"{name} needs at least {ideal / 1e9:.1f} GB of memory, and {available() / 1e9:.1f} GB "
            "are free; the same command continues from here"
        )
    forget_peak()
    start = time.monotonic()
    with (folder / f"{name.replace(' ', '_')}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *part.command], env=environment(), cwd=ROOT, stdout=log, stderr=log
        )
        try:
            # If memory runs out, the kernel should kill the part and nothing else.
            pathlib.Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
            if part.stopped:
                stop_after_first_step(process, (folder / part.made).parent / "metrics.jsonl")
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C or SIGTERM: stop the part too
            process.terminate()
            process.wait()
            raise
    if status or not (folder / part.made).exists():
        sys.exit(f"{name} failed with status {os.waitstatus_to_exitcode(status)}; see {log.name}")
    return {
        "seconds": time.monotonic() - start,
        "peak": 1024 * usage.ru_maxrss,
        "ideal": ideal,
    }


def forget_peak() -> None:
    """Resets this process's peak memory to its current usage: a child inherits its parent's peak,
    and making the files takes more memory than a small part."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def stop_after_first_step(process: subprocess.Popen, log: pathlib.Path) -> None:
    """Sends SIGTERM to a run once its log has a line."""
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if log.exists() and log.read_text():
            process.send_signal(signal.SIGTERM)
            return
        time.sleep(0.2)


def environment() -> dict[str, str]:
    """Environment of the measured processes."""
    paths = [str(ROOT), str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}


def available() -> int:
    """Available memory in bytes."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])


def size_of(path: pathlib.Path) -> int:
    """Size in bytes of a weight file, or of the weight files in a folder."""
    found = [path] if path.is_file() else [*path.glob("*.bin"), *path.glob("*.safetensors")]
    return sum(file.stat().st_size for file in found)


def make_cliptrans(folder: pathlib.Path, small: bool) -> None:
    """Makes the translator, towers, tokenizers and corpus."""
    flags = parts.cliptrans_sizes(small)
    config = freeze(
        CliptransConfig,
        app.read_config(["", "--workdir=x", f"--config={parts.CLIPTRANS}:stage=caption", *flags]),
    )
    weights = folder / "weights"
    files.write_mbart(weights / "mbart", config.model.mbart)
    files.write_mclip(weights / "mclip", SMALL_MCLIP if small else MClipConfig())
    files.write_clip(weights / "clip", SMALL_CLIP if small else ClipVisionConfig())
    pieces = 1000 if small else files.PUBLISHED_PIECES
    files.write_pieces([weights / "mbart", weights / "mclip"], pieces)
    files.write_multi30k(folder / "multi30k")


def make_m2mkd(folder: pathlib.Path, small: bool) -> None:
    """Makes a teacher and student in the original's format, and images."""
    flags = (f"--config.data.labels={parts.CLASSES}", *parts.m2mkd_sizes(small))
    config = freeze(
        M2mkdConfig,
        app.read_config(["", "--workdir=x", f"--config={parts.M2MKD}:phase=assemble", *flags]),
    )
    (folder / "weights").mkdir(exist_ok=True)
    for kind in ("teacher", "vmoe"):
        names = pretrained.KINDS[kind]
        tensors = files.random_tensors(names.table(config, None), names.shapes(config, None))
        write_torch(folder / "weights" / f"{kind}.pth", {"model": tensors}, replace=True)
    files.write_imagenet(folder / "imagenet", classes=parts.CLASSES, per_class=parts.IMAGES)


if __name__ == "__main__":
    main()
