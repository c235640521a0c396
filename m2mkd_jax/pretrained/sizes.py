"""Inferring the config of a ViT or V-MoE from its tensors and from similar published networks."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from common_jax.config import freeze, unfreeze
from common_jax.untrusted import brief
from m2mkd_jax.config import Config
from m2mkd_jax.models.vit import ViTConfig
from m2mkd_jax.pretrained.hub import paths
from m2mkd_jax.pretrained.kinds import KINDS, Kind, alias_depths, count_blocks
from m2mkd_jax.pretrained.parts import PARTS, find, foreign_parts, read_parts
from m2mkd_jax.pretrained.reading import File, Source
from m2mkd_jax.pretrained.timm_names import TIMM_VITS

# Mean and std of ImageNet's images, as in DeiT and m2mKD.
IMAGENET = {"data.mean": (0.485, 0.456, 0.406), "data.std": (0.229, 0.224, 0.225)}
# Values in the published networks, for what the tensors of a middle module do not reveal.
PUBLISHED = {"patch": 16, "data.image_size": 224, "data.channels": 3, "data.labels": 1000}
SIZES = ("width", "hidden", "qkv_bias")  # a published network must match in these
NEAREST = ("patch", "data.image_size")  # distinguish networks that have the same parts
# Fields that tensors do not reveal, or not exactly.
UNSEEN = ("heads", "norm_eps", "activation", "layer_scale", "mlp_ratio")
OF_NAME = ("heads", "activation")  # that an unknown architecture leaves open
# Fields that distinguish CLIP's networks from others with the same tensors.
OF_CLIP = ("activation", "norm_eps")


@dataclasses.dataclass(frozen=True)
class Inferred:
    """A config, and where its values come from.

    Attributes:
      config: the default config with the sizes of a file.
      read: "config.x.y" -> value, read from the tensors or the numbers beside them.
      assumed: likewise, values that the file does not reveal, taken from published networks.
    """

    config: Config
    read: Mapping[str, Any]
    assumed: Mapping[str, Any]


def infer_config(source: Source, given: Collection[str] = ()) -> Inferred:
    """Infers the config of a ViT or a whole V-MoE.

    Args:
      source: see `find_source`.
      given: fields such as "teacher.heads" that the caller sets, which the file need not reveal.

    Raises:
      ValueError: for a kind whose tensors do not determine the config, for a network with
        unsupported parts, and for sizes that no published network has, since tensors do not reveal
        the number of heads.
    """
    kind, file = KINDS[source.kind], source.files[0]
    files, stated = kind.family.files, file.beside.fields
    if example := files.stage_config if kind.form.single else files.config:
        raise ValueError(
            f"{file.path}: the tensors of kind={source.kind!r} do not determine the whole network; "
            f"give its config, such as --config={example}"
        )
    tensors = _gather(source)
    if foreign := foreign_parts(tensors):
        raise ValueError(f"{file.path}: {foreign}")
    width, hidden = _widths(tensors, file)
    _require_known(kind, file, width, given)
    read, assumed = read_parts(tensors, width, stated, file.path)
    read["width"] = width
    if (kernel := tensors.get("patch_embed.proj.weight")) is not None and kernel.ndim == 4:
        read |= {"patch": kernel.shape[-1], "data.channels": kernel.shape[1]}
    if (head := tensors.get("head.weight")) is not None and head.ndim == 2:
        read["data.labels"] = head.shape[0]
    seen = assumed | read | {"hidden": hidden}
    agreed = _as_published(kind, seen, file, {*given, *paths(stated, kind.section)})
    read["mlp_ratio"] = agreed.pop("mlp_ratio", _ratio(hidden, width))
    if read["layer_scale"] is None:
        agreed.pop("layer_scale", None)
    else:  # the tensors have the learned values, not the initial one
        agreed = {"layer_scale": read.pop("layer_scale")} | agreed
    read |= stated | files.sizes(tensors)
    if depths := _depths(file, kind):
        read["depths"] = depths
    blocks = max(1, count_blocks(file.tensors))
    depths = (1,) * blocks if kind.form.shallow else (blocks,)
    assumed = agreed | assumed | PUBLISHED | _images(read) | {"depths": depths}
    return _make(kind, file, read, {name: x for name, x in assumed.items() if name not in read})


def _make(kind: Kind, file: File, read: Mapping[str, Any], assumed: Mapping[str, Any]) -> Inferred:
    """The config with these fields, and the fields by full path; fields of optional parts are left
    out if they have their default value."""
    network, fields = kind.family.config(), assumed | read
    config = unfreeze(Config())
    config[kind.section] = unfreeze(network)
    # config.module counts the stages of config.meta, so the meta model needs as many.
    fields = {"meta.depths": (1,) * len(fields["depths"])} | paths(fields, kind.section)
    config.update_from_flattened_dict(fields)
    try:
        frozen = freeze(Config, config)
    except ValueError as error:
        raise ValueError(f"{file.path} says {error}") from None
    usual = {name: getattr(network, name) for name in PARTS if name not in SIZES}
    shown = {name: x for name, x in read.items() if name not in usual or x != usual[name]}
    whole = (paths(some, kind.section).items() for some in (shown, assumed))
    return Inferred(frozen, *({f"config.{path}": x for path, x in some} for some in whole))


def _gather(source: Source) -> dict[str, np.ndarray]:
    """The tensors of all files, by name in the network, or else by name in their stage."""
    tensors = {}
    for file in source.files:
        own = {name: x for name, x in file.tensors.items() if not name.startswith("stages.")}
        in_stages = {re.sub(r"^stages\.\d+\.", "", name): x for name, x in file.tensors.items()}
        tensors |= own or in_stages
    return tensors


def _widths(tensors: Mapping[str, np.ndarray], file: File) -> tuple[int, int]:
    """The token width, and the width of an MLP's hidden layer."""
    norm, hidden = (
        tensors[name].shape if (name := find(tensors, rf"blocks\.\d+\.{regex}")) else ()
        for regex in (r"norm1\.weight", r"(mlp\.fc1|moe\.experts\.(\d+\.)?htoh4)\.bias")
    )
    if len(norm) != 1 or not norm[0] or not hidden:
        raise ValueError(
            f"cannot infer the sizes of {file.path}: in its blocks norm1.weight is {norm}, and "
            f"mlp.fc1.bias, or htoh4.bias of experts, is {hidden}; give a --config"
        )
    return norm[0], hidden[-1]


def _require_known(kind: Kind, file: File, width: int, given: Collection[str]) -> None:
    """Raises ValueError if a folder names an architecture that is not known, or that timm has with
    another width, unless what the tensors do not reveal is given or, for the former, stated."""
    beside, stated = file.beside, paths(file.beside.fields, kind.section)
    said = f"{beside.file} says architecture={beside.architecture!r}"
    if beside.width not in (None, width):
        why, known = f"which is {beside.width} wide in timm, not {width} like the tensors", given
    elif kind.family.files.timm and not _is_known(file, kind):
        why, known = f"which is none of the {len(TIMM_VITS)} known ViTs of timm", {*given, *stated}
    else:
        return
    needed = [f"{kind.section}.{name}" for name in OF_NAME]
    if missing := [f"--config.{name}" for name in needed if name not in known]:
        raise ValueError(
            f"{said}, {why}; the tensors do not reveal all of the computation: give "
            f"{', '.join(missing)} of the network that the file is from"
        )


def _is_known(file: File, kind: Kind) -> bool:
    """True unless the folder names an architecture that is neither timm's nor published."""
    name = file.beside.architecture
    return not name or name in TIMM_VITS or name in kind.family.files.variants


def _ratio(hidden: int, width: int) -> float:
    """The `mlp_ratio` that gives this hidden width, the integer part of ratio times width."""
    # width * (hidden / width) may round to just below `hidden`, which `int` would cut by one.
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _as_published(
    kind: Kind, seen: Mapping[str, Any], file: File, given: Collection[str]
) -> dict[str, Any]:
    """Fields that no tensor reveals, taken from the published networks with the same sizes; the
    config's defaults if there is no such network and the heads are given.

    Raises:
      ValueError: if the heads are neither given nor known from a published network, and if a
        network like CLIP's is not a published one and the fields that it needs are not given.
    """
    section, plain = kind.section, kind.family.config()
    same = _same_as(kind, seen, file)
    values = {name: {getattr(config, name) for config in same} for name in UNSEEN}
    agreed = {name: one.pop() for name, one in values.items() if len(one) == 1 and None not in one}
    if not {"heads", "norm_eps"} <= agreed.keys() and f"{section}.heads" not in given:
        sizes = ", ".join(f"{name} {seen[name]}" for name in SIZES)
        raise ValueError(
            f"{file.path} has the sizes of no published network ({sizes}), and its tensors do not "
            f"reveal the number of heads: give --config.{section}.heads=N, or a --config"
        )
    needed = [*(f"{section}.{name}" for name in OF_CLIP), *IMAGENET]
    missing = [f"--config.{name}" for name in needed if name not in given]
    if missing and seen.get("norm_pre") and not any(config.norm_pre for config in same):
        raise ValueError(
            f"{file.path} has a norm before its blocks (norm_pre), like CLIP's networks, whose "
            f"tensors do not reveal all of the computation: give {', '.join(missing)}"
        )
    return {"heads": 1, "norm_eps": plain.norm_eps, "activation": plain.activation} | agreed


def _same_as(kind: Kind, seen: Mapping[str, Any], file: File) -> list[ViTConfig]:
    """The published networks with the sizes of a file. If its name is known, only that one, and
    none for an unknown architecture; among them, those with the same parts, if any; among these,
    those with the same patch and image size, if any."""
    if kind.family.files.timm and not _is_known(file, kind):
        return []
    variants, name = kind.family.files.variants, file.beside.architecture
    name = name or file.plain.get("model_name")
    if isinstance(name, str) and name in variants:
        # Names come from the file, so the sizes are compared all the same.
        variants = {name: variants[name]}
    same = [
        (kind.family.config(**fields), {"data.image_size": side})
        for side, _, fields in variants.values()
    ]
    seen = seen | {"layer_scale": seen["layer_scale"] is not None}

    def agrees(config: ViTConfig, data: Mapping[str, int], names: Collection[str]) -> bool:
        shown = vars(config) | data | {"hidden": config.encoder.hidden}
        shown["layer_scale"] = config.layer_scale is not None
        return all(shown.get(name, seen[name]) == seen[name] for name in names if name in seen)

    same = [one for one in same if agrees(*one, SIZES)]
    for names in (seen.keys() - NEAREST, NEAREST):
        nearer = [one for one in same if agrees(*one, names)]
        if not nearer:
            break
        same = nearer
    return [config for config, _ in same]


def _images(read: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and std of the images: those of ImageNet, but 0.5 for ViTs without a class token, as in
    SigLIP, and for images that are not RGB."""
    channels = read.get("data.channels", PUBLISHED["data.channels"])
    halves = read.get("class_token") is False or channels != 3
    return {name: (0.5,) * channels if halves else numbers for name, numbers in IMAGENET.items()}


def _depths(file: File, kind: Kind) -> tuple[int, ...]:
    """Blocks in each stage, from the file's divided_depths or from its list of stages; () for a
    whole network with neither."""
    divided = file.plain.get("divided_depths")
    if divided and not (
        isinstance(divided, list | tuple)
        and len(divided) <= 1000
        and all(type(depth) is int and 0 < depth <= 1000 for depth in divided)
    ):
        raise ValueError(
            f"{file.path} has divided_depths={brief(divided)}, which should be the number of "
            "blocks in each stage"
        )
    depths = tuple(divided) if divided else alias_depths(file.tensors)
    if kind.form.single and not depths:
        raise ValueError(
            f"cannot infer from {file.path} how many blocks each stage of its network has: give a "
            f"--config, or --config.{kind.section}.depths=6,6,6,6"
        )
    return depths
