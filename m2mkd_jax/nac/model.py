"""The config of a NAC, and functions that build the whole network and its students."""

import dataclasses
import types
from typing import Annotated, Any

from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from common_jax.config import FieldError, Section
from common_jax.nn.attention import Implementation
from common_jax.ranges import Count, NonNegative, Positive, Size, one_of, shown
from m2mkd_jax.models.encoder import Interface
from m2mkd_jax.nac.blocks import BlockConfig, Propagator
from m2mkd_jax.nac.graphs import PriorConfig
from m2mkd_jax.nac.kernel import KernelConfig
from m2mkd_jax.nac.latents import SEEDINGS, GraphConfig, LatentConfig
from m2mkd_jax.nac.layers import LinearConfig
from m2mkd_jax.nac.network import (
    NacNetwork,
    ReadIn,
    ReadInConfig,
    ReadOut,
    ReadOutConfig,
    Wiring,
)
from m2mkd_jax.nac.pooling import POOLINGS
from m2mkd_jax.nac.students import MediatorStudent, ReadInStudent, ReadOutStudent
from m2mkd_jax.nac.tokenizer import TokenizerConfig
from m2mkd_jax.stages import Network

# The read-out's kernel neither cuts nor samples edges. In the original, the settings of the
# propagators' kernel and norm do not reach the read-out, and the published NACs were trained so.
READ_OUT_KERNEL = KernelConfig(truncation=None, stochastic=False)
LEGACY_READ_IN_SCALE = 1e-6
# The original's code looks for "tinynet", but the comments in its configs say "tinyimnet".
SPELLINGS = types.MappingProxyType(
    {"imnet": "imagenet", "tinyimnet": "tinyimagenet", "tinynet": "tinyimagenet"}
)


@dataclasses.dataclass(frozen=True)
class NacConfig(Section):
    """Sizes and switches of a NAC, `config.model` with kind "nac". The defaults are those of the
    original for Tiny-ImageNet.

    Attributes:
      kind: "nac".
      tokenizer: turns images into tokens.
      inputs, mediators, outputs: numbers of latents of each kind.
      iterations: number of mediator iterations.
      width, code_width, signature_width: widths D of a state, Z of a code and Y of a signature.
      heads, head_width: number of heads and width of a head, in all attentions.
      read_in_heads, read_out_heads: number of heads in these attentions; 0 for `heads`.
      ffn_factor: hidden width of an MLP, relative to D.
      geglu, qkv_bias, layer_scale: see `blocks.BlockConfig`.
      linear: the code-conditioned layers.
      kernel: kernel between mediators, and between input latents and mediators.
      mask: whether the kernels mask the attention; False attends to all latents, also in the
        read-out.
      share_norm: in the propagators, norms senders with the receivers' LayerNorm.
      code_noise: noise on codes in training, relative to their size.
      seeding: initial states of latents, see `latents.GraphConfig`.
      seeder_code_noise: whether the seeder's codes get the code noise, too.
      read_in: "attention", or "projection", which needs as many input latents as tokens.
      read_in_scale: initial value of the read-in attention's layer scale.
      read_in_residual: whether the read-in attention is added to the initial states.
      read_out_residual: whether the read-out attention is added to the initial states.
      read_out_head: whether a code-conditioned layer maps each output state to logits before the
        pooling; pooling "first_slot" needs it. Students lack this layer: "first_slot" cannot be
        distilled, and any other pooling starts from scratch.
      read_out_head_norm: whether the input of the read-out head is normed.
      pooling, temperature: pooling of the output states, see `network.ReadOutConfig`.
      inputs_to_mediators, inputs_to_outputs, inputs_as_mediators: see `network.Wiring`.
      share_propagators: uses the same propagator in every iteration.
      share_ffns: uses the same MLP in every iteration.
      share_codes: gives mediators the same codes in every iteration.
      identical_codes: starts all mediators with the same code.
      learn_codes, learn_signatures: whether the latents' codes and signatures are trained.
      layerwise: values that differ by iteration: the name of a field of `blocks.BlockConfig`
        ("ffn_factor", "kernel/truncation") and one value per iteration. Not its widths, which all
        iterations share, nor, with `share_ffns`, fields on which the shapes of the MLP depend.
      prior: the graph that the mediators' signatures start from.
      students: which student parameters the whole NAC starts from: "imagenet" takes all,
        "tinyimagenet" leaves out positional grid and pooling, which depend on image size and
        labels ("tinyimnet" and "tinynet" are other spellings of it, "imnet" of "imagenet").
      legacy_read_in_scale: starts the layer scale of the read-in student's MLP at 1e-6, as the
        original does by mistake; the whole NAC then inherits it. Only with a `layer_scale`.
      attention: implementation of the latents' attention: "xla"; "auto", cuDNN's kernel on GPUs
        where it is faster and XLA elsewhere; or "cudnn", only in bfloat16 on GPUs. The default is
        "xla" because cuDNN's gradient of log affinities has been compiled, but not verified on a
        GPU.
      remat: recomputes each propagator in the backward pass instead of keeping its activations.
    """

    kind: Annotated[str, one_of("nac")] = "nac"
    tokenizer: TokenizerConfig = TokenizerConfig()
    inputs: Size = 64
    mediators: Size = 256
    outputs: Size = 64
    iterations: Size = 8
    width: Size = 384
    code_width: Size = 384
    signature_width: Size = 64
    heads: Size = 6
    head_width: Size = 64
    read_in_heads: Count = 0
    read_out_heads: Count = 0
    ffn_factor: Positive = 2.0
    geglu: bool = True
    qkv_bias: bool = False
    layer_scale: NonNegative | None = 0.1
    linear: LinearConfig = LinearConfig()
    kernel: KernelConfig = KernelConfig()
    mask: bool = True
    share_norm: bool = True
    code_noise: NonNegative = 0.05
    seeding: Annotated[str, one_of(*SEEDINGS)] = "noise"
    seeder_code_noise: bool = True
    read_in: Annotated[str, one_of("attention", "projection")] = "attention"
    read_in_scale: NonNegative | None = 1.0
    read_in_residual: bool = True
    read_out_residual: bool = False
    read_out_head: bool = False
    read_out_head_norm: bool = True
    pooling: Annotated[str, one_of(*POOLINGS)] = "gumbel"
    temperature: Positive = 1.0
    inputs_to_mediators: Annotated[str, one_of("always", "first", "never")] = "always"
    inputs_to_outputs: bool = True
    inputs_as_mediators: bool = False
    share_propagators: bool = False
    share_ffns: bool = False
    share_codes: bool = True
    identical_codes: bool = False
    learn_codes: bool = True
    learn_signatures: bool = True
    layerwise: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    prior: PriorConfig = PriorConfig()
    students: Annotated[str, one_of("imagenet", "tinyimagenet")] = "imagenet"
    legacy_read_in_scale: bool = False
    attention: Implementation = "xla"
    remat: bool = False

    def __post_init__(self):
        # Before the checks of the base class, which would refuse these spellings. Other types are
        # left to them.
        if isinstance(self.students, str):
            object.__setattr__(self, "students", SPELLINGS.get(self.students, self.students))
        super().__post_init__()
        if self.pooling == "first_slot" and not self.read_out_head:
            raise FieldError(
                "pooling='first_slot' uses an output state as logits: set read_out_head=True"
            )
        if self.inputs_as_mediators and self.inputs != self.mediators:
            raise FieldError(
                f"inputs_as_mediators=True needs as many inputs={self.inputs} as "
                f"mediators={self.mediators}"
            )
        if self.share_propagators and self.layerwise:
            raise FieldError(
                f"layerwise={shown(self.layerwise)} makes iterations differ, but "
                "share_propagators=True makes them the same: drop either"
            )
        for name, values in self.layerwise.items():
            if len(values) != self.iterations:
                raise FieldError(
                    f"layerwise.{name}={shown(values)} must have iterations={self.iterations} "
                    "values"
                )
            if name in ("width", "code_width"):
                raise FieldError(
                    f"layerwise.{name}={shown(values)} must be one number, since all iterations "
                    f"share states and codes: drop it and set {name}"
                )
        unread = self.inputs_to_mediators == "never" and not self.inputs_to_outputs
        if unread and not self.inputs_as_mediators:
            raise FieldError(
                "inputs_to_mediators='never' and inputs_to_outputs=False hide the image from the "
                "logits: change one of them, or set inputs_as_mediators=True"
            )
        # Only to run the checks of these configs; they are built again when needed.
        self.graph()
        self.block()
        layers = range(self.iterations if self.layerwise else 0)
        blocks = [self.propagator(layer, drop_path=0.0) for layer in layers]
        if self.share_ffns and len({block.ffn_shape for block in blocks}) > 1:
            raise FieldError(
                f"layerwise={shown(self.layerwise)} gives the iterations MLPs of different shapes, "
                "but share_ffns=True gives them the same MLP: drop either"
            )

    @property
    def depths(self) -> tuple[int, ...]:
        """One block per stage: read-in, a propagator per iteration, read-out."""
        return (1,) * (self.iterations + 2)

    def block(self, *, drop_path: float = 0.0) -> BlockConfig:
        """Returns the config of a propagator, before `layerwise`."""
        return BlockConfig(
            width=self.width,
            code_width=self.code_width,
            heads=self.heads,
            head_width=self.head_width,
            qkv_bias=self.qkv_bias,
            ffn_factor=self.ffn_factor,
            geglu=self.geglu,
            layer_scale=self.layer_scale,
            linear=self.linear,
            code_noise=self.code_noise,
            drop_path=drop_path,
            share_norm=self.share_norm,
            kernel=self.kernel,
            mask=self.mask,
            attention=self.attention,
        )

    def propagator(self, layer: int, *, drop_path: float) -> BlockConfig:
        """Returns the config of one iteration's propagator, including its `layerwise` values."""
        block = self.block(drop_path=drop_path)
        for name, values in self.layerwise.items():
            try:
                block = _replace(block, name.split("/"), values[layer])
            except FieldError as error:
                value = shown(values[layer])
                raise FieldError(f"layerwise.{name}[{layer}]={value}: {error}") from None
        return block

    def read_in_config(self) -> ReadInConfig:
        """Returns the config of the read-in, which drops no paths and has no kernel."""
        block = dataclasses.replace(
            self.block(),
            heads=self.read_in_heads or self.heads,
            kernel=None,
            residual=self.read_in_residual,
        )
        return ReadInConfig(block, self.read_in, self.read_in_scale)

    def read_out_config(self, labels: int) -> ReadOutConfig:
        """Returns the config of the read-out.

        It drops no paths, and its kernel neither cuts nor samples edges.
        """
        block = dataclasses.replace(
            self.block(),
            heads=self.read_out_heads or self.heads,
            kernel=READ_OUT_KERNEL,
            share_norm=False,
            residual=self.read_out_residual,
        )
        head = labels if self.read_out_head else None
        return ReadOutConfig(block, self.pooling, self.temperature, head, self.read_out_head_norm)

    def graph(self) -> GraphConfig:
        """Returns the config of the latents."""
        complete = self.prior.graph == "complete"
        mediator = LatentConfig(
            self.mediators,
            layers=None if self.share_codes else self.iterations,
            identical_codes=self.identical_codes,
            identical_signatures=complete,
        )
        return GraphConfig(
            input=LatentConfig(self.inputs, identical_signatures=complete),
            mediator=mediator,
            output=LatentConfig(self.outputs, identical_signatures=complete),
            width=self.width,
            signature_width=self.signature_width,
            code_width=self.code_width,
            seeding=self.seeding,
            code_noise=self.code_noise if self.seeder_code_noise else 0.0,
        )

    def trainable(self) -> str:
        """Returns a regex of the trained parameters."""
        fixed = [] if self.learn_codes else ["codes"]
        fixed += [] if self.learn_signatures else ["signatures"]
        # A negative lookahead, because the regex must match what is trained, not what is fixed.
        return rf"(?!.*/graph/\w+/({'|'.join(fixed)})$).*" if fixed else ".*"


# Image side, number of labels, and the fields that differ from the defaults.
PRESETS = types.MappingProxyType(
    {
        "tinyimagenet": (64, 200, {}),
        "imagenet": (
            224,
            1000,
            {
                "tokenizer": TokenizerConfig(width=512),
                "inputs": 192,
                "mediators": 768,
                "width": 512,
                "code_width": 512,
                "heads": 8,
                "ffn_factor": 1.0,
            },
        ),
    }
)


def preset(name: str) -> tuple[NacConfig, int, int]:
    """Returns the config, image side and number of labels of a published NAC.

    Raises:
      ValueError: for a name that is not in PRESETS.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not one of {sorted(PRESETS)}")
    image_size, labels, sizes = PRESETS[name]
    return NacConfig(**sizes), image_size, labels


def build(
    config: NacConfig,
    interface: Interface,
    *,
    dtype: DTypeLike = jnp.float32,
    drop_path: float = 0.0,
) -> NacNetwork:
    """Builds the whole NAC; every propagator has the same `drop_path`.

    Raises:
      ValueError: if the images are too small for the tokenizer's convolutions.
    """
    if config.tokenizer.side(interface.image_size) < 1:
        raise ValueError(
            f"config.data.image_size={interface.image_size} is too small for "
            f"config.model.tokenizer.stages={config.tokenizer.stages} and "
            f"config.model.tokenizer.stem={config.tokenizer.stem}: no token is left"
        )
    propagators = (
        config.propagator(layer, drop_path=drop_path) for layer in range(config.iterations)
    )
    return NacNetwork(
        graph=config.graph(),
        read_in=ReadIn(config.tokenizer, config.read_in_config(), interface, dtype),
        propagators=tuple(Propagator(block, dtype) for block in propagators),
        read_out=ReadOut(config.read_out_config(interface.labels), interface.labels, dtype),
        wiring=Wiring(
            config.inputs_to_mediators, config.inputs_to_outputs, config.inputs_as_mediators
        ),
        interface=interface,
        share_propagators=config.share_propagators,
        share_ffns=config.share_ffns,
        dtype=dtype,
        remat=config.remat,
    )


def build_students(
    config: NacConfig,
    interface: Interface,
    *,
    meta_width: int,
    meta_tokens: int,
    seed: int,
    dtype: DTypeLike = jnp.float32,
    drop_path: float = 0.0,
) -> Network:
    """Builds the students of a NAC: read-in, one mediator student per iteration, read-out.

    Args:
      config: config of the whole NAC; students have neither kernels nor noise on codes.
      interface: image side, channels and labels.
      meta_width, meta_tokens: width and number of the meta model's tokens.
      seed: seed of the students' fixed codes and states.
      dtype: compute dtype.
      drop_path: stochastic depth of the mediator students.
    """
    bare = {"kernel": None, "code_noise": 0.0}
    read_in = config.read_in_config()
    block = dataclasses.replace(read_in.block, **bare)
    if config.legacy_read_in_scale and config.layer_scale is not None:
        # Only that of the MLP: the attention's is `read_in.scale`.
        block = dataclasses.replace(block, layer_scale=LEGACY_READ_IN_SCALE)
    # A student has a single input latent, and a read-in by projection needs one per token.
    read_in = dataclasses.replace(read_in, block=block, kind="attention")
    read_out = config.read_out_config(interface.labels)
    read_out = dataclasses.replace(
        read_out, block=dataclasses.replace(read_out.block, **bare), head=None
    )
    mediators = (
        dataclasses.replace(config.propagator(layer, drop_path=drop_path), **bare)
        for layer in range(config.iterations)
    )
    stitched = {"stitch_width": meta_width, "seed": seed, "dtype": dtype}
    first = ReadInStudent(config.tokenizer, read_in, interface, **stitched)
    last = ReadOutStudent(read_out, interface.labels, tokens=meta_tokens, **stitched)
    middle = (MediatorStudent(block, tokens=meta_tokens, **stitched) for block in mediators)
    return Network((first, *middle, last))


def _replace(block: Any, names: list[str], value: Any) -> Any:
    """Returns `block` with the field at path `names` through its dataclasses set to `value`."""
    fields = dataclasses.fields(block) if dataclasses.is_dataclass(block) else ()
    known = sorted(field.name for field in fields)
    if names[0] not in known:
        raise FieldError(f"{type(block).__name__} has no field {names[0]!r}, only {known}")
    if len(names) > 1:
        value = _replace(getattr(block, names[0]), names[1:], value)
    return dataclasses.replace(block, **{names[0]: value})


# Matrices are sharded over fsdp along their input axis, `exit` and `down` along their output axis.
# The latents' own arrays, the pooling and per-channel vectors are small and replicated. (With
# `read_out_head` the pooling's input axis is the labels, which fsdp need not divide.)
PARTITION_RULES = (
    (r"/(query|key|value|up|linear|projection)/kernel$", P("fsdp")),
    (r"/(exit|down)/kernel$", P(None, "fsdp")),
    (r"/code_kernel$", P("fsdp")),
    (r"/(pre_stitch|post_stitch)/kernel$", P("fsdp")),
    (r"/seeder/(mean|log_variance)/kernel$", P("fsdp")),
    (r"/(stem|conv|depthwise)/kernel$", P()),
    (r"/graph/(input|mediator|output)/(signatures|codes|states)$", P()),
    (r"/pooling/(confidence|head)/kernel$", P()),
    (r"/tokenizer/grid$", P()),
    (r"/(bias|scale|layer_scale|gamma|gain|bandwidth|code_bias)$", P()),
)
