"""Converts published weights to checkpoints that runs can start from, and runs to weight files.

    python tools/convert_weights.py IN OUT [--kind=KIND] [--config=FILE:ARGS] [--config.x=y ...]

The suffix of OUT decides the direction. Without one, PyTorch files (.pth, .pt, .bin) or safetensors
are converted to a folder for `config.sources`. With one, a run's workdir (or a single step in it)
is converted to a file: .pth as the original writes it, .safetensors with the bare tensors. Never
executes anything in a file. Every tensor must have a place: if any is missing, unknown or of the
wrong shape, all such tensors are listed and nothing is written.

IN may be a folder of files with one module each. --kind is optional if the tensor names, or the
run_config.json that `m2mkd export` wrote beside the weights, identify the kind. Sizes come from
--config, or else from that file; without both they are inferred from the tensors, and printed along
with those that are assumed. Override them with --config.x=y, for example
--config.teacher.depths=6,6,6,6.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import textwrap
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from cliptrans_jax import config as cliptrans_config
from cliptrans_jax import pretrained as cliptrans
from cliptrans_jax.data.tokenizers.published import PUBLISHED
from cliptrans_jax.data.tokenizers.tokens import TokenizerConfig
from cliptrans_jax.models.cliptrans import ModelConfig
from cliptrans_jax.tensors.kinds import kind_of_tensors
from cliptrans_jax.towers import mclip
from cliptrans_jax.translators.table import TRANSLATORS
from common_jax import checkpoint
from common_jax.app import USER_ERRORS
from common_jax.command_line import read_config_file, set_field
from common_jax.config import flatten, freeze, unfreeze
from common_jax.mesh import start_backend
from common_jax.signals import ends_quietly
from common_jax.weights import Account, format_account, write_tensors, write_torch
from common_jax.weights.files import TORCH_SUFFIXES
from common_jax.weights.table import Pretrained
from common_jax.workdir import (
    check_output,
    check_output_file,
    describe_error,
    freeze_stored,
    write_json,
)
from m2mkd_jax import config as m2mkd_config
from m2mkd_jax import pretrained as m2mkd
from m2mkd_jax.phases.training import CLASSES
from m2mkd_jax.pretrained.folder import RUN, read_run_config

CLIPTRANS = "cliptrans"
EXAMPLES = {
    "meta": "PT_huge.pth weights/meta --kind=meta --config=configs/m2mkd/nac_imagenet.py",
    "teacher": "deit_base_patch16_224.pth weights/teacher --config.teacher.depths=3,3,3,3",
    "teacher_module": "FT_huge/ weights/teacher",
    "module": "MT_2/finished_checkpoint.pth weights/module_2 --kind=module --config.module=2",
    "vmoe": "vmoe_base.pth weights/vmoe --config.model.depths=3,3,3,3",
    "vmoe_student": "student_1.pth weights/student_1 --config=configs/m2mkd/vmoe_base.py:module=1",
    "nac": "nac_scale_imnet.pth weights/nac --config=configs/m2mkd/nac_imagenet.py",
    "nac_student": "students/ weights/students --config=configs/m2mkd/nac_imagenet.py",
    CLIPTRANS: "model_best_test.pth weights/cliptrans",
}
ABOUT = {name: kind.about for name, kind in m2mkd.KINDS.items()} | {
    CLIPTRANS: "a CLIPTrans checkpoint, whole or in shards NAME_1.pth, for config.sources.model"
}
# Fields of config.sources that accept published files directly, by kind.
TAKEN_AS_IT_IS = {
    "mbart": "mbart",
    "nllb": "mbart",
    "mclip": "clip_text",
    "clip_text": "clip_text",
    "clip_vision": "clip_image",
    "clip_res": "clip_image",
    "siglip_text": "siglip",
    "siglip_vision": "siglip",
}
FILE_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
ACCOUNT = "conversion.json"  # what a conversion did, in the folder that it wrote


@dataclasses.dataclass(frozen=True)
class Command:
    """The parsed command line; `settings` maps the paths of `--config.x=y` overrides to values."""

    source: str
    target: str
    kind: str | None
    config: str | None
    settings: Mapping[str, str]
    force: bool
    weights: str


@ends_quietly
def main(argv: Sequence[str] | None = None) -> None:
    command = parse(sys.argv[1:] if argv is None else argv)
    try:
        start_backend()
        target = pathlib.Path(command.target)
        if target.exists():
            require_replaceable(command)
        if target.name.endswith(FILE_SUFFIXES):
            check_output_file("OUT", command.target)
            export(command)
        else:
            check_output("OUT", command.target)
            take(command)
    except USER_ERRORS as error:
        print(f"error: {describe_error(error)}", file=sys.stderr)
        sys.exit(2)


def parse(argv: Sequence[str]) -> Command:
    lines = [f"  {name:15} {about}\n{'':18}{EXAMPLES[name]}" for name, about in ABOUT.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="kinds, each with an example of IN OUT and flags:\n\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="IN")
    parser.add_argument("target", metavar="OUT")
    parser.add_argument("--kind", choices=[*ABOUT])
    parser.add_argument("--config", help="config file and its arguments")
    parser.add_argument(
        "--weights",
        default="",
        metavar="KEY",
        help="which weights to use from a file with several sets: a key such as model_ema, or the "
        "prefix of a network's tensor names, such as teacher.",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace OUT, if a conversion wrote it"
    )
    overrides = [arg for arg in argv if arg.startswith("--config.")]
    flags = parser.parse_args([arg for arg in argv if arg not in overrides])
    settings = {}
    for override in overrides:
        path, equals, text = override.removeprefix("--config.").partition("=")
        if not equals:
            parser.error(f"{override}: write --config.x=y")
        settings[path] = text
    return Command(**vars(flags), settings=settings)


def require_replaceable(command: Command) -> None:
    """Raises ValueError or FileExistsError if an existing OUT may not be replaced."""
    source, target = pathlib.Path(command.source), pathlib.Path(command.target)
    if not command.force:
        raise FileExistsError(f"{target} exists; give another OUT, or --force to replace it")
    if source.resolve().is_relative_to(target.resolve()):
        raise ValueError(
            f"--force would delete IN, since OUT={target} contains it; give another OUT"
        )
    of_a_file = target.name.endswith(FILE_SUFFIXES)
    if not (target.is_file() if of_a_file else (target / ACCOUNT).is_file()):
        expected = "a file" if of_a_file else f"a folder from an earlier conversion, with {ACCOUNT}"
        raise FileExistsError(
            f"--force replaces only {expected}, and OUT={target} is none; give another OUT"
        )


def take(command: Command) -> None:
    """Converts one or more files to a folder that runs can start from."""
    checkpoint.refuse_pattern(command.target, "OUT")
    files: dict[str, Any] = {}  # to write beside the checkpoint
    if command.kind == CLIPTRANS:
        found = _take_cliptrans(command)
    else:
        found, files = _take_m2mkd(command)
    printed = found.kind != CLIPTRANS  # for m2mKD, `assumed` was printed before reading
    shown = dataclasses.replace(found.account, assumed=()) if printed else found.account
    print(format_account(shown))
    target = epath.Path(command.target)
    part = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    source = {"source": str(pathlib.Path(command.source).absolute()), "kind": found.kind}
    try:
        checkpoint.write_params(part, found.params, found.config)
        account = json.dumps(source | dataclasses.asdict(found.account), indent=2)
        (part / ACCOUNT).write_text(account + "\n")
        for name, content in files.items():
            write_json(part / name, content)
        # The old folder goes last, so that a failed rename loses neither.
        old = target.parent / f"{part.name}.old"
        if target.exists():
            target.rename(old)
        part.rename(target)
        if old.exists():
            old.rmtree()
    finally:
        if part.exists():
            part.rmtree()
    print(f"wrote {target}, of kind {found.kind}")


def export(command: Command) -> None:
    """Converts a run to a file."""
    saved = checkpoint.load_config(command.source)
    stage = _only_module(command)
    if "stage" in saved:
        kind, (state, account) = CLIPTRANS, _export_cliptrans(command, saved)
        value = {"model": state}
    else:
        found = m2mkd.load_run(command.source, stage=stage)
        kind, account = found.kind, found.account
        state = m2mkd.to_tensors(found)
        value = m2mkd.as_checkpoint(found, state)
    if command.kind not in (None, kind):
        raise ValueError(f"{command.source} is of kind {kind!r}, not --kind={command.kind}")
    print(format_account(account))
    if pathlib.Path(command.target).suffix == ".safetensors":
        once = {name: x for name, x in state.items() if name not in dict(account.aliases)}
        write_tensors(command.target, once, replace=command.force)
    else:
        write_torch(command.target, value, replace=command.force)
    print(f"wrote {command.target}, of kind {kind}")


def read_config(command: Command, cls: type, inferred: Any = None) -> Any:
    """The frozen config of --config, or else the inferred one, with overrides."""
    if command.config is not None:
        config = read_config_file(command.config)
    else:
        config = unfreeze(cls() if inferred is None else inferred)
    for path, text in command.settings.items():
        set_field(config, path, text)
    return freeze(cls, config)


def _take_m2mkd(command: Command) -> tuple[Pretrained, dict[str, Any]]:
    """The parameters, and the config, as JSON, of a run that could have produced them; and the
    content of other files in its folder, by name."""
    files = m2mkd.read_files(command.source, weights=command.weights)
    exported = read_run_config(pathlib.Path(command.source))
    kind = command.kind or (exported and exported.kind)
    if exported and kind != exported.kind:
        raise ValueError(
            f"--kind={kind}: {command.source} is of kind {exported.kind!r}, as {RUN} beside the "
            "weights says; leave it out"
        )
    other = kind_of_tensors(files[0].tensors) if kind is None else None
    if other == CLIPTRANS:
        print(f"kind {CLIPTRANS}, from the tensor names: {ABOUT[CLIPTRANS]}")
        return _take_cliptrans(command), {}
    if other is not None:
        raise ValueError(
            f"{command.source} is of kind {other!r}, which needs no conversion: pass it to "
            f"cliptrans_jax.main as --config.sources.{TAKEN_AS_IT_IS[other]}"
        )
    source = m2mkd.find_source(files, kind)
    if source.guessed:
        print(f"kind {source.kind}, from the tensor names: {ABOUT[source.kind]}")
    elif not command.kind:
        print(f"kind {source.kind}, from {RUN} beside the weights: {ABOUT[source.kind]}")
    inferred, assumed = None, {}
    if command.config is None and exported:
        inferred = exported.config
        print(f"the config is that of the exported run, in {RUN} beside the weights")
    elif command.config is None:
        sizes = m2mkd.infer_config(source, command.settings)
        inferred, assumed = sizes.config, sizes.assumed
        _show_sizes("read from the file", sizes.read, command)
        _show_sizes("assumed", sizes.assumed, command)
    config = read_config(command, m2mkd_config.Config, inferred)
    found = m2mkd.load(source, config, overridden=command.settings)
    account = dataclasses.replace(
        found.account,
        assumed=tuple(
            (path, repr(value))
            for path, value in assumed.items()
            if path.removeprefix("config.") not in command.settings
        ),
    )
    names = list(exported.classes) if exported else []
    # Names that are only numbers stand for unknown ones.
    named = len(names) == found.config.data.labels and names != [*map(str, range(len(names)))]
    content = unfreeze(found.config).to_dict()
    found = dataclasses.replace(found, config=content, account=account)
    return found, {CLASSES: {"names": names}} if named else {}


def _show_sizes(title: str, fields: Mapping[str, Any], command: Command) -> None:
    """Prints the sizes that the command line does not override."""
    given = {f"config.{path}" for path in command.settings}
    shown = ", ".join(f"{name}={value}" for name, value in fields.items() if name not in given)
    print(textwrap.fill(f"{title}: {shown}", 100, subsequent_indent="  "))


def _take_cliptrans(command: Command) -> Pretrained:
    """The parameters, and the config, as JSON, of a run that could have produced them."""
    cls = cliptrans_config.Config
    load = functools.partial(
        cliptrans.load, command.source, kind=CLIPTRANS, weights=command.weights
    )
    if command.config is not None:
        config = read_config(command, cls)
        found = load(config=config.model)
    else:
        settings = unfreeze(_released_config(command.settings))
        for path, text in command.settings.items():
            set_field(settings, path, text)
        given = {
            path: value
            for path, value in flatten(settings.model)
            if any(f"model.{path}.".startswith(f"{setting}.") for setting in command.settings)
        }
        found = load(given=given)
        # Frozen only now, since it may be valid only with the sizes of the file.
        settings.model = unfreeze(found.config)
        config = freeze(cls, settings)
    config = dataclasses.replace(
        config,
        stage="translate",
        model=found.config,
        sources=cliptrans_config.SourcesConfig(),
        recipes={},
        run=dataclasses.replace(config.run, best=None),
    )
    for name in ("tokenizer", "clip_tokenizer"):
        section = getattr(config, name)
        path = section.path
        folder = f", from {path}: --config.{name}.path=DIR changes it" if path else ""
        print(f"config.{name}.kind={section.kind!r}{folder}")
    return dataclasses.replace(found, config=unfreeze(config).to_dict())


def _released_config(settings: Mapping[str, str]) -> cliptrans_config.Config:
    """The default config, but with the tokenizers of the published networks that a released
    checkpoint was made from, or with those of the kinds in `settings`."""
    tokenizers = {
        "tokenizer": TRANSLATORS[ModelConfig.translator].tokenizer,
        "clip_tokenizer": mclip.TOWER.sentences.tokenizer,
    }
    sections = {}
    for name, usual in tokenizers.items():
        # Another kind is set later, like every setting; "trained" has no folder.
        if (kind := settings.get(f"{name}.kind", usual)) in PUBLISHED:
            # Unless a folder is given, the error for this one says where to fetch the files.
            sections[name] = TokenizerConfig(kind, PUBLISHED[kind].repository)
    return dataclasses.replace(cliptrans_config.Config(), **sections)


def _export_cliptrans(
    command: Command, saved: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], Account]:
    """The tensors of a translation model, with the shared embedding under all its names."""
    config = freeze_stored(cliptrans_config.Config, saved, command.source)
    params = checkpoint.load(command.source, average=True)
    model = {config.model.architecture.subtree, "mapper"}  # the only parts that go into the file
    if not model & params.keys():
        raise ValueError(
            f"{command.source} is a run of stage {saved['stage']!r}, which trains no translation "
            f"model; it holds {sorted(params)}"
        )
    params = jax.tree.map(np.asarray, params)
    left = tuple((name, "towers are not part of the file") for name in params.keys() - model)
    params = {name: tree for name, tree in params.items() if name in model}
    tensors, account = cliptrans.cliptrans_tensors(params, config.model)
    return tensors, dataclasses.replace(account, dropped=left)


def _only_module(command: Command) -> int | None:
    """K of --config.module=K, the only override accepted when converting a run."""
    if command.weights:
        raise ValueError(
            "--weights is for files; a run with averaged parameters is exported with the average"
        )
    if command.config is not None or command.settings.keys() - {"module"}:
        raise ValueError("the config comes from the run; only --config.module=K can be given here")
    stage = command.settings.get("module")
    if stage is not None and not stage.isdigit():
        raise ValueError(f"--config.module={stage} must be the number of a module")
    return None if stage is None else int(stage)


if __name__ == "__main__":
    main()
