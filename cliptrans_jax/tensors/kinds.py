"""The kinds of published networks: the names of their tensors, and where their sizes come from."""

import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from cliptrans_jax.models import cliptrans_names
from cliptrans_jax.models.cliptrans import ModelConfig, Translator
from cliptrans_jax.tensors import config_json, open_clip, siglip_json, sizes
from cliptrans_jax.tensors.config_json import CONFIG, Hf
from cliptrans_jax.towers import (
    clip,
    clip_names,
    mclip,
    mclip_names,
    resnet,
    resnet_names,
    siglip,
    siglip_names,
)
from cliptrans_jax.towers.tower import Pictures, Tower
from cliptrans_jax.translators import mbart, mbart_names, nllb, nllb_names
from common_jax.untrusted import brief
from common_jax.weights.table import (
    Format,
    Table,
    choose_prefix,
    describe_nearest,
    prefixes,
    rank_kinds,
)

Tensors = Mapping[str, np.ndarray]

# The files that OpenAI published; all of their towers use quick GELU.
OPENAI_FILES = (
    *("RN50.pt", "RN101.pt", "RN50x4.pt", "RN50x16.pt", "RN50x64.pt"),
    *("ViT-B-32.pt", "ViT-B-16.pt", "ViT-L-14.pt", "ViT-L-14-336px.pt"),
)
# Model types that resemble supported ones but are not, and what to say about them.
UNSUPPORTED = types.MappingProxyType(
    {
        "nllb-moe": "NLLB-200's mixture of experts (54B), which is not supported; use a dense "
        "NLLB-200, of 600M to 3.3B parameters"
    }
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One naming scheme for a network's tensors.

    Attributes:
      marker: regex of a tensor that all files of this layout have.
      foreign: regex of tensors that show that a file with the marker has another layout after all.
      config_type: class of the config.
      shapes: config -> shapes of our parameters.
      table: config -> table of names.
      pictures: how an image tower's pictures are preprocessed.
      names: model types and classes in config.json that mean this kind; a whole CLIP or SigLIP
        counts as its image tower.
      about: name of the JSON file beside the weights.
      from_about: (content of that file, the weights' file) -> config; None if it has no config.
      to_about: config -> content of that file, for export; None if this layout is not written.
      about_unused: its keys for dropout rates that have no effect here; a note gives their values.
      side: "text" or "vision" if that file may have a section for this tower.
      dropout: the config field with the dropout rate of a network that is trained here.
      from_tensors: (tensors, their file, given fields) -> config, inferred from shapes; None for
        the defaults.
      unstated: config fields that shapes do not show; without the JSON file, the values of the
        published models are assumed.
      varied: whether models with equal tensors differ in the activation, which must then be given.
      quick: names of files that are known to use quick GELU.
    """

    marker: str
    config_type: type
    shapes: Callable[[Any], Mapping[str, Any]]
    table: Callable[[Any], Table]
    foreign: str = ""
    pictures: Pictures | None = None
    names: tuple[str, ...] = ()
    about: str = CONFIG
    from_about: Callable[[Hf, str], Any] | None = None
    to_about: Callable[[Any], dict[str, Any]] | None = None
    about_unused: tuple[str, ...] = ()
    side: str = ""
    dropout: str = ""
    from_tensors: Callable[[Tensors, str, Mapping[str, Any]], Any] | None = None
    unstated: tuple[str, ...] = ()
    varied: bool = False
    quick: tuple[str, ...] = ()

    def config(
        self,
        tensors: Tensors,
        about: Hf | None,
        file: str,
        given: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> Any:
        """The config from the JSON file beside the weights or, without it, from the tensors and the
        given fields.

        Raises:
          ValueError: naming a key or tensor that is missing or does not fit.
        """
        if about is not None and self.from_about:
            return self.from_about(about, file)
        inferred = self.from_tensors
        config = inferred(tensors, file, given) if inferred else self.config_type()
        for path, value in given.items():
            config = _with_field(config, path, value)
        return config


def _with_field(config: Any, path: str, value: Any) -> Any:
    """The config with another value at a path such as "mbart.start"."""
    name, _, below = path.partition(".")
    if below:
        value = _with_field(getattr(config, name), below, value)
    return dataclasses.replace(config, **{name: value})


def require_supported_type(hf: Hf | None, file: str) -> None:
    """Raises ValueError for a model type in UNSUPPORTED, and for quantised weights."""
    if (name := (hf or {}).get("model_type")) in [*UNSUPPORTED]:
        raise ValueError(f"{file} is {UNSUPPORTED[name]}: its config.json says model_type={name!r}")
    config_json.require_supported(hf or {}, {config_json.QUANTISED: (None,)}, f"{file}/{CONFIG}")


def kind_of_config(hf: Hf | None, file: str) -> str | None:
    """The kind that a config.json names; None if it names none.

    Raises:
      ValueError: for a model of another kind.
    """
    if not hf:
        return None
    if "modelBase" in hf:
        return "mclip"
    classes = hf.get("architectures")
    names = [hf.get("model_type"), *(classes if isinstance(classes, list) else ())]
    kinds = {x: kind for kind, layouts in KINDS.items() for one in layouts for x in one.names}
    if kind := next((kinds[x] for x in names if isinstance(x, str) and x in kinds), None):
        return kind
    if any(names):
        raise ValueError(
            f"{file} is of no known kind, {sorted(KINDS)}: its config.json says "
            f"model_type={brief(hf.get('model_type'))}, architectures={brief(classes)}"
        )
    return None


def kind_of_tensors(tensors: Tensors) -> str | None:
    """The kind that the tensors' names indicate, below the shortest prefix; None without a
    marker."""
    claims = rank_kinds(_formats(tensors), tensors)
    return claims[0].kind if claims else None


def choose_kind(allowed: tuple[str, ...], named: str | None, tensors: Tensors, file: str) -> str:
    """The first of the `allowed` kinds whose tensors are there, else the first one. If all are
    allowed, the kind that config.json names, else the one that the tensors indicate.

    Raises:
      ValueError: if neither does.
    """
    if allowed:
        there = (k for k in allowed if any(prefixes(one.marker, tensors) for one in KINDS[k]))
        return next(there, allowed[0])
    if kind := named or kind_of_tensors(tensors):
        return kind
    raise ValueError(
        f"{file} is of no known kind: {sorted(KINDS)}; its tensors are called "
        f"{brief(sorted(tensors)[:4])}{describe_nearest(_formats(tensors), tensors)}\n"
        "give the weights of one of these"
    )


def written_layout(config: Any) -> Layout:
    """The layout in which networks of this config are exported for `transformers`.

    Raises:
      ValueError: if there is none.
    """
    for layout in (layout for several in KINDS.values() for layout in several):
        if layout.to_about and layout.config_type is type(config):
            return layout
    raise ValueError(
        f"{type(config).__name__} cannot be exported: it has no layout with `to_about` in KINDS of "
        "cliptrans_jax/tensors/kinds.py"
    )


def find_layout(kind: str, tensors: Tensors, file: str, weights: str = "") -> tuple[Layout, str]:
    """Finds the layout of a kind's tensors in a file, and the prefix of their names.

    Args:
      kind: a key of KINDS.
      tensors: tensors by name.
      file: name of their file, for messages.
      weights: the prefix, such as "teacher.", if the file has several networks of the kind.

    Raises:
      ValueError: if the file has no such network, or more than one.
    """
    for layout in KINDS[kind]:
        there = prefixes(layout.marker, tensors)
        if weights in there or (there and not weights):
            return layout, choose_prefix([layout.marker], tensors, weights, file)
    markers = " or ".join(layout.marker.replace("\\", "") for layout in KINDS[kind])
    other = kind_of_tensors(tensors)
    hint = f"; it holds {other!r}" if other else ""
    where = f" below {weights!r}" if weights else ""
    raise ValueError(f"{file} holds no {kind!r}{where}: it lacks its {markers}{hint}")


def _formats(tensors: Tensors) -> Iterator[Format]:
    """The layouts, except those that the tensors rule out by foreign names."""
    for kind, layouts in KINDS.items():
        for one in layouts:
            if one.foreign and prefixes(one.foreign, tensors):
                continue
            yield kind, one.marker, lambda one=one: [one.table(one.config_type())]


def _translator_shapes(config: ModelConfig) -> Mapping[str, Any]:
    return jax.eval_shape(Translator(config).init, jax.random.key(0))


def _facts(tower: Tower) -> dict[str, Any]:
    """The fields of a layout that follow from its tower."""
    return {"config_type": tower.config, "shapes": tower.shapes, "pictures": tower.pictures}


MBART_UNSTATED = (
    *("encoder_heads", "decoder_heads", "scale_embedding"),
    *("dropout", "pad", "eos", "start"),
)
# Towers of OpenAI and OpenCLIP have the same tensors but different activations.
_clip = functools.partial(Layout, unstated=("heads", "eps", "activation"), varied=True)
# With the names that OpenAI and OpenCLIP share.
_open_clip = functools.partial(_clip, about=open_clip.FILE, quick=OPENAI_FILES)

MBART = Layout(
    marker=r"model\.encoder\.layernorm_embedding\.weight",
    config_type=mbart.ARCHITECTURE.config,
    shapes=mbart.ARCHITECTURE.shapes,
    table=mbart_names.table,
    names=("mbart", "MBartForConditionalGeneration"),
    from_tensors=lambda tensors, file, _: sizes.mbart_config(tensors, file),
    from_about=lambda hf, file: config_json.mbart_config(hf),
    to_about=config_json.mbart_hf_config,
    about_unused=config_json.TRANSLATOR_UNUSED,
    dropout="config.model.mbart.dropout",
    unstated=MBART_UNSTATED,
)
# Its names are a subset of mBART's.
NLLB = Layout(
    marker=r"model\.encoder\.layer_norm\.weight",
    foreign=r"model\.(encoder|decoder)\.(layernorm_embedding|embed_positions)\.weight",
    config_type=nllb.ARCHITECTURE.config,
    shapes=nllb.ARCHITECTURE.shapes,
    table=nllb_names.table,
    names=("m2m_100", "M2M100ForConditionalGeneration"),
    from_tensors=lambda tensors, file, _: sizes.nllb_config(tensors, file),
    from_about=lambda hf, file: config_json.nllb_config(hf),
    to_about=config_json.nllb_hf_config,
    about_unused=config_json.TRANSLATOR_UNUSED,
    dropout="config.model.nllb.dropout",
    unstated=("positions", *MBART_UNSTATED),
)
CLIPTRANS = Layout(
    marker=rf"mbart\.{MBART.marker}",
    config_type=ModelConfig,
    shapes=_translator_shapes,
    table=cliptrans_names.table,
    from_tensors=sizes.cliptrans_config,
    unstated=tuple(f"mbart.{name}" for name in MBART_UNSTATED),
)
KINDS: Mapping[str, tuple[Layout, ...]] = types.MappingProxyType(
    {
        mbart.ARCHITECTURE.kind: (MBART,),
        nllb.ARCHITECTURE.kind: (NLLB,),
        mclip.TOWER.kind: (
            Layout(
                marker=r"LinearTransformation\.weight",
                **_facts(mclip.TOWER),
                table=mclip_names.table,
                names=("M-CLIP", "MultilingualCLIP"),
                from_about=config_json.mclip_folder_config,
                unstated=("heads", "eps", "pad", "dropout", "activation"),
            ),
        ),
        clip.VISION.kind: (
            _clip(
                marker=r"vision_model\.pre_layrnorm\.weight",
                **_facts(clip.VISION),
                table=clip_names.vision_table,
                names=("clip", "CLIPModel", "clip_vision_model"),
                from_about=lambda hf, file: config_json.clip_vision_config(hf),
                about_unused=config_json.CLIP_UNUSED,
                side="vision",
            ),
            _open_clip(
                marker=r"visual\.ln_pre\.weight",
                **_facts(clip.VISION),
                table=clip_names.openai_vision_table,
                from_tensors=lambda tensors, file, _: sizes.openai_vision_config(tensors, file),
                from_about=lambda content, file: open_clip.vision_config(content),
            ),
        ),
        resnet.TOWER.kind: (
            Layout(
                marker=r"visual\.attnpool\.positional_embedding",
                **_facts(resnet.TOWER),
                table=resnet_names.table,
                from_tensors=lambda tensors, file, _: sizes.resnet_config(tensors, file),
            ),
        ),
        clip.TEXT.kind: (
            _clip(
                marker=r"text_projection\.weight",
                **_facts(clip.TEXT),
                table=clip_names.text_table,
                names=("clip_text_model",),
                from_about=lambda hf, file: config_json.clip_text_config(hf),
                about_unused=config_json.CLIP_UNUSED,
                side="text",
            ),
            _open_clip(
                marker=r"ln_final\.weight",
                **_facts(clip.TEXT),
                table=clip_names.openai_text_table,
                from_tensors=lambda tensors, file, _: sizes.openai_text_config(tensors, file),
                from_about=lambda content, file: open_clip.text_config(content),
            ),
        ),
        siglip.VISION.kind: (
            Layout(
                marker=r"vision_model\.head\.probe",
                **_facts(siglip.VISION),
                table=siglip_names.vision_table,
                # Reading NaFlex's config explains why it is refused.
                names=("siglip", "SiglipModel", "siglip_vision_model", siglip_json.NAFLEX),
                from_about=lambda hf, file: siglip_json.vision_config(hf),
                about_unused=siglip_json.UNUSED,
                side="vision",
                unstated=("heads", "eps"),
            ),
        ),
        siglip.TEXT.kind: (
            Layout(
                marker=r"text_model\.head\.weight",
                **_facts(siglip.TEXT),
                table=siglip_names.text_table,
                names=("siglip_text_model",),
                from_about=lambda hf, file: siglip_json.text_config(hf),
                about_unused=siglip_json.UNUSED,
                side="text",
                unstated=("heads", "eps", "pad"),
            ),
        ),
        "cliptrans": (CLIPTRANS,),
    }
)
