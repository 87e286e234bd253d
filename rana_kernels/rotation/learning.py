"""The learning of a rotation of the residual stream, for the least loss of masks.

The loss of an input's mask is taken as Σ x_i²·n_i² over the dropped inputs, with n_i² the mean square of the
slope by input i. A mask that keeps a share of the largest terms is the best one for this sum, so its
derivative by the rotation is that of the dropped terms alone. Q moves along the orthogonal matrices by Cayley
steps (Wen and Yin, 2013).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rana_kernels.system.progress import track

STEPS = 300
KEPT = 0.7  # the share of inputs that the masks keep
INPUTS = 10  # inputs a step, chosen at random
TOKENS = 768  # of each
RATE, MOMENTUM = 0.03, 0.9
SAMPLED = 8  # one value of so many decides the threshold


@dataclass(frozen=True)
class ReadInput:
    """One input that is read from the stream: tokens x [P, K] and their slopes [P, K], both float32."""

    x: Tensor
    slopes: Tensor


def learn(inputs: list[ReadInput], *, steps: int = STEPS, seed: int = 0, progress: bool = True) -> Tensor:
    """Return the orthogonal Q [K, K] float32 for which masks of x @ Q lose least, as far as `steps` lead."""
    x = inputs[0].x
    Q = unit = torch.eye(x.shape[1], device=x.device)
    velocity, generator = torch.zeros_like(Q), torch.Generator().manual_seed(seed)
    for step in track(range(steps), "rotating", progress):
        chosen = torch.randperm(len(inputs), generator=generator)[:INPUTS].tolist()
        ambient = torch.stack([_derivative(inputs[i], Q, generator) for i in chosen]).sum(0)
        along = Q.T @ ambient
        turn = (along - along.T) / 2
        velocity = MOMENTUM * velocity + turn * (math.sqrt(len(Q)) / turn.norm().clamp_min(1e-30))
        half = RATE * (1 - step / steps) / 2 * velocity
        Q = Q @ torch.linalg.solve(unit + half, unit - half)
    return _orthogonal(Q)


def loss_of(inputs: list[ReadInput], Q: Tensor | None = None) -> float:
    """Return the sum over inputs of what masks of x @ Q drop, mean over tokens. Without Q, of x."""
    total = 0.0
    for own in inputs:
        x, slopes = (own.x, own.slopes) if Q is None else (own.x @ Q, own.slopes @ Q)
        terms = x.square() * slopes.square().mean(0)
        total += float(torch.where(_dropped(terms), terms, 0).sum()) / len(x)
    return total


def _derivative(own: ReadInput, Q: Tensor, generator: torch.Generator) -> Tensor:
    """Return the derivative [K, K] of the loss of one input by Q, on some of its tokens."""
    some = torch.randperm(len(own.x), generator=generator)[:TOKENS].to(own.x.device)
    x, slopes = own.x[some], own.slopes[some]
    turned, steep = x @ Q, slopes @ Q
    norms = steep.square().mean(0)
    lost = torch.where(_dropped(turned.square() * norms), turned, 0)
    by_x = 2 / len(x) * lost * norms
    by_slopes = 2 / len(x) ** 2 * steep * lost.square().sum(0)
    return x.T @ by_x + slopes.T @ by_slopes


def _dropped(terms: Tensor) -> Tensor:
    some = terms.flatten()[::SAMPLED]
    return terms < some.kthvalue(max(1, round((1 - KEPT) * len(some)))).values


def _orthogonal(Q: Tensor) -> Tensor:
    """Return the orthogonal matrix next to Q, which rounding has moved a little."""
    U, _, V = torch.linalg.svd(Q.double())
    return (U @ V).float()
