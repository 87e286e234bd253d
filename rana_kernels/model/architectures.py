"""The table of architectures: the paths of the linears in each of them. A new architecture is one entry.

The key is `model.config.model_type`, the name that Hugging Face transformers gives an architecture. That
package is not imported: every module with the same layout and such a config works. For any other model,
`describe` sets the same fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The paths of the modules of an architecture. Paths are within one layer unless stated; "" if absent.

    decoder      the module that runs the layers, within the model
    layers       the list of layers, within `decoder`
    qkv          the linears that read the input of attention, in the order in which they are called
    o            the output projection of attention
    gate, up     the first linears of the MLP. If both are the same path, one linear computes both, gate first
    down         the linear that reads act(gate(x)) * up(x), or act(up(x)) without a gate
    mlp          the module that computes exactly the MLP, so that one op can replace it. With "" the linears
                 are adapted one by one
    act          the module that computes the activation. With "" the name in `activation` decides
    activation   the field of the config that names the activation, or the name itself
    experts      the module that marks a layer whose MLP is a mixture of experts. That MLP stays dense
    norms        the norms before attention and the MLP, if they alone stand between the residual stream and
                 its readers. With them, the stream can be rotated
    """

    decoder: str = ""
    layers: str
    qkv: tuple[str, ...] = ()
    o: str = ""
    mlp: str = ""
    up: str = ""
    gate: str = ""
    down: str = ""
    act: str = ""
    activation: str = ""
    experts: str = ""
    norms: tuple[str, ...] = ()


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Architecture(
    decoder="model", layers="layers", qkv=_QKV, o="self_attn.o_proj",
    mlp="mlp", up="mlp.up_proj", gate="mlp.gate_proj", down="mlp.down_proj",
    act="mlp.act_fn", activation="hidden_act", norms=("input_layernorm", "post_attention_layernorm"),
)  # fmt: skip
_GEMMA2 = replace(_LLAMA, activation="hidden_activation", norms=())
_PHI3 = replace(
    _LLAMA, qkv=("self_attn.qkv_proj",), up="mlp.gate_up_proj", gate="mlp.gate_up_proj",
    act="mlp.activation_fn",
)  # fmt: skip
_GPT_NEOX = Architecture(
    decoder="gpt_neox", layers="layers", qkv=("attention.query_key_value",), o="attention.dense",
    mlp="mlp", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h", act="mlp.act", activation="hidden_act",
)  # fmt: skip
_OPT = Architecture(
    decoder="model.decoder", layers="layers", qkv=_QKV, o="self_attn.out_proj",
    up="fc1", down="fc2", act="activation_fn", activation="activation_function",
)  # fmt: skip
_GPT2 = Architecture(
    decoder="transformer", layers="h", qkv=("attn.c_attn",), o="attn.c_proj",
    mlp="mlp", up="mlp.c_fc", down="mlp.c_proj", act="mlp.act", activation="activation_function",
)  # fmt: skip
_MIXTURE = replace(_LLAMA, experts="mlp.experts", norms=())

ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi3": _PHI3,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
    "gpt2": _GPT2,
    "mixtral": _MIXTURE,
    "qwen3_moe": _MIXTURE,
}

# name of an activation in a config -> its name in `masked_mlp`
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True)
class Block:
    """One transformer block: the full names of its modules, "" for those that it does not have.

    index        the position of the block in the model
    gate         "" in an ungated MLP; the same as `up` if one linear computes both, gate first
    act          the module that computes the activation of the MLP
    activation   the name of the activation in `masked_mlp`, or None if no op computes it
    experts      the mixture of experts, which stays dense
    head         lm_head, in the one block that has nothing else (`head.py`)

    With an activation of None or no `mlp`, the MLP module stays and its linears are adapted one by one.
    """

    index: int
    qkv: tuple[str, ...]
    o: str
    mlp: str
    up: str
    gate: str
    down: str
    act: str
    activation: str | None
    experts: str = ""
    head: str = ""

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears, in the order in which the model calls them."""
        return tuple(name for names in self.inputs.values() for name in names)

    @property
    def expanding(self) -> tuple[str, ...]:
        """The first linears of the MLP: gate and up, up alone, or one linear that is both."""
        return tuple(dict.fromkeys(filter(None, (self.gate, self.up))))

    @property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """The distinct inputs of the block's linears, and the linears that read each."""
        readers = {"qkv": self.qkv, "o": (self.o,), "mlp": self.expanding, "down": (self.down,)}
        readers["lm_head"] = (self.head,)
        return {name: linears for name, linears in readers.items() if any(linears)}


def describe(model: nn.Module, patterns: Mapping[str, Any]) -> None:
    """Set the Architecture of a model that is not in the table.

    patterns   the fields of `Architecture`, at least `layers`

    The model object keeps it for all later steps. Raises ValueError for fields, modules or an activation that
    do not exist.
    """
    known = {field.name for field in fields(Architecture)}
    if not isinstance(patterns, Mapping) or "layers" not in patterns or set(patterns) - known:
        has = sorted(patterns) if isinstance(patterns, Mapping) else type(patterns).__name__
        raise ValueError(f"patterns has {has}, wanted `layers` and any of {', '.join(sorted(known))}")
    given: dict[str, Any] = {
        key: tuple(value) if key in ("qkv", "norms") else value for key, value in patterns.items()
    }
    described: Any = model
    described.rana_architecture = Architecture(**given)
    try:
        _check_described(model)
    except (AttributeError, ValueError) as error:
        del described.rana_architecture
        raise ValueError(f"patterns do not fit {type(model).__name__}: {error}") from None


def _check_described(model: nn.Module) -> None:
    known = architecture(model)
    if bool(known.up) != bool(known.down):
        raise ValueError("up and down come together")
    if known.up and not known.act and known.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {known.activation!r}, wanted one of {', '.join(ACTIVATIONS)}, "
            "or its module in act"
        )
    for block in find_blocks(model):
        if not block.linears:
            raise ValueError("a layer has no linears: give qkv, o, or up and down")
        for name in filter(None, (*block.linears, block.mlp, block.act)):
            model.get_submodule(name)


def is_described(model: nn.Module) -> bool:
    """Say whether `describe` has set the architecture of this model."""
    return isinstance(getattr(model, "rana_architecture", None), Architecture)


def architecture(model: nn.Module) -> Architecture:
    """Return the Architecture of this model. Raise ValueError, with a list of known ones, for any other."""
    if is_described(model):
        described: Any = model
        return described.rana_architecture
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return known_architecture(type(model).__name__, model_type)


def known_architecture(what: str, model_type: str | None) -> Architecture:
    """Return the Architecture of a model type of the table. `what` is the model that has it."""
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{what}: model.config.model_type is {model_type!r}, wanted one of "
            f"{', '.join(ARCHITECTURES)}. For a model of your own say with `patterns` which linear is "
            "what; another architecture is a line in rana_kernels/model/architectures.py"
        )
    return ARCHITECTURES[model_type]


def decoder_name(model: nn.Module) -> str:
    """Return the path of the module that has the layers, "" if `model` is that module.

    Raises ValueError if no module has them.
    """
    layers = architecture(model).layers
    for path in decoder_paths(model):
        try:
            model.get_submodule(".".join(filter(None, [path, layers])))
        except AttributeError:
            continue
        return path
    raise ValueError(
        f"{type(model).__name__} has no {' and no '.join(decoder_paths(model))}, wanted {layers}"
    )


def decoder_paths(model: nn.Module) -> list[str]:
    """Return where the decoder can be: by its whole path, or within a model that has no head around it."""
    parts = architecture(model).decoder.split(".")
    return list(dict.fromkeys(".".join(parts[i:]) for i in range(len(parts) + 1)))


def find_blocks(model: nn.Module) -> list[Block]:
    """Return all transformer blocks of `model`, first to last. Raise ValueError if there are none."""
    known, decoder = architecture(model), decoder_name(model)
    layers = ".".join(filter(None, [decoder, known.layers]))
    config = getattr(model, "config", None)
    activation = ACTIVATIONS.get(getattr(config, known.activation, known.activation))
    # not named_children: that leaves out a layer that is there twice
    children = [(name, layer) for name, layer in model.get_submodule(layers)._modules.items() if layer]
    if not children:
        raise ValueError(f"{type(model).__name__} has no layers in {layers}, wanted at least one")
    return [
        _block(_without_experts(known, layer), f"{layers}.{name}", i, activation)
        for i, (name, layer) in enumerate(children)
    ]


def _without_experts(known: Architecture, layer: nn.Module) -> Architecture:
    """Return the Architecture of one layer: without an MLP if the layer has experts, else without experts."""
    try:
        mixed = bool(known.experts) and layer.get_submodule(known.experts) is not None
    except AttributeError:
        mixed = False
    return replace(known, mlp="", up="", gate="", down="", act="") if mixed else replace(known, experts="")


def _block(known: Architecture, layer: str, index: int, activation: str | None) -> Block:
    def full(name: str) -> str:
        return f"{layer}.{name}" if name else ""

    return Block(
        index=index,
        qkv=tuple(full(name) for name in known.qkv),
        o=full(known.o),
        mlp=full(known.mlp),
        up=full(known.up),
        gate=full(known.gate),
        down=full(known.down),
        act=full(known.act),
        activation=activation,
        experts=full(known.experts),
    )
