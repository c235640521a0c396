"""The family of NACs: m2mKD students whose latents form a graph."""

from common_jax.config import FieldError
from common_jax.weights import Allowance
from common_jax.weights.table import Table
from m2mkd_jax.families.circuit import (
    CAPTION,
    PICTURE,
    check_circuit,
    circuit_init,
    circuit_regularizer,
    draw_circuit,
    sketch_circuit,
    start_circuit,
)
from m2mkd_jax.families.family import Context, Family, FileNames, Preparation
from m2mkd_jax.nac import model, names
from m2mkd_jax.nac.layers import LinearConfig
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.nac.network import NacNetwork
from m2mkd_jax.stages import Network, Place


def build_whole(section: NacConfig, context: Context, drop_path: float) -> NacNetwork:
    """The whole NAC."""
    return model.build(section, context.interface, dtype=context.dtype, drop_path=drop_path)


def build_modules(section: NacConfig, context: Context, drop_path: float) -> Network:
    """The NAC cut into students: read-in, mediator iterations and read-out.

    Raises:
      ValueError: with pooling "first_slot".
    """
    if section.pooling == "first_slot":
        raise ValueError(
            "config.model.pooling='first_slot' takes the first output of the code-conditioned head "
            "as logits, and students have no such head: use another pooling, or train the NAC from "
            "scratch with phase='end_to_end'"
        )
    return model.build_students(
        section,
        context.interface,
        meta_width=context.meta_width,
        meta_tokens=context.meta_tokens(),
        seed=context.seed,
        dtype=context.dtype,
        drop_path=drop_path,
    )


def left(section: NacConfig) -> tuple[Allowance, ...]:
    """Stitches and, if iterations share parameters, those parameters of all mediator students after
    the first."""
    stitches = Allowance(r"student/stage_\d+/(pre|post)_stitch/.*", "stitches are for distillation")
    # What depends on the data is in `fresh` as well: students and NAC both have it, in other
    # shapes.
    allowances = [stitches, *_unlike_students(section)]
    if section.read_in == "projection":
        reason = "config.model.read_in='projection' has no attention"
        allowances.append(Allowance(r"student/stage_0/read_in/attention/.*", reason))
    later = "|".join(str(stage) for stage in range(2, section.iterations + 1))
    if section.share_propagators and later:
        reason = "config.model.share_propagators takes only the first mediator student"
        allowances.append(Allowance(rf"student/stage_({later})/(attention|ffn)/.*", reason))
    if section.share_ffns and later:
        reason = "config.model.share_ffns takes only the first mediator student's MLP"
        allowances.append(Allowance(rf"student/stage_({later})/ffn/.*", reason))
    return tuple(allowances)


def fresh(section: NacConfig) -> tuple[Allowance, ...]:
    """Latents, kernel bandwidths, code-conditioned heads and read-ins by projection."""
    return (
        Allowance(r"student/graph/.*", "students have no latents and no seeder"),
        Allowance(r"student/stage_\d+/attention/bandwidth", "students attend without a kernel"),
        Allowance(r"student/stage_\d+/code_head/.*", "students have no code-conditioned head"),
        Allowance(r"student/stage_0/read_in/projection/.*", "students read in by attention"),
        *_unlike_students(section),
    )


def _unlike_students(section: NacConfig) -> tuple[Allowance, ...]:
    """Parameters that students and NAC both have, in shapes that differ."""
    allowances = []
    if section.students == "tinyimagenet":
        # Grid and pooling depend on image size and labels, which differ from the students'.
        reason = "config.model.students='tinyimagenet'"
        allowances.append(Allowance(r"student/stage_\d+/tokenizer/grid", reason))
        allowances.append(Allowance(r"student/stage_\d+/pooling/.*", reason))
    elif section.read_out_head:
        reason = "config.model.read_out_head=True pools logits, students pool states"
        allowances.append(Allowance(r"student/stage_\d+/pooling/.*", reason))
    return tuple(allowances)


def head(section: NacConfig) -> str:
    """The layer that makes logits: the code-conditioned head, with all that follows it, or the last
    layer of the pooling."""
    # Without that head, not the confidences of the pooling: few-shot trains the classifier alone,
    # as in the original. With it, the pooling is over logits, and as wide as there are labels.
    layers = "(code_head/linear|pooling)" if section.read_out_head else "pooling/head"
    return rf"\w+/stage_\d+/{layers}/.*"


def check_noise(section: NacConfig, noise: str) -> None:
    """Raises FieldError if the kernel samples edges but evaluation draws no random numbers."""
    if section.kernel.evaluation == "sample" and noise == "mean":
        raise FieldError(
            "model.kernel.evaluation='sample' draws edges, but evaluation.noise='mean' draws "
            "nothing: change one of them"
        )


def idle(section: NacConfig) -> dict[str, str]:
    """What graph, read-out, layers and kernel do not read; of the last two, nothing if iterations
    differ."""
    found = {f"prior.{name}": why for name, why in section.prior.idle.items()}
    if not section.read_out_head:
        found["read_out_head_norm"] = "config.model.read_out_head=False"
    if section.pooling == "first_slot":
        found["temperature"] = "config.model.pooling='first_slot' weighs no latents"
    if section.layerwise:
        return found
    kernel, kind = section.kernel, section.linear.kind
    if kind != "modulated":
        names = ("normalization", "gain", "learnable_gain", "add_one", "renormalization", "dropout")
        why = f"config.model.linear.kind={kind!r} has no scales"
        found |= {f"linear.{name}": why for name in names}
    if kernel.truncation is None:
        why = "config.model.kernel.truncation=None cuts no edges"
        found |= {f"kernel.{name}": why for name in ("truncation_kind", "straight_through")}
    if not kernel.stochastic:
        why = "config.model.kernel.stochastic=False samples no edges"
        found |= {f"kernel.{name}": why for name in ("temperature", "evaluation")}
    if not section.mask:
        # A regulariser and the picture of the graph still read the rest of the kernel.
        names = ("stochastic", "temperature", "evaluation", "empty_row")
        why = "config.model.mask=False attends to all latents"
        found |= {f"kernel.{name}": why for name in names}
    return found


def table(section: NacConfig, channels: int, stage: int | None) -> Table:
    """Tensor names of the whole network, or of a student."""
    if stage is None:
        return names.network_table(section)
    return names.student_table(section, Place.of(stage, len(section.depths)))


FILES = FileNames(
    network="NAC",
    table=table,
    # The kinds differ in tensor names. One iteration is enough, since numbers in names are ignored.
    examples=tuple(
        NacConfig(linear=LinearConfig(kind=kind), iterations=1) for kind in names.CODE_LINEAR
    ),
    marker=r"latent_graphs\.\d+\..*",
    stage_marker=r"(?:tokenizer\.backbone|latent_attention)\..*",
    first=("tokenizer.positional_grid.grid",),
    last=("tokenizer.to_logits.weight",),
    config="configs/m2mkd/nac_imagenet.py",
    stage_config="configs/m2mkd/nac_imagenet.py",
)
FAMILY = Family(
    config=NacConfig,
    roles=("model",),
    whole=build_whole,
    modules=build_modules,
    rules=model.PARTITION_RULES,
    head=head,
    files=FILES,
    # Code noise, sampled edges, initial latent states and the Gumbel noise of the pooling.
    streams=("drop_path", "code", "kernel", "state", "pooling"),
    evaluation_streams=("state", "pooling", "kernel"),
    left=left,
    fresh=fresh,
    check_noise=check_noise,
    idle=idle,
    preparation=Preparation(
        check=check_circuit,
        sketch=sketch_circuit,
        make=start_circuit,
        init=circuit_init,
        trainable=NacConfig.trainable,
        regularizer=circuit_regularizer,
        draw=draw_circuit,
        picture=PICTURE,
        caption=CAPTION,
    ),
)
