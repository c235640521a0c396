"""The parts of a rehearsal: the published commands, with few steps on small batches."""

import dataclasses
import pathlib
from collections.abc import Iterator

CLIPTRANS, M2MKD = "configs/cliptrans/multi30k.py", "configs/m2mkd/vmoe_base.py"
CLASSES, IMAGES = 8, 8  # classes of the image set, and images per class
TOKENS = 32  # length of the padded sentences
MODULES = (0, 1, 2, 3)
SHORT = (
    "--config.run.keep=1",
    "--config.run.best=None",
    "--config.run.log_every=1",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A command whose time and memory are measured.

    Attributes:
      command: arguments of python.
      made: path in the rehearsal's folder that exists once the command is finished.
      step: flags of the train step whose compiled program gives the ideal memory; () for none.
      holds: without a step, the weights that the command holds in float32, as paths in the
        rehearsal's folder.
      stopped: whether to stop it after its first step.
      packages: packages that it needs; skipped without them.
    """

    command: tuple[str, ...]
    made: str
    step: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    stopped: bool = False
    packages: tuple[str, ...] = ()


PEER = """
import sys, transformers
model = transformers.AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(model.generate(**tokenizer(["a man runs"], return_tensors="pt"), max_new_tokens=4))
"""


def cliptrans_sizes(small: bool) -> tuple[str, ...]:
    """Flags that set the translator's sizes; () for the published ones."""
    if not small:
        return ()
    section = "--config.model.mbart"
    sizes = {"vocab": 1054, "width": 64, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_heads": 4, "decoder_heads": 4, "encoder_hidden": 64, "decoder_hidden": 64}
    return tuple(f"{section}.{name}={size}" for name, size in sizes.items())


def m2mkd_sizes(small: bool) -> tuple[str, ...]:
    """Flags that set the networks' sizes; () for the published ones."""
    roles = ("meta", "teacher", "model") if small else ()
    return tuple(
        f"--config.{role}.{field}={size}"
        for role in roles
        for field, size in (("width", 64), ("heads", 4))
    )


def cliptrans(root: pathlib.Path, *, small: bool) -> Iterator[tuple[str, Part]]:
    """The parts of CLIPTrans, by name."""
    runs, weights = root / "runs", root / "weights"
    sources = {
        "data.path": root / "multi30k",
        "tokenizer.path": weights / "mbart",
        "clip_tokenizer.path": weights / "mclip",
        "sources.clip_text": weights / "mclip",
        "sources.clip_image": weights / "clip",
        "features": root / "features",
    }
    common = tuple(f"--config.{name}={path}" for name, path in sources.items())
    few = ("--config.optim.batch=8", "--config.optim.accumulate=2", "--config.optim.steps=2")
    search = ("--config.decode.max_new_tokens=8", "--config.decode.batch=8")
    flags = (*common, *few, *search, *SHORT, "--config.valid_decode=False", *cliptrans_sizes(small))

    def train(stage: str, *more: str, stopped: bool = False) -> Part:
        config = (f"--config={CLIPTRANS}:stage={stage}", *flags, *more)
        run = runs / stage
        made = f"runs/{stage}/checkpoints" if stopped else f"runs/{stage}/scores.json"
        command = ("-m", "cliptrans_jax.main", *config, f"--workdir={run}")
        return Part(command, made, step=config, stopped=stopped)

    yield "caption", train("caption", f"--config.sources.mbart={weights / 'mbart'}")
    towers = ("weights/mclip", "weights/clip")
    texts, pictures = root / "multi30k/raw/val.en", root / "multi30k/images/val"
    made = root / "vectors.npz"
    command = ("features", runs / "caption", texts, pictures, "--out", made)
    yield "features", Part(("-m", "cliptrans_jax", *map(str, command)), made.name, holds=towers)
    source = f"--config.sources.model={runs / 'caption'}"
    yield "translate", train("translate", source, stopped=True)
    yield "resume", train("translate", source)
    both = ("weights/mbart", "weights/mclip")
    command = ("evaluate", runs / "translate", "--split=val", "--decode.beams=5")
    command += ("--out", root / "scores")
    made = "scores/scores.json"
    yield "evaluate", Part(("-m", "cliptrans_jax", *map(str, command)), made, holds=both)
    command = ("export", runs / "translate", root / "exported")
    made = "exported/model.safetensors"
    export = Part(("-m", "cliptrans_jax", *map(str, command)), made, holds=("weights/mbart",))
    yield "export", export
    yield (
        "load by the peer",
        Part(
            ("-c", PEER, str(root / "exported")),
            "exported/model.safetensors",
            holds=("weights/mbart",),
            packages=("torch", "transformers"),
        ),
    )


def m2mkd(root: pathlib.Path, *, small: bool) -> Iterator[tuple[str, Part]]:
    """The parts of m2mKD, by name."""
    runs, weights = root / "runs", root / "weights"
    few = (
        f"--config.data.path={root / 'imagenet'}",
        f"--config.data.labels={CLASSES}",
        "--config.data.workers=0",
        "--config.optim.batch=4",
        "--config.optim.accumulate=1",
        "--config.optim.steps=1",
        "--config.optim.warmup_epochs=0",
        "--config.augment.repeats=1",
        "--config.precision=float32",
    )
    flags = (*few, *SHORT, *m2mkd_sizes(small))

    def train(phase: str, *more: str, module: str = "") -> Part:
        argument = f"phase={phase}{f',module={module}' if module else ''}"
        config = (f"--config={M2MKD}:{argument}", *flags, *more)
        run = f"{phase}_{module}" if module else phase
        command = ("-m", "m2mkd_jax.main", *config, f"--workdir={runs / run}")
        return Part(command, f"runs/{run}/result.json", step=config)

    def listed(names: Iterator[str]) -> str:
        return f"({','.join(repr(str(runs / name)) for name in names)},)"

    for kind in ("teacher", "vmoe"):
        made = weights / f"{kind}_run"
        command = ("tools/convert_weights.py", f"{weights}/{kind}.pth", f"{made}", f"--kind={kind}")
        command += (f"--config={M2MKD}", *(x for x in flags if "data.labels" in x))
        command += m2mkd_sizes(small)
        yield (
            f"convert {kind}",
            Part(command, f"weights/{kind}_run", holds=(f"weights/{kind}.pth",)),
        )
    yield "meta", train("pretrain_meta")
    meta = f"--config.sources.meta={runs / 'pretrain_meta'}"
    for module in MODULES:
        yield f"module {module}", train("train_module", meta, module=str(module))
    modules = listed(f"train_module_{module}" for module in MODULES)
    yield "assemble", train("assemble", f"--config.sources.modules={modules}")
    teacher = f"--config.sources.teacher={runs / 'assemble'}"
    for module in MODULES:
        yield f"distill {module}", train("distill", meta, teacher, module=str(module))
    students = listed(f"distill_{module}" for module in MODULES)
    yield "end to end", train("end_to_end", f"--config.sources.students={students}")
    network = f"--config.sources.network={runs / 'end_to_end'}"
    shots = ("--config.few_shot.shots=2", "--config.few_shot.test_shots=2")
    yield "few-shot", train("few_shot", network, *shots)
