"""Which submodule of which architecture is what: data, not code. A new model is a line here.

Keyed by `model.config.model_type`, the name that Hugging Face transformers gives an architecture
(which is not imported: any module of that layout with such a config works).
"""

from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """Names inside a decoder layer; `decoder` is the path of the module that owns `layers`.

    `activation` is the field of the config that names the MLP's activation.
    """

    decoder: str
    layers: str
    attention: str
    qkv: tuple[str, str, str]
    o: str
    mlp: str
    up: str
    gate: str
    down: str
    act: str
    activation: str


_LLAMA = Architecture(
    decoder="model", layers="layers",
    attention="self_attn", qkv=("q_proj", "k_proj", "v_proj"), o="o_proj",
    mlp="mlp", up="up_proj", gate="gate_proj", down="down_proj", act="act_fn", activation="hidden_act",
)  # fmt: skip
_GEMMA2 = replace(_LLAMA, activation="hidden_activation")

ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
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
    """One transformer block: full names of its linears.

    `act` is the module that computes the MLP's activation, `activation` the name `masked_mlp` has for
    it: None if no op computes it, and the MLP then stays, with its linears adapted one by one.
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

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears, in the order in which the model calls them."""
        return (*self.qkv, self.o, self.gate, self.up, self.down)

    @property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """The distinct inputs, and the linears that read each."""
        return {"qkv": self.qkv, "o": (self.o,), "mlp": (self.gate, self.up), "down": (self.down,)}


def architecture(model: nn.Module) -> Architecture:
    """The entry for this model; ValueError lists what is known."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{type(model).__name__}: model.config.model_type is {model_type!r}, wanted one of "
            f"{', '.join(ARCHITECTURES)}. Another architecture is a line in rana_kernels/models.py"
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
    activation = ACTIVATIONS.get(getattr(model.config, known.activation, ""))
    names = [name for name, _ in model.get_submodule(layers).named_children()]
    return [_block(known, f"{layers}.{name}", i, activation) for i, name in enumerate(names)]


def _block(known: Architecture, layer: str, index: int, activation: str | None) -> Block:
    attention, mlp = f"{layer}.{known.attention}", f"{layer}.{known.mlp}"
    return Block(
        index=index,
        qkv=tuple(f"{attention}.{name}" for name in known.qkv),
        o=f"{attention}.{known.o}",
        mlp=mlp,
        up=f"{mlp}.{known.up}",
        gate=f"{mlp}.{known.gate}",
        down=f"{mlp}.{known.down}",
        act=f"{mlp}.{known.act}",
        activation=activation,
    )
