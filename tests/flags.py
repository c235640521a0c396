"""Tries wrong values in every field of both configs: each is refused with its full key, or allowed
on purpose.

    make test-flags

Every field of both systems, in the sections of every config file, gets every value in VALUES. What
`freeze` accepts must be in ALLOWED, with a reason. Everything else must be refused by a ValueError
whose message starts with the key and the value. It is also a miss if the table allows a value that
`freeze` refuses, or if a row of it allows nothing. A sample is run through the command line, which
must exit with status 2 and write nothing.
"""

import contextlib
import dataclasses
import functools
import io
import math
import pathlib
import re
import runpy
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import cliptrans_jax.config
import cliptrans_jax.main
import m2mkd_jax.config
import m2mkd_jax.main
from common_jax import app
from common_jax.config import freeze, unfreeze
from m2mkd_jax.nac.model import NacConfig

ROOT = pathlib.Path(__file__).parents[1]
LONGEST = 2000  # maximum characters of a message

VALUES = (
    *(-1, 0, 1.5, 1e20, 10**20, 10**5000, math.nan, math.inf, -math.inf, True, None),
    *("", "x", "(", "x" * 5000, (), ("x",), ("",), (-1,), (math.nan,), {"x": 1}),
)
TEXTS = ("", "x", "(", "x" * 5000)
TEXT = TEXTS[1:]

# (regex of keys, values, why they are allowed). Keys are without "config.", and those in a recipe
# without "recipes.NAME.".
ALLOWED = (
    (
        r"augment\.(flip|randaugment)|few_shot\.test_on_train|optim\.decay_all|data\.emoji_flags"
        r"|(meta|teacher|model|model\.(mbart|nllb))\.(remat|scan_layers)|(meta|teacher|model)\.qkv_bias"
        r"|(meta|teacher|model)\.(patch_bias|class_token|norm_pre|norm_after_pool)"
        r"|model\.(moe\.router_bias|(mbart|nllb)\.scale_embedding|prior\.(periodic|hinge))"
        r"|model\.linear\.(learnable_gain|add_one)"
        r"|model\.kernel\.(straight_through|stochastic|learnable_bandwidth)"
        r"|model\.(geglu|mask|share_\w+|seeder_code_noise|read_\w+_(residual|head|norm)"
        r"|read_out_head_norm|inputs_to_outputs|identical_codes|learn_\w+|legacy_read_in_scale)"
        r"|parity|valid_decode|keep_text_features|noise\.(train|test)|batching\.half_steps"
        r"|decode\.early_stopping|sources\.fetch|unfreeze_clip",
        (True,),
        "switches",
    ),
    (
        r"optim\.(steps|lr_per|warmup_steps|clip)|run\.(checkpoint_minutes|best)"
        r"|run\.(compilation_cache|wandb)"
        r"|model\.(layer_scale|read_in_scale|kernel\.truncation|moe\.slots_per_expert)"
        r"|(meta|teacher)\.layer_scale"
        r"|regularizers\.(\w+\.weight_end|blocks\.clip)|(clip_)?tokenizer\.max_length",
        (None,),
        "None: off, or without a limit",
    ),
    (
        r"data\.(workers|per_class|test_per_class|split_seed)|distill\.pairs_at_once|few_shot\.seed|seed"
        r"|augment\.(padding|operations|fill)|optim\.(warmup_epochs|warmup_steps)"
        r"|model\.(read_in_heads|read_out_heads|tokenizer\.grid_size)"
        r"|(meta|teacher|model)\.registers"
        r"|model\.prior\.(community_size|neighbours|height|path_length|steps)"
        r"|(model\.mbart|model\.nllb|clip\.text)\.(pad|eos|start)|model\.mapper\.prefix"
        r"|valid_beams|decode\.halvings",
        (0,),
        "counts that may be none, and ids and seeds from 0",
    ),
    (
        r"optim\.lr",
        (0,),
        "a run that changes nothing, which shows what an evaluation alone gives",
    ),
    (
        r"optim\.(warmup_lr|min_lr|weight_decay|b1|b2|momentum|ema)|label_smoothing|drop_path"
        r"|data\.(bad_share|test_share)|baseline\.alpha|distill\.alpha|noise\.mask_prob"
        r"|augment\.(magnitude|magnitude_std|erasing|mixup|cutmix|switch|mix_probability|smoothing"
        r"|rotate|scale|shift|brightness|contrast|saturation)"
        r"|model\.moe\.(noise_std|balance\.\w+)|model\.(layer_scale|code_noise|read_in_scale)"
        r"|(meta|teacher)\.layer_scale"
        r"|model\.linear\.dropout|model\.prior\.(edge_probability|p_in|p_out|rewire)"
        r"|regularizers\.\w+\.(weight|weight_end)|regularizers\.blocks\.(within|between)"
        r"|(clip\.text|model\.(mbart|nllb|mapper))\.dropout",
        (0,),
        "0: off, or an end of the interval",
    ),
    (
        r"optim\.(lr|warmup_lr|min_lr|weight_decay|power|eps|clip)|run\.checkpoint_minutes"
        r"|(distill|baseline)\.tau|(meta|teacher|model)\.(mlp_ratio|norm_eps|layer_scale)"
        r"|augment\.(magnitude|magnitude_std|mixup|cutmix|rotate)"
        r"|model\.moe\.(noise_std|capacity_factor|balance\.(importance|gshard|z))"
        r"|model\.(ffn_factor|layer_scale|code_noise|read_in_scale|temperature)"
        r"|model\.linear\.weight_gain|model\.kernel\.(truncation|temperature|bandwidth)"
        r"|model\.prior\.(truncation|learning_rate)|regularizers\.\w+\.(weight|weight_end|hinge)"
        r"|regularizers\.blocks\.clip|clip\.(scale|text\.eps|image\.eps)",
        (1.5,),
        "weights, factors and temperatures without an upper end, or one above 1.5",
    ),
    (r"model\.linear\.gain|decode\.length_penalty", (-1, 0, 1.5), "of either sign"),
    (r"mesh\.data", (-1,), "all devices that the other axes leave"),
    (
        r"ood\.(path|name|classes)|sources\.(meta|teacher|network|model|mbart|clip|clip_\w+|siglip)"
        r"|sources\.weights|init\.(upcycle|teacher)|features|ood\.source|test_side|caption_language"
        r"|data\.name|sources\.(fresh|leave)|optim\.no_decay",
        ("",),
        "'': none, or as the stage has it; a phase that needs one asks for it",
    ),
    (
        r"ood\.(path|name|classes)|sources\.(meta|teacher|network|model|mbart|clip|clip_text)"
        r"|sources\.(clip_image|clip_text_base|siglip)|init\.teacher|features"
        r"|run\.(compilation_cache|wandb)",
        TEXT,
        "a path, or the name of a file or a project: it is opened before anything is trained",
    ),
    (
        r"data\.(train_split|valid_split|test_split)|ood\.split",
        TEXT,
        "a split: compared with those that are there when the data are opened",
    ),
    (r"sources\.weights", TEXT, "a key of a file: compared with those that are there"),
    (r"sources\.(fresh|leave)|optim\.no_decay", ("x", "x" * 5000), "a regex of paths"),
    (
        r"sources\.(modules|students|teachers)",
        ((), ("x",)),
        "no workdirs, or one, which is opened before anything is trained",
    ),
    (
        r"run\.profile|languages|distill\.teachers",
        ((),),
        "(): no profile; the languages of the pair; all teachers for every module",
    ),
    (r"data\.further_tests", ((), ("x",)), "no further splits, or one, as test_split"),
)
# The same, for configs whose name the first regex matches.
SOME = (
    ("m2mkd", r"augment\.shift", (1.5,), "pixels there, and a share of the side in cliptrans"),
    ("m2mkd( nac|/digits.*)?$", r"data\.mean", ((-1,),), "a mean of either sign, of one channel"),
    ("m2mkd", r"data\.path", TEXTS, "a path; digits have none and do not look at it"),
    ("cliptrans(/emoji)?$", r"data\.path", ("",), "emoji have no folder"),
    ("cliptrans/[mw]", r"data\.path", TEXT, "a folder"),
    ("cliptrans/(multi30k$|wit|wmt)", r"(clip_)?tokenizer\.path", TEXT, "a folder"),
    ("cliptrans(/emoji|/multi30k_tiny)?$", r"(clip_)?tokenizer\.path", ("",), "trained here"),
    ("cliptrans(/emoji|/multi30k_tiny)?$", r"(clip_)?tokenizer\.lower", (True,), "trained here"),
    ("cliptrans/(?!multi30k_tiny)", r"all_languages", (True,), "a switch of captioning stages"),
    ("cliptrans(/multi30k_tiny)?$", r"clip\.lock_text", (True,), "translation ignores it"),
    (
        "m2mkd(?!.*nac)",
        r"init\.upcycle",
        TEXT,
        "a workdir; a phase that does not read it refuses it before anything is compiled",
    ),
)
# Fields whose refusal depends on other sections: their own section, taken alone, accepts more.
ABOVE = (
    r"init\.upcycle|distill\.teachers|run\.best|data\.(source|target)_language"
    r"|model\.moe\.balance\.load|clip\.lock_text|mesh\.\w+"
)


def leaves(config: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Dotted keys of all sections and fields."""
    for name, value in config.items():
        yield f"{path}{name}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}{name}.")


def key_in_table(key: str) -> str:
    return re.sub(r"^recipes\.\w+\.", "", key)


@functools.cache
def rows_of(config: str, key: str) -> tuple[int, ...]:
    """Indices of the rows of both tables that match a key."""
    rows = [(".*", *row) for row in ALLOWED] + list(SOME)
    return tuple(
        number
        for number, (where, keys, _, _) in enumerate(rows)
        if re.match(where, config) and re.fullmatch(keys, key_in_table(key))
    )


def allowing(config: str, key: str, value: Any) -> list[int]:
    """The rows that allow a value for a key."""
    values = [row[1] for row in ALLOWED] + [row[2] for row in SOME]
    return [
        number
        for number in rows_of(config, key)
        if any(type(value) is type(one) and value == one for one in values[number])
    ]


def describe(value: Any) -> str:
    """How a message may show a value."""
    if isinstance(value, int) and value.bit_length() > 10_000:
        return f"a number of {value.bit_length()} bits"
    return repr(value)[:100]


def is_named(message: str, key: str, value: Any) -> bool:
    """Whether a refusal starts with the key and the value, or the value's first element."""
    beginnings = [f"{key}={describe(value)}"]
    if isinstance(value, tuple) and value:
        beginnings.append(f"{key}[0]={describe(value[0])}")
    if value == (-1,):
        beginnings.append(f"{key}=(-1.0,)")
    if isinstance(value, dict):
        beginnings += [f"{key}.x=1", f"{key} has no "]
    return message.startswith(tuple(beginnings)) and len(message) <= LONGEST


def replaced(config: Any, path: list[str], value: Any) -> Any:
    """The nested mapping with one value replaced; other sections stay the same objects."""
    name, *rest = path
    return {**config, name: replaced(config[name], rest, value) if rest else value}


def defaults() -> dict[str, tuple[type, dict[str, Any]]]:
    """The defaults of both systems, with a recipe, by name."""
    m2mkd, cliptrans = m2mkd_jax.config, cliptrans_jax.config
    recipes = {"distill": m2mkd.Recipe()}
    configs = {
        "m2mkd": m2mkd.Config(recipes=recipes),
        "m2mkd nac": m2mkd.Config(model=NacConfig()),
        "cliptrans": cliptrans.Config(recipes={"caption": cliptrans.Recipe()}),
    }
    return {name: (type(one), unfreeze(one).to_dict()) for name, one in configs.items()}


def shipped() -> dict[str, tuple[type, dict[str, Any]]]:
    """Every config file, as a pipeline or for the phase it has, by name."""
    found = {}
    for path in sorted((ROOT / "configs").rglob("*.py")):
        if "def get_config(" not in path.read_text():
            continue
        system = path.parent.name
        package, kind = (m2mkd_jax, "phase") if system == "m2mkd" else (cliptrans_jax, "stage")
        read = runpy.run_path(str(path))["get_config"]
        for arg in ("pipeline", "end_to_end", "translate"):
            with contextlib.suppress(ValueError):
                config = read(f"{kind}={arg}")
                found[f"{system}/{path.stem}"] = (package.config.Config, config.to_dict())
                break
        else:
            raise AssertionError(f"{path} has none of the phases")
    return found


@dataclasses.dataclass
class Counts:
    """What happened to the values tried on one config."""

    fields: int = 0
    tried: int = 0
    refused: int = 0
    allowed: int = 0


def try_all(
    configs: Mapping[str, tuple[type, dict[str, Any]]],
) -> tuple[dict[str, Counts], list[str], set[int]]:
    """Every value in every field.

    Returns:
      Counts by config, a line for each miss, and the rows of the tables that allowed something.
    """
    counts, misses, used = {}, [], set()
    for name, (cls, plain) in configs.items():
        frozen = freeze(cls, plain)
        whole = {field.name: getattr(frozen, field.name) for field in dataclasses.fields(cls)}
        count = counts[name] = Counts()
        for key in leaves(plain):
            path = key.split(".")
            # The other sections are frozen already, since freezing takes most of the time.
            mixed = {**whole, path[0]: plain[path[0]]}
            count.fields += 1
            for value in VALUES:
                rows = allowing(name, key, value)
                count.tried += 1
                problem = judge(cls, replaced(mixed, path, value), f"config.{key}", value, rows)
                problem = problem or judge_section(frozen, path, value, rows)
                if problem:
                    misses.append(f"{name}: {problem}")
                elif rows:
                    count.allowed += 1
                    used.update(rows)
                else:
                    count.refused += 1
    return counts, misses, used


def judge(cls: type, config: dict[str, Any], key: str, value: Any, rows: list[int]) -> str | None:
    """What is wrong with how `freeze` treats a config that has `value` under `key`."""
    try:
        freeze(cls, config)
    except ValueError as error:
        if rows:
            return f"{key}={describe(value)} is allowed by the table, and refused: {error}"
        if not is_named(str(error), key, value):
            return f"{key}={describe(value)} is not what this message begins with: {error}"
        return None
    except Exception as error:
        return f"{key}={describe(value)} ends in {type(error).__name__}: {error}"
    return None if rows else f"{key}={describe(value)} passes and is not in the table"


def judge_section(config: Any, path: list[str], value: Any, rows: list[int]) -> str | None:
    """The same for a dataclass constructed in Python, whose messages start with the field's name;
    values of another type are left to type checkers."""
    section = functools.reduce(
        lambda at, name: at[name] if isinstance(at, dict) else getattr(at, name), path[:-1], config
    )
    if isinstance(section, dict) or rows or re.fullmatch(ABOVE, ".".join(path)):
        return None
    now = getattr(section, path[-1])
    elements = set(map(type, value)) if isinstance(value, tuple) else set()
    alike = type(now) is type(value) and elements <= {type(one) for one in elements and now}
    if not alike or isinstance(value, dict):
        return None
    try:
        dataclasses.replace(section, **{path[-1]: value})
    except ValueError as error:
        where = f"{type(section).__name__}({path[-1]}={describe(value)})"
        return None if is_named(str(error), path[-1], value) else f"{where} says: {error}"
    return f"{type(section).__name__}({path[-1]}={describe(value)}) passes"


# Command lines: config file with arguments, flag, and how the message starts.
DIGITS, NAC, EMOJI = (
    f"{ROOT}/configs/{name}.py" for name in ("m2mkd/digits", "m2mkd/digits_nac", "cliptrans/emoji")
)
COMMANDS = (
    (f"{DIGITS}:phase=distill", "optim.lr=-1", "config.optim.lr=-1.0 must be at least 0"),
    (f"{DIGITS}:phase=distill", "optim.lr=nan", "config.optim.lr=nan must be at least 0"),
    (f"{DIGITS}:phase=distill", "optim.clip=-1", "config.optim.clip=-1.0 must be positive"),
    (f"{DIGITS}:phase=distill", "optim.b2=1", "config.optim.b2=1.0 must be in [0, 1)"),
    (f"{DIGITS}:phase=distill", "optim.no_decay=(", "config.optim.no_decay='(' must be a regular"),
    (f"{DIGITS}:phase=distill", "baseline.alpha=2", "config.baseline.alpha=2.0 must be in [0, 1]"),
    (f"{DIGITS}:phase=distill", "distill.tau=nan", "config.distill.tau=nan must be positive"),
    (f"{DIGITS}:phase=distill", "meta.heads=5", "config.meta.heads=5 must divide width="),
    (f"{DIGITS}:phase=distill", "seed=4294967296", "config.seed=4294967296 must be from 0"),
    (f"{DIGITS}:phase=distill", "optim.lr_per=0", "config.optim.lr_per=0 must be at least 1"),
    (f"{DIGITS}:phase=distill", "augment.mixup=nan", "config.augment.mixup=nan must be at least 0"),
    (f"{DIGITS}:phase=distill", "meta.depths=(1,0)", "config.meta.depths[1]=0 must be at least 1"),
    (
        f"{DIGITS}:phase=pipeline",
        "recipes.distill.optim.schedule=cosin",
        "config.recipes.distill.optim.schedule='cosin' must be one of",
    ),
    (
        f"{DIGITS}:phase=pipeline",
        "recipes.assemble.optim.warmup_epochs=-1",
        "config.recipes.assemble.optim.warmup_epochs=-1 must be at least 0",
    ),
    (
        f"{DIGITS}:phase=pretrain_meta",
        "meta.patch=3",
        "config.meta.patch=3 must divide config.data.image_size=8",
    ),
    (f"{NAC}:phase=distill", "model.iterations=0", "config.model.iterations=0 must be at least 1"),
    (f"{EMOJI}:stage=caption", "clip.image.heads=7", "config.clip.image.heads=7 must divide width"),
    (
        f"{EMOJI}:stage=caption",
        "clip_tokenizer.kind=mbrt50",
        "config.clip_tokenizer.kind='mbrt50' must be one of",
    ),
    (
        f"{EMOJI}:stage=caption",
        "decode.length_penalty=inf",
        "config.decode.length_penalty=inf must be in [-10, 10]",
    ),
    (
        f"{EMOJI}:stage=pipeline",
        "model.mapper.dropout=nan",
        "config.model.mapper.dropout=nan must be in [0, 1)",
    ),
    (
        f"{EMOJI}:stage=pipeline",
        "run.checkpoint_minutes=nan",
        "config.run.checkpoint_minutes=nan must be positive, or None",
    ),
)


def run_command(config: str, flag: str, workdir: pathlib.Path) -> tuple[Any, str]:
    """Exit status and standard error of a command that should be refused early."""
    package = m2mkd_jax if "/m2mkd/" in config else cliptrans_jax
    argv = ["main", f"--config={config}", f"--workdir={workdir}", f"--config.{flag}"]
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            app.run(package.main.main, "", argv, system=package.config.SYSTEM)
    except SystemExit as stop:
        return stop.code, output.getvalue()
    return 0, output.getvalue()


def try_command(config: str, flag: str, beginning: str, folder: pathlib.Path) -> str | None:
    """What is wrong with how a command line is refused."""
    status, output = run_command(config, flag, folder / "run")
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    if status != 2 or len(errors) != 1 or not errors[0].startswith(f"error: {beginning}"):
        return f"--config.{flag} ends with status {status} and says {output.strip()!r}"
    if any(folder.iterdir()):
        return f"--config.{flag} writes {sorted(folder.rglob('*'))}"
    return None


def table(counts: Mapping[str, Counts], commands: int) -> str:
    """The counts as lines of a table."""
    lines = ["| config | fields | tried | refused | allowed |", "|---|---|---|---|---|"]
    for name, count in counts.items():
        lines.append(f"| {name} | " + " | ".join(map(str, dataclasses.astuple(count))) + " |")
    total = [sum(column) for column in zip(*map(dataclasses.astuple, counts.values()), strict=True)]
    lines.append("| all | " + " | ".join(map(str, total)) + " |")
    return "\n".join([*lines, f"{commands} command lines"])


def main() -> int:
    """Prints the table and every miss; returns 1 if there is one."""
    counts, misses, used = try_all(defaults() | shipped())
    rows = [row[-3:] for row in (*ALLOWED, *SOME)]
    misses += [f"row {rows[i]} allows nothing" for i in range(len(rows)) if i not in used]
    for command in COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            if problem := try_command(*command, pathlib.Path(folder)):
                misses.append(problem)
    print(table(counts, len(COMMANDS)))
    for line in (*(f"MISS {miss}" for miss in misses), f"{len(misses)} missed"):
        print(line)
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
