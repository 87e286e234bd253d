"""Keys and values that grow without being copied.

The cache that transformers makes by default copies all its keys and values for every new token.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SPARE = 256  # tokens that a full room is enlarged by, at least


class Room:
    """A tensor [batch, heads, length, D] at the beginning of `memory` [batch, heads, room, D]."""

    def __init__(self, held: Tensor) -> None:
        self.memory, self.length = held, held.shape[2]

    def held(self) -> Tensor:
        return self.memory.narrow(2, 0, self.length)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more tokens. What is held is copied if there is none, or if it is frozen."""
        length = self.length + tokens
        frozen = self.memory.is_inference() and not torch.is_inference_mode_enabled()
        if length > self.memory.shape[2] or not self.memory.is_contiguous() or frozen:
            batch, heads, _, D = self.memory.shape
            memory = self.memory.new_empty(batch, heads, length + max(SPARE, length // 2), D)
            memory.narrow(2, 0, self.length).copy_(self.held())
            self.memory = memory


class GrowingLayer(DynamicLayer):
    """A DynamicLayer with room for more tokens behind its keys and values.

    Whoever sets `keys` or `values`, as transformers does to reorder, repeat or crop them, sets a tensor
    without room. It is copied at the next token, and so nobody's tensor is written to.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    @property
    def keys(self) -> Tensor | None:
        return None if self.key_room is None else self.key_room.held()

    @keys.setter
    def keys(self, held: Tensor | None) -> None:
        self.key_room = _room(held)

    @property
    def values(self) -> Tensor | None:
        return None if self.value_room is None else self.value_room.held()

    @values.setter
    def values(self, held: Tensor | None) -> None:
        self.value_room = _room(held)

    def rooms(self) -> tuple[Room, Room]:
        """Return the rooms of keys and values. Raise RuntimeError if the layer is empty."""
        if self.key_room is None or self.value_room is None:
            raise RuntimeError("GrowingLayer: it is empty, wanted a prompt to be read first")
        return self.key_room, self.value_room

    def reserve(self, tokens: int = 1) -> None:
        """Make room for so many more tokens."""
        for room in self.rooms():
            room.reserve(tokens)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **given: Any) -> tuple:
        if self.key_room is None or self.get_seq_length() == 0:
            return super().update(key_states, value_states, *args, **given)
        self.reserve(key_states.shape[2])
        for room, new in zip(self.rooms(), (key_states, value_states), strict=True):
            room.memory.narrow(2, room.length, new.shape[2]).copy_(new)
            room.length += new.shape[2]
        return self.keys, self.values


def _room(held: Tensor | None) -> Room | None:
    """Return the room of a tensor. None and transformers' empty tensor [0] have none."""
    return Room(held) if held is not None and held.dim() == 4 else None


def growing_layers(cache: Any) -> list[GrowingLayer] | None:
    """Make the layers of a filled DynamicCache growing ones and return them. Return None for other caches."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            layers[i] = GrowingLayer(layer.keys, layer.values)
        elif type(layer) is not GrowingLayer or layer.key_room is None:
            return None
    return layers
