"""The kinds of students, V-MoE and NAC: what phases need to know of each."""

import dataclasses
import types
from collections.abc import Callable, Mapping

from common_jax.config import under
from common_jax.mesh import Rules
from common_jax.weights import Allowance
from m2mkd_jax.config import Config
from m2mkd_jax.models import encoder, vmoe
from m2mkd_jax.nac import model as nac
from m2mkd_jax.nac.network import NacNetwork
from m2mkd_jax.stages import Network


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of student.

    Attributes:
      whole: config, stochastic depth -> the whole network.
      modules: config, stochastic depth -> its students, one a stage.
      rules: partition rules of both.
      head: regex of the parameters of the classifier.
      left: what students have that finds no place in the whole network.
      fresh: what the whole network has and takes from no student.
    """

    whole: Callable[[Config, float], Network | NacNetwork]
    modules: Callable[[Config, float], Network]
    rules: Rules
    head: str
    left: Callable[[Config], tuple[Allowance, ...]]
    fresh: Callable[[Config], tuple[Allowance, ...]]


def family(config: Config) -> Family:
    """The family of config.model."""
    return FAMILIES[config.model.kind]


def whole_student(config: Config, *, drop_path: float = 0.0) -> Network | NacNetwork:
    """The whole student network."""
    with under("config.model"):
        return family(config).whole(config, drop_path)


def student_modules(config: Config, *, drop_path: float = 0.0) -> Network:
    """The student network cut into students, one a stage."""
    with under("config.model"):
        return family(config).modules(config, drop_path)


def _vmoe_whole(config: Config, drop_path: float) -> Network:
    kept = config.model.stitches == "kept"
    return vmoe.build(
        config.model,
        config.interface,
        stitch_width=config.meta.width if kept else None,
        dtype=config.dtype,
        drop_path=drop_path,
    )


def _vmoe_modules(config: Config, drop_path: float) -> Network:
    return vmoe.build_students(
        config.model,
        config.interface,
        meta_width=config.meta.width,
        dtype=config.dtype,
        drop_path=drop_path,
    )


def _vmoe_left(config: Config) -> tuple[Allowance, ...]:
    if config.model.stitches == "kept":
        return ()
    regex = r"student/stage_\d+/block_\d+/(pre|post)_stitch/.*"
    return (Allowance(regex, "config.model.stitches='dropped'"),)


def _nac_whole(config: Config, drop_path: float) -> NacNetwork:
    return nac.build(config.model, config.interface, dtype=config.dtype, drop_path=drop_path)


def _nac_modules(config: Config, drop_path: float) -> Network:
    return nac.build_students(
        config.model,
        config.interface,
        meta_width=config.meta.width,
        meta_tokens=encoder.tokens(config.meta.encoder, config.interface),
        seed=config.seed,
        dtype=config.dtype,
        drop_path=drop_path,
    )


def _nac_left(config: Config) -> tuple[Allowance, ...]:
    model = config.model
    left = [Allowance(r"student/stage_\d+/(pre|post)_stitch/.*", "stitches are for distillation")]
    later = "|".join(str(stage) for stage in range(2, model.iterations + 1))
    if model.share_propagators and later:
        reason = "config.model.share_propagators takes the first mediator student alone"
        left.append(Allowance(rf"student/stage_({later})/(attention|ffn)/.*", reason))
    if model.share_ffns and later:
        reason = "config.model.share_ffns takes the MLP of the first mediator student alone"
        left.append(Allowance(rf"student/stage_({later})/ffn/.*", reason))
    if model.students == "tinyimagenet":
        left += _smaller_data()
    return tuple(left)


def _nac_fresh(config: Config) -> tuple[Allowance, ...]:
    fresh = [
        Allowance(r"student/graph/.*", "latents and seeder are in no student"),
        Allowance(r"student/stage_\d+/attention/bandwidth", "students attend without a kernel"),
        Allowance(r"student/stage_\d+/code_head/.*", "students have no code-conditioned head"),
    ]
    if config.model.students == "tinyimagenet":
        fresh += _smaller_data()
    return tuple(fresh)


def _smaller_data() -> list[Allowance]:
    """What students of ImageNet cannot give to a network of smaller images and other labels."""
    reason = "config.model.students='tinyimagenet'"
    return [
        Allowance(r"student/stage_\d+/tokenizer/grid", reason),
        Allowance(r"student/stage_\d+/pooling/.*", reason),
    ]


FAMILIES: Mapping[str, Family] = types.MappingProxyType(
    {
        "vmoe": Family(
            whole=_vmoe_whole,
            modules=_vmoe_modules,
            rules=vmoe.PARTITION_RULES,
            head=r"student/stage_\d+/head/.*",
            left=_vmoe_left,
            fresh=lambda config: (),
        ),
        "nac": Family(
            whole=_nac_whole,
            modules=_nac_modules,
            rules=nac.PARTITION_RULES,
            head=r"student/stage_\d+/pooling/head/.*",
            left=_nac_left,
            fresh=_nac_fresh,
        ),
    }
)
