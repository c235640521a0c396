"""Kinds of files, assembled from the records of phases and families."""

import dataclasses
import functools
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from common_jax.untrusted import brief
from common_jax.weights.table import Table, describe_nearest, rank_kinds
from m2mkd_jax.config import Config
from m2mkd_jax.families import FAMILIES, Family, family_of
from m2mkd_jax.phases import PHASES
from m2mkd_jax.phases.networks import SECTIONS, module_network, whole_network
from m2mkd_jax.phases.phase import FileKind
from m2mkd_jax.pretrained.parts import ELSEWHERE, Tensors, find
from m2mkd_jax.stages import stage_name


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
      phase: the phase whose checkpoint has the same parameters.
      form: its entry in the record of that phase.
      family: family of the network.
    """

    phase: str
    form: FileKind
    family: Family

    @property
    def about(self) -> str:
        """A one-line description for users."""
        about = self.form.about.format(network=self.family.files.network)
        return f"{about}, for config.sources.{PHASES[self.phase].makes}"

    @property
    def role(self) -> str:
        """The key of its parameters in a checkpoint."""
        return PHASES[self.phase].role

    @property
    def section(self) -> str:
        """The section of the config with the network's sizes."""
        return SECTIONS[self.role]

    @property
    def loads_in_timm(self) -> bool:
        """True for whole networks that timm has, with the same tensor names."""
        return not self.form.single and self.family.files.timm

    def depths(self, config: Config) -> tuple[int, ...]:
        """Blocks in each stage of the network."""
        return getattr(config, self.section).depths

    def shapes(self, config: Config, stage: int | None) -> dict[str, Any]:
        """Shapes of the parameters in a file, one subtree per stage.

        Raises:
          ValueError: if config.SECTION belongs to another family.
        """
        # Only for its error.
        self._sizes(config)
        network = (module_network if self.form.single else whole_network)(config, self.role)
        init = network.init if stage is None else functools.partial(network.init, only=(stage,))
        return jax.eval_shape(init, jax.random.key(0))

    def table(self, config: Config, stage: int | None) -> Table:
        """The tensor names in a file, by our parameter paths; raises like `shapes`."""
        table = self.family.files.table(self._sizes(config), config.data.channels, stage)
        return table if stage is None else table.below(source="", target=f"{stage_name(stage)}/")

    def examples(self) -> Iterator[Table]:
        """Tables of such files for small networks, which distinguish the kinds."""
        for section in self.family.files.examples:
            stages = range(len(section.depths)) if self.form.single else (None,)
            yield from (self.family.files.table(section, 3, stage) for stage in stages)

    def _sizes(self, config: Config) -> Any:
        section = getattr(config, self.section)
        if family_of(section) is not self.family:
            raise ValueError(
                f"config.{self.section} is a {type(section).__name__}, but this kind of file needs "
                f"a {self.family.config.__name__}: give the config of such a network"
            )
        return section


def kinds_of(families: Mapping[str, Family]) -> dict[str, Kind]:
    """The kinds of files of those families that have published names."""
    return {
        form.name.format(family=name): Kind(phase, form, family)
        for phase, record in PHASES.items()
        for form in record.files
        for name, family in families.items()
        if SECTIONS[record.role] in family.roles and family.files is not None
    }


KINDS: Mapping[str, Kind] = types.MappingProxyType(kinds_of(FAMILIES))


def guess(tensors: Tensors, plain: Mapping[str, Any], file: str) -> str:
    """Guesses the kind of a file: the one whose table matches the most tensors.

    Kinds with the same tensor names are distinguished by what else is in the file: the original
    writes "model_name" beside a teacher's modules, and lists a meta model as stages of one block.

    Raises:
      ValueError: if no kind matches, or several do.
    """
    names, formats = set(tensors), []
    for name, kind in KINDS.items():
        files = kind.family.files
        marker = files.stage_marker if kind.form.single else files.marker
        formats.append((name, marker, kind.examples))
    # Prefixes have been removed already; what is still below one is only a part of this network.
    claims = [claim for claim in rank_kinds(formats, names) if not claim.prefix]
    whose = [owner for regex, owner in ELSEWHERE.items() if find(names, regex)]
    if not claims and whose:
        raise ValueError(
            f"{file} holds a ViT under {whose[0]} names, which are not supported: take timm's file "
            "of the same model, such as timm/vit_base_patch16_224.augreg_in21k_ft_in1k or "
            "timm/deit_base_patch16_224.fb_in1k"
        )
    if not claims:
        raise ValueError(
            f"{file} matches none of the kinds {sorted(KINDS)}: its tensors are called "
            f"{brief(sorted(names)[:4])}{describe_nearest(formats, names)}"
        )
    cut = [claim.kind for claim in claims if KINDS[claim.kind].form.cut]
    if cut and "model_name" in plain:
        return cut[0]
    # Sorted by misfits, the fewest first.
    best = [claim.kind for claim in claims if len(claim.misfits) == len(claims[0].misfits)]
    first = KINDS[best[0]]
    alike = [  # with the same names
        name
        for name in best
        if KINDS[name].family is first.family and KINDS[name].form.single == first.form.single
    ]
    if len(alike) > 1 and first.form.single:
        choices = "; ".join(f"--kind={name} for {KINDS[name].about}" for name in alike)
        raise ValueError(
            f"{file} holds a part of a {first.family.files.network}, but its tensor names do not "
            f"tell which: give {choices}"
        )
    depths = alias_depths(tensors)
    # A single stage of one block says nothing: any ViT may be listed as one stage.
    shallow = len(depths) > 1 and set(depths) == {1}
    return next((name for name in alike if KINDS[name].form.shallow == shallow), alike[0])


def count_blocks(tensors: Tensors) -> int:
    """The number of blocks that are numbered through the whole file."""
    return len({m[1] for name in tensors if (m := re.match(r"blocks\.(\d{1,4})\.", name))})


def alias_depths(tensors: Tensors) -> tuple[int, ...]:
    """Blocks in each stage, from names `stages.<i>.blocks.<j>`; () without such names."""
    # At most four digits: the names are untrusted, and the tuple below is as long as the largest
    # number.
    blocks = {}
    for name in tensors:
        if match := re.match(r"stages\.(\d{1,4})\.blocks\.(\d{1,4})\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    depths = tuple(len(blocks.get(i, ())) for i in range(max(blocks, default=-1) + 1))
    return depths if all(depths) else ()
