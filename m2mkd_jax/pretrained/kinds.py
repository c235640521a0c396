"""Kinds of files: which phase would have made their parameters, and the names of their tensors."""

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from common_jax.untrusted import brief
from common_jax.weights.table import Table, describe_nearest, rank_kinds
from m2mkd_jax.config import Config
from m2mkd_jax.models import vit_names
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.nac import names as nac_names
from m2mkd_jax.nac.layers import LinearConfig
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.phases.networks import (
    meta_network,
    student_modules,
    teacher_network,
    whole_student,
)
from m2mkd_jax.pretrained.foreign import named_elsewhere
from m2mkd_jax.stages import Place, stage_name

Tensors = Mapping[str, np.ndarray]
# A tensor that networks have, as regex: ViTs and V-MoEs, whole or in stages, whole NACs, and stages
# of these.
_VIT, _NAC = r"(?:stages\.\d+\.)?blocks\.\d+\.norm1\.weight", r"latent_graphs\.\d+\..*"
_NAC_STAGE = r"(?:tokenizer\.backbone|latent_attention)\..*"
WHOLE = (_VIT, _NAC)  # of networks that are found below a prefix


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      about: a line for people.
      phase: the phase whose checkpoint has the same parameters.
      role: the key that they are under there.
      section: the field of the config with the network's sizes.
      sizes: the class of that section.
      single: whether it is one stage of a network.
      marker: regex of a tensor that such files have.
    """

    about: str
    phase: str
    role: str
    section: str
    sizes: type = ViTConfig
    single: bool = False
    marker: str = _VIT

    @property
    def loads_in_timm(self) -> bool:
        """True for whole ViTs, whose tensors have timm's names."""
        return self.sizes is ViTConfig and not self.single

    @property
    def is_nac(self) -> bool:
        return self.sizes is NacConfig

    def depths(self, config: Config) -> tuple[int, ...]:
        """Blocks in each stage of the network."""
        return getattr(config, self.section).depths

    def shapes(self, config: Config, stage: int | None) -> dict[str, Any]:
        """Shapes of the parameters that a file gives, one subtree a stage.

        Raises:
          ValueError: when config.SECTION is of another kind of network.
        """
        sizes = getattr(config, self.section)
        if type(sizes) is not self.sizes:
            raise ValueError(
                f"config.{self.section} is a {type(sizes).__name__}, and this kind of file needs a "
                f"{self.sizes.__name__}: give the config of such a network"
            )
        builders = {"meta": meta_network, "teacher": teacher_network}
        students = student_modules if self.single else whole_student
        network = builders.get(self.section, students)(config)
        if stage is None:
            return jax.eval_shape(network.init, jax.random.key(0))
        return jax.eval_shape(lambda key: network.init(key, only=(stage,)), jax.random.key(0))

    def table(self, config: Config, stage: int | None) -> Table:
        """The names in a file of this kind, by our paths in all stages or in one."""
        sizes = getattr(config, self.section)
        if self.is_nac and stage is None:
            return nac_names.network_table(sizes)
        place = None if stage is None else Place.of(stage, len(sizes.depths))
        if self.is_nac:
            own = nac_names.student_table(sizes, place)
        else:
            layout = {
                "heads": sizes.heads,
                "channels": config.data.channels,
                "experts": sizes.moe.experts if self.sizes is VMoEConfig else 0,
                "norm_after_pool": sizes.norm_after_pool,
            }
            if stage is None:
                return vit_names.network_table(sizes.depths, **layout)
            own = vit_names.stage_table(sizes.depths[stage], place, **layout)
        return own.below(source="", target=f"{stage_name(stage)}/")

    def examples(self) -> Iterable[Table]:
        """Tables of such files of small networks, which distinguish the kinds."""
        if self.is_nac:
            for kind in nac_names.CODE_LINEAR:
                config = NacConfig(linear=LinearConfig(kind=kind), iterations=1)
                if self.single:
                    yield from (nac_names.student_table(config, p) for p in nac_names.STUDENTS)
                else:
                    yield nac_names.network_table(config)
            return
        for norm_after_pool in (False, True):
            layout = {
                "heads": 1,
                "experts": int(self.sizes is VMoEConfig),
                "norm_after_pool": norm_after_pool,
            }
            if self.single:
                places = (Place.FIRST, Place.MIDDLE, Place.LAST)
                yield from (vit_names.stage_table(1, place, **layout) for place in places)
            else:
                yield vit_names.network_table((1, 1), **layout)


def guess(tensors: Tensors, plain: Mapping[str, Any], file: str) -> str:
    """The kind whose table claims the most of the tensors.

    Kinds of the same names are distinguished by what else a file says: the original writes
    "model_name" beside a teacher's modules, and lists a meta model as stages of one block.

    Raises:
      ValueError: where no kind claims them, or several do.
    """
    names = set(tensors)
    formats = [(name, kind.marker, kind.examples) for name, kind in KINDS.items()]
    claims = [claim for claim in rank_kinds(formats, names) if not claim.prefix]
    if claims and not KINDS[claims[0].kind].is_nac and "model_name" in plain:
        return "teacher_module"
    best = [claim.kind for claim in claims if len(claim.misfits) == len(claims[0].misfits)]
    match best:
        case ["meta", "teacher", *_]:
            depths = alias_depths(tensors)
            return "meta" if len(depths) > 1 and set(depths) == {1} else "teacher"
        case ["teacher_module", "module", *_]:
            raise ValueError(
                f"{file} holds a part of a ViT, and its names do not say which: give "
                "--kind=teacher_module for one of a trained teacher, --kind=module for one that is "
                "to be assembled"
            )
        case [first, *_]:
            return first
    if whose := named_elsewhere(names):
        raise ValueError(
            f"{file} holds a ViT under {whose} names, which are not read: take timm's file of the "
            "same model, such as timm/vit_base_patch16_224.augreg_in21k_ft_in1k or "
            "timm/deit_base_patch16_224.fb_in1k"
        )
    raise ValueError(
        f"{file} is of no kind by its names, {sorted(KINDS)}: its tensors are called "
        f"{brief(sorted(names)[:4])}{describe_nearest(formats, names)}"
    )


def alias_depths(tensors: Tensors) -> tuple[int, ...]:
    """Blocks in each stage as the names `stages.<i>.blocks.<j>` have it; () without such names."""
    blocks = {}
    for name in tensors:
        if match := re.match(r"stages\.(\d{1,4})\.blocks\.(\d{1,4})\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    depths = tuple(len(blocks.get(i, ())) for i in range(max(blocks, default=-1) + 1))
    return depths if all(depths) else ()


KINDS: Mapping[str, Kind] = types.MappingProxyType(
    {
        "meta": Kind(
            "a whole ViT as meta model (PT), for config.sources.meta",
            *("pretrain_meta", "meta", "meta"),
        ),
        "teacher": Kind(
            "a whole ViT or DeiT, timm's too, as teacher (FT), for config.sources.teacher",
            *("assemble", "teacher", "teacher"),
        ),
        "teacher_module": Kind(
            "a module cut from a teacher, or a folder of all, for config.sources.teacher",
            *("assemble", "teacher", "teacher"),
            single=True,
        ),
        "module": Kind(
            "a module as phase train_module makes it (MT), for config.sources.modules",
            *("train_module", "module", "teacher"),
            single=True,
        ),
        "vmoe": Kind(
            "a whole V-MoE, for config.sources.network",
            *("end_to_end", "student", "model", VMoEConfig),
        ),
        "vmoe_student": Kind(
            "a V-MoE student module, or a folder of all, for config.sources.students",
            *("distill", "student", "model", VMoEConfig),
            single=True,
        ),
        "nac": Kind(
            "a whole NAC, for config.sources.network",
            *("end_to_end", "student", "model", NacConfig),
            marker=_NAC,
        ),
        "nac_student": Kind(
            "a NAC's student module, or a folder of all, for config.sources.students",
            *("distill", "student", "model", NacConfig),
            single=True,
            marker=_NAC_STAGE,
        ),
    }
)
