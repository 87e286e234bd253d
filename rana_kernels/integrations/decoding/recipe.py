"""The blocks of a model as a recipe: the list of ops that they would call, which one call runs in C++.

It is run by `csrc/cpu/run_blocks.h`. A step of 16 blocks then calls torch once, in place of 160 times.
"""

from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from rana_kernels.integrations.decoding.cache import GrowingLayer
from rana_kernels.model.architectures import ACTIVATIONS
from rana_kernels.nn.adapters import RanaLinear, RanaNeuronLinear, RanaReceiver
from rana_kernels.nn.dense import DenseLinear, QuantizedLinear
from rana_kernels.nn.mlp import RanaMLP

with suppress(ImportError):  # nothing was compiled, and then no step is taken
    from rana_kernels import _held

# `csrc/cpu/run_blocks.h` has the same list
INSTRUCTIONS = (
    "add_norm", "norm_heads", "attend", "combine", "linear", "masked_linear", "masked_lowrank_linear",
    "masked_mlp",
)  # fmt: skip

# the op that a module calls, and its tensors in the order of the op's arguments after the input
CALLS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    DenseLinear: ("linear", ("weight", "bias", "weight_scale")),
    QuantizedLinear: ("linear", ("qweight", "bias", "qweight_scale")),
    RanaNeuronLinear: ("masked_linear", ("rows", "threshold", "norms", "bias", "rows_scale")),
    RanaLinear: ("masked_lowrank_linear", ("B", "rows", "threshold", "bias", "B_scale", "rows_scale")),
}
NONE = ({None: None}, None)  # the place of an argument that a module never has
recipes: WeakKeyDictionary[nn.Module, "Recipe | None"] = WeakKeyDictionary()  # of the models that decode


class NoRecipe(Exception):
    """A block computes something other than ops of ours, or is called with hooks."""


def recipe_of(model: nn.Module) -> "Recipe | None":
    """Return the recipe of a model, or None if it has none. It is made once."""
    with suppress(KeyError):
        return recipes[model]
    found: Recipe | None = None
    with suppress(NoRecipe):
        found = Recipe(model)
    recipes[model] = found
    return found


def forget_recipe(model: nn.Module) -> None:
    """Let the recipe of a model be made anew if it no longer holds."""
    recipe = recipes.get(model)
    if recipe is None or not recipe.holds():
        recipes.pop(model, None)


class Kept:
    """A recipe and its tensors in C++, as long as this object lives. `run_blocks` knows it by its number."""

    def __init__(self, instructions: list[int], weights: tuple[Tensor | None, ...]) -> None:
        self.weights = weights
        self.number = torch.ops.rana_decoding.keep_recipe(instructions, weights)
        finalize(self, torch.ops.rana_decoding.forget_recipe, self.number)


class Recipe:
    """The blocks of a model, as instructions and the places of their tensors.

    C++ keeps the tensors. A step only asks whether the modules still hold the same ones, so weights may be
    replaced. `run` returns None as soon as anything else has changed: a module, a hook, a setting.
    Raises NoRecipe for blocks that cannot be put into a recipe.
    """

    def __init__(self, model: Any) -> None:
        self.instructions: list[int] = []
        self.places: list[tuple[dict, Any]] = []  # of the tensors: a dictionary and a key
        self.settings: list[tuple[dict, str, object]] = []  # that hold while the recipe does
        self.hooks: list[dict] = []  # that are empty while it does
        decoder, config = model.model, model.config
        self.eps, self.scale = config.rms_norm_eps, decoder.layers[0].self_attn.scaling
        self.activation = ACTIVATIONS.get(config.hidden_act)
        for block in self._children(decoder, "layers").values():
            self._add_attention(block)
            self._add_mlp(block)
        self._add_norms("add_norm", decoder, "norm")
        self.held_settings = tuple(zip(*self.settings, strict=True))
        self.dictionaries, self.keys = zip(*self.places, strict=True)
        self.kept: Kept | None = None

    def holds(self) -> bool:
        """Whether the blocks still compute what they did when the recipe was made."""
        quiet = not any(self.hooks) and not _has_any_global_hook() and not torch.is_autocast_enabled("cpu")
        return quiet and _held.still_held(*self.held_settings)

    def keep(self) -> Kept:
        """Return what C++ keeps of this recipe, with the tensors of the moment.

        Raises KeyError if a module has got tensors of another kind.
        """
        kept = self.kept
        if kept is None or not _held.still_held(self.dictionaries, self.keys, kept.weights):
            weights = tuple(map(dict.__getitem__, self.dictionaries, self.keys))
            kept = self.kept = Kept(self.instructions, weights)
        return kept

    # see `blocks.py` for the mode
    @torch.inference_mode()
    def run(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], seen: Tensor | None, layers: list[GrowingLayer]
    ) -> Tensor | None:
        """Return the norm of the last block's output, and add the token to the cache.

        x [batch, 1, hidden] is left alone. For `seen`, see `decode`.
        """
        rooms = [layer.rooms() for layer in layers]
        length = rooms[0][0].length
        if not self.holds() or any(room.length != length for both in rooms for room in both):
            return None
        try:
            kept = self.keep()
        except KeyError:
            return None
        y = torch.ops.rana_decoding.run_blocks(
            x.clone(), kept.number, self.eps, *rotation, seen, [keys.memory for keys, _ in rooms],
            [values.memory for _, values in rooms], length, self.scale, self.activation or "",
        )  # fmt: skip
        for keys, values in rooms:
            keys.length = values.length = length + 1
        return y

    def _add_attention(self, block: nn.Module) -> None:
        attention = self._child(block, "self_attn", hooked=True)
        self._setting(vars(attention), "scaling", self.scale)
        self._add_norms("add_norm", block, "input_layernorm")
        self._add_linears(attention, "q_proj", "k_proj", "v_proj")
        if "q_norm" in attention._modules:
            self._add_norms("norm_heads", attention, "q_norm", "k_norm")
        self._add("attend")
        self._add_linears(attention, "o_proj")

    def _add_mlp(self, block: nn.Module) -> None:
        mlp = self._child(block, "mlp")
        self._add_norms("add_norm", block, "post_attention_layernorm")
        if type(mlp) is RanaMLP:
            return self._add_masked_mlp(mlp)
        if self.activation is None or not type(mlp).__module__.startswith("transformers.models."):
            raise NoRecipe
        self._child(mlp, "act_fn")
        self._add_linears(mlp, "gate_proj", "up_proj")
        self._add("combine")
        self._add_linears(mlp, "down_proj")

    def _add_masked_mlp(self, mlp: RanaMLP) -> None:
        if mlp.activation != self.activation or mlp.gate_rank is None or mlp.names[0] == mlp.names[1]:
            raise NoRecipe
        up, gate, down = (self._child(mlp, name) for name in mlp.names)
        self._setting(vars(mlp), "activation", mlp.activation)
        tensors = [
            (mlp, "B"), (up, "rows"), (gate, "rows"), (mlp, "threshold"), (mlp, "norms"), (up, "bias"),
            (gate, "bias"), (down, "rows"), (down, "norms"), (down, "threshold"), (down, "bias"),
            (mlp, "B_scale"), (up, "rows_scale"), (gate, "rows_scale"), (down, "rows_scale"),
        ]  # fmt: skip
        self._add("masked_mlp", *(_place(module, name) for module, name in tensors))

    def _add_norms(self, instruction: str, parent: nn.Module, *names: str) -> None:
        norms = [self._child(parent, name, hooked=True) for name in names]
        for norm in norms:
            self._setting(vars(norm), "variance_epsilon", self.eps)
        self._add(instruction, *(_place(norm, "weight") for norm in norms))

    def _add_linears(self, parent: nn.Module, *names: str) -> None:
        """Add the ops of linears that read the same input. A receiver follows the adapter that it shares."""
        owner, received = None, 0
        for name in names:
            linear = self._child(parent, name)
            if type(linear) is RanaReceiver:
                if owner is None or linear.handoff is not owner or linear.index != received:
                    raise NoRecipe
                received += 1
                continue
            if type(linear) not in CALLS:
                raise NoRecipe
            op, tensors = CALLS[type(linear)]
            owner, received = getattr(linear, "handoff", None), 0
            self._add(op, *(_place(linear, tensor) for tensor in tensors))

    def _add(self, instruction: str, *places: tuple[dict, Any]) -> None:
        self.instructions.append(INSTRUCTIONS.index(instruction))
        self.places.extend(places)

    def _child(self, parent: nn.Module, name: str, hooked: bool = False) -> nn.Module:
        """Return a child, which stays where it is while the recipe holds.

        hooked   whether it may have hooks, which a step does not call
        """
        child = parent._modules.get(name)
        if child is None:
            raise NoRecipe
        self._setting(parent._modules, name, child)
        if not hooked:
            self._setting(vars(child), "forward", None)
            self.hooks += [child._forward_hooks, child._forward_pre_hooks]
        return child

    def _children(self, parent: nn.Module, name: str) -> dict[str, nn.Module]:
        holder = self._child(parent, name, hooked=True)
        return {each: self._child(holder, each, hooked=True) for each in holder._modules}

    def _setting(self, held: dict, name: str, value: object) -> None:
        found = held.get(name)
        if found != value:
            raise NoRecipe
        self.settings.append((held, name, found))


def _place(module: nn.Module, name: str) -> tuple[dict, Any]:
    """Return the dictionary and the key of a module's tensor."""
    for held in (module._parameters, module._buffers, vars(module)):
        if name in held:
            return held, name
    return NONE
