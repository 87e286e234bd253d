"""Which submodule of which architecture is what: data, not code. A new model is a line here.

Keyed by `model.config.model_type`, the name that Hugging Face transformers gives an architecture
(which is not imported: any module of that layout with such a config works). A model of somebody's own
is described by the same fields, with `describe`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where things are: `layers` is the path of the list of layers within `decoder`, and `decoder` that
    of the module that runs them. The others are paths within a layer; "" is for what it does not have.

    qkv          the linears that read what attention reads, in the order in which they are called
    o            attention's output projection
    gate, up     the linears that the MLP begins with. The same path twice: one linear computes both,
                 gate's half first
    down         the linear that reads act(gate(x)) * up(x), or act(up(x)) where there is no gate
    mlp          a module that computes just that, so that one op can take its place; "": the linears
                 are adapted one by one
    act          the module that computes the activation; "": by the name that `activation` gives
    activation   the field of the config that names the activation, or its name
    experts      a module that a layer has where its MLP is a mixture of experts: that MLP stays dense
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


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA = Architecture(
    decoder="model", layers="layers", qkv=_QKV, o="self_attn.o_proj",
    mlp="mlp", up="mlp.up_proj", gate="mlp.gate_proj", down="mlp.down_proj",
    act="mlp.act_fn", activation="hidden_act",
)  # fmt: skip
_GEMMA2 = replace(_LLAMA, activation="hidden_activation")
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
_MIXTURE = replace(_LLAMA, experts="mlp.experts")

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

# what configs call an activation -> what `masked_mlp` calls it
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
    """One transformer block: full names of its linears, and "" for those that it does not have.

    `gate` is "" in an ungated MLP, and `up` itself where one linear computes both, gate first. `act` is
    the module that computes the MLP's activation, `activation` the name `masked_mlp` has for it: None if
    no op computes it. Then, or without `mlp`, the MLP stays, with its linears adapted one by one.
    `experts`: the mixture of experts that is left dense.
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

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears, in the order in which the model calls them."""
        return tuple(name for names in self.inputs.values() for name in names)

    @property
    def expanding(self) -> tuple[str, ...]:
        """The linears that the MLP begins with: gate and up, up alone, or one that is both."""
        return tuple(dict.fromkeys(filter(None, (self.gate, self.up))))

    @property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """The distinct inputs, and the linears that read each."""
        readers = {"qkv": self.qkv, "o": (self.o,), "mlp": self.expanding, "down": (self.down,)}
        return {name: linears for name, linears in readers.items() if any(linears)}


def describe(model: nn.Module, patterns: Mapping[str, Any]) -> None:
    """Say of a model that is no known architecture which of its linears is what.

    patterns   the fields of `Architecture`, at least `layers`

    Noted on the model itself, for every later step. Raises ValueError for fields, modules or an
    activation that do not exist.
    """
    known = {field.name for field in fields(Architecture)}
    if not isinstance(patterns, Mapping) or "layers" not in patterns or set(patterns) - known:
        has = sorted(patterns) if isinstance(patterns, Mapping) else type(patterns).__name__
        raise ValueError(f"patterns has {has}, wanted `layers` and any of {', '.join(sorted(known))}")
    given: dict[str, Any] = {key: tuple(value) if key == "qkv" else value for key, value in patterns.items()}
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
    """Whether `describe` said what is what, rather than the table."""
    return isinstance(getattr(model, "rana_architecture", None), Architecture)


def architecture(model: nn.Module) -> Architecture:
    """The entry for this model; ValueError lists what is known."""
    if is_described(model):
        described: Any = model
        return described.rana_architecture
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__}: model.config.model_type is {model_type!r}, wanted one of "
            f"{', '.join(ARCHITECTURES)}. For a model of your own say with `patterns` which linear is "
            "what; another architecture is a line in rana_kernels/models.py"
        )
    return ARCHITECTURES[model_type]


def decoder_name(model: nn.Module) -> str:
    """Path of the module that owns the layers: "" when `model` is itself the headless model."""
    known = architecture(model)
    return "" if hasattr(model, known.layers) else known.decoder


def find_blocks(model: nn.Module) -> list[Block]:
    """Every transformer block of `model`, first to last, with the full names of its linears."""
    known, decoder = architecture(model), decoder_name(model)
    layers = ".".join(filter(None, [decoder, known.layers]))
    config = getattr(model, "config", None)
    activation = ACTIVATIONS.get(getattr(config, known.activation, known.activation))
    children = list(model.get_submodule(layers).named_children())
    return [
        _block(_without_experts(known, layer), f"{layers}.{name}", i, activation)
        for i, (name, layer) in enumerate(children)
    ]


def _without_experts(known: Architecture, layer: nn.Module) -> Architecture:
    """The entry as it holds for this layer: with experts there is no MLP of plain linears, or no experts."""
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
