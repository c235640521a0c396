"""Kinds of files: which phase would have made their parameters, and how the original calls them."""

import dataclasses
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from m2mkd_jax import convert, convert_nac
from m2mkd_jax.config import Config
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.models.vmoe import VMoEConfig
from m2mkd_jax.nac.model import NacConfig
from m2mkd_jax.phases.networks import (
    meta_network,
    student_modules,
    teacher_network,
    whole_student,
)
from m2mkd_jax.pretrained.foreign import is_headless, named_elsewhere
from m2mkd_jax.stages import Place, stage_name

Tensors = Mapping[str, np.ndarray]
Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a file holds.

    Attributes:
      about: a line for people.
      example: a file's name.
      phase: the phase whose checkpoint has the same parameters.
      role: the key that they are under there.
      section: the field of the config with the network's sizes.
      sizes: the class of that section.
      single: whether it is one stage of a network.
      network: config -> the network; a single stage is one of its stages.
    """

    about: str
    example: str
    phase: str
    role: str
    section: str
    sizes: type
    single: bool
    network: Callable[[Config], Any]

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
        network = self.network(config)
        if stage is None:
            return jax.eval_shape(network.init, jax.random.key(0))
        return jax.eval_shape(lambda key: network.init(key, only=(stage,)), jax.random.key(0))

    def to_original(self, params: Params, config: Config, stage: int | None) -> dict[str, Any]:
        """The tensors of parameters, by the names in a file of this kind, experts apart."""
        channels = config.data.channels
        if self.is_nac and stage is None:
            return convert_nac.network_to_original(params, **_sharing(config.model))
        if self.is_nac:
            part = student_part(stage, len(config.model.depths))
            return convert_nac.part_to_original(params[stage_name(stage)], part)
        if stage is None:
            depths = self.depths(config)
            return convert.network_to_original(params, depths=depths, channels=channels)
        return convert.stage_to_original(params[stage_name(stage)], channels=channels)

    def from_original(self, state: Tensors, config: Config, stage: int | None) -> dict[str, Any]:
        """`to_original` backwards."""
        if self.is_nac and stage is None:
            return convert_nac.network_from_original(state, **_sharing(config.model))
        if self.is_nac:
            part = student_part(stage, len(config.model.depths))
            return {stage_name(stage): convert_nac.part_from_original(state, part)}
        heads = getattr(config, self.section).heads
        if stage is None:
            depths = self.depths(config)
            return convert.network_from_original(state, depths=depths, heads=heads)
        return {stage_name(stage): convert.stage_from_original(state, heads=heads)}


def student_part(stage: int, count: int) -> str:
    """The key of `convert_nac.PARTS` of a NAC's student."""
    place = {Place.FIRST: "read_in", Place.LAST: "read_out"}.get(Place.of(stage, count), "mediator")
    return f"{place}_student"


def expected_tensors(
    kind: Kind, config: Config, stage: int | None, shapes: Params | None = None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor that a file of this kind has with a config, experts apart: by its name our path
    and its shape. `shapes` are `kind.shapes`, where they are known."""
    shapes = kind.shapes(config, stage) if shapes is None else shapes
    flat = traverse_util.flatten_dict(shapes, sep="/")
    # Each parameter is filled with its number, which then stands in all tensors made of it. A
    # filled array takes no memory, nor does any view of it.
    filled = {
        path: np.broadcast_to(np.int32(number), leaf.shape)
        for number, (path, leaf) in enumerate(flat.items())
    }
    state = kind.to_original(traverse_util.unflatten_dict(filled, sep="/"), config, stage)
    paths = list(flat)
    return {name: (paths[int(np.ravel(x)[0])], x.shape) for name, x in state.items()}


def guess(tensors: Tensors, plain: Mapping[str, Any], file: str) -> str:
    """The kind that the tensors' names tell.

    Raises:
      ValueError: where they tell none, or leave a choice.
    """
    names = set(tensors)
    experts = any(".moe." in name for name in names)
    stitches = any(re.search(r"(pre|post)_stitch\.(ln|fc)\.", name) for name in names)
    whole = {"cls_token", "head.weight"} <= names
    if any(name.startswith("latent_graphs.") for name in names):
        return "nac"
    if any(name.startswith(("tokenizer.backbone.", "latent_attention.")) for name in names):
        return "nac_student"
    if "model_name" in plain:
        return "teacher_module"
    if experts or stitches:
        return "vmoe" if whole else "vmoe_student"
    if whole:
        depths = alias_depths(tensors)
        return "meta" if len(depths) > 1 and set(depths) == {1} else "teacher"
    if is_headless(names):
        raise ValueError(
            f"{file} holds a ViT without its classifier (head.weight), as timm leaves it with "
            "num_classes=0: a teacher's and a meta model's logits need one. Take the file with "
            "its head, or train one first"
        )
    if whose := named_elsewhere(names):
        raise ValueError(
            f"{file} holds a ViT under {whose} names, which are not read: take timm's file of the "
            "same model, such as timm/vit_base_patch16_224.augreg_in21k_ft_in1k or "
            "timm/deit_base_patch16_224.fb_in1k"
        )
    if any(name.startswith("blocks.") for name in names):
        raise ValueError(
            f"{file} holds a part of a ViT, and its names do not tell which: give "
            "--kind=teacher_module for one of a trained teacher, --kind=module for one that is "
            "to be assembled"
        )
    raise ValueError(
        f"{file} is of no kind that names tell, {sorted(KINDS)}: its tensors are called "
        f"{sorted(names)[:4]}"
    )


def alias_depths(tensors: Tensors) -> tuple[int, ...]:
    """Blocks in each stage as the names `stages.<i>.blocks.<j>` have it; () without such names."""
    blocks = {}
    for name in tensors:
        if match := re.match(r"stages\.(\d{1,4})\.blocks\.(\d{1,4})\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    depths = tuple(len(blocks.get(i, ())) for i in range(max(blocks, default=-1) + 1))
    return depths if all(depths) else ()


def _sharing(config: NacConfig) -> dict[str, Any]:
    return {
        name: getattr(config, name) for name in ("iterations", "share_propagators", "share_ffns")
    }


KINDS: Mapping[str, Kind] = types.MappingProxyType(
    {
        "meta": Kind(
            about="a whole ViT as meta model (PT), for config.sources.meta",
            example="PT_huge.pth",
            phase="pretrain_meta",
            role="meta",
            section="meta",
            sizes=ViTConfig,
            single=False,
            network=meta_network,
        ),
        "teacher": Kind(
            about="a whole ViT or DeiT, timm's too, as teacher (FT), for config.sources.teacher",
            example="deit_base_patch16_224.pth",
            phase="assemble",
            role="teacher",
            section="teacher",
            sizes=ViTConfig,
            single=False,
            network=teacher_network,
        ),
        "teacher_module": Kind(
            about="a module cut from a teacher, or a folder of all, for config.sources.teacher",
            example="FT_huge/vit_huge_patch14_224_0.pth",
            phase="assemble",
            role="teacher",
            section="teacher",
            sizes=ViTConfig,
            single=True,
            network=teacher_network,
        ),
        "module": Kind(
            about="a module as phase train_module makes it (MT), for config.sources.modules",
            example="MT_0/finished_checkpoint.pth",
            phase="train_module",
            role="module",
            section="teacher",
            sizes=ViTConfig,
            single=True,
            network=teacher_network,
        ),
        "vmoe": Kind(
            about="a whole V-MoE, for config.sources.network",
            example="vmoe_base.pth",
            phase="end_to_end",
            role="student",
            section="model",
            sizes=VMoEConfig,
            single=False,
            network=whole_student,
        ),
        "vmoe_student": Kind(
            about="a V-MoE student module, or a folder of all, for config.sources.students",
            example="student_0/finished_checkpoint.pth",
            phase="distill",
            role="student",
            section="model",
            sizes=VMoEConfig,
            single=True,
            network=student_modules,
        ),
        "nac": Kind(
            about="a whole NAC, for config.sources.network",
            example="nac_scale_imnet.pth",
            phase="end_to_end",
            role="student",
            section="model",
            sizes=NacConfig,
            single=False,
            network=whole_student,
        ),
        "nac_student": Kind(
            about="a NAC's student module, or a folder of all, for config.sources.students",
            example="MediatorStudent_1.pth",
            phase="distill",
            role="student",
            section="model",
            sizes=NacConfig,
            single=True,
            network=student_modules,
        ),
    }
)
