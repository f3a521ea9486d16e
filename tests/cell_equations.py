"""The equations of every cell, said plainly a second time: one step of one row, one gate after the other.

What no layer of torch's is like is tested against these. They are slow, share no code with `lstm_triton.reference`, and
draw zoneout's words with Philox in Python's integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lstm_triton.spec import CellSpec, activation_of

# torch's own, or the same said otherwise
FORMULAS: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "tanh": lambda x, a, b: 2 * torch.special.expit(2 * x) - 1,
    "sigmoid": lambda x, a, b: torch.special.expit(x),
    "relu": lambda x, a, b: nn.functional.threshold(x, 0.0, 0.0),
    "hard_sigmoid": lambda x, a, b: nn.functional.hardtanh(a * x + b, 0.0, 1.0),
    "linear": lambda x, a, b: x,
    "affine": lambda x, a, b: torch.add(b * torch.ones_like(x), x, alpha=a),
    "elu": lambda x, a, b: x.relu() + a * torch.expm1(-(-x).relu()),
    "leaky_relu": lambda x, a, b: nn.functional.leaky_relu(x, a),
    "scaled_tanh": lambda x, a, b: a * (2 * torch.special.expit(2 * b * x) - 1),
    "softplus": lambda x, a, b: torch.logaddexp(x, torch.zeros_like(x)),
    "softsign": lambda x, a, b: nn.functional.softsign(x),
    "thresholded_relu": lambda x, a, b: nn.functional.threshold(x, a, 0.0),
}


def layer_norm(value: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    return nn.functional.layer_norm(value, value.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"])


def philox_words(seed: int, counter: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4x32-10 in Python's integers."""
    word = 2**32
    c0, c1, c2, c3 = counter
    k0, k1 = seed % word, seed // word % word
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b // word ^ c1 ^ k0, b % word, a // word ^ c3 ^ k1, a % word
        k0, k1 = (k0 + 0x9E3779B9) % word, (k1 + 0xBB67AE85) % word
    return c0, c1, c2, c3


def kept_of(seed: int, t: int, row: int, columns: int, probability: float, word: int) -> Tensor:
    words = [philox_words(seed, (unit, row, t, 0))[word] for unit in range(columns)]
    return torch.tensor([float(w // 2**8 < round(probability * 2**24)) for w in words], dtype=torch.float64)


def by_equations(
    spec: CellSpec, v: dict[str, Tensor], *, lengths: Tensor | None = None, mask: Tensor | None = None,
    reset: Tensor | None = None, seed: Tensor | None = None, reverse: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `call` should give: the equations for one step of one row at a time, one gate after the other."""
    T, B, _ = v["x"].shape
    H = v["w_hh"].shape[0] // spec.gates
    place = {gate: k for k, gate in enumerate(spec.gate_names)}

    def of(name: str, gate: str) -> Tensor:
        return v[name][place[gate] * H : (place[gate] + 1) * H]

    def masked(vector: Tensor, name: str, gate: str, row: int) -> Tensor:
        if name not in v:
            return vector
        return v[name][place[gate], row] * vector if v[name].dim() == 3 else v[name][row] * vector

    def products(vector: Tensor, w: str, row: int) -> dict[str, Tensor]:
        mask_name = "input_mask" if w == "ih" else "recurrent_mask"
        parts = [of(f"w_{w}", gate).mv(masked(vector, mask_name, gate, row)) for gate in place]
        if spec.layer_norm:
            parts = layer_norm(torch.cat(parts), v, f"norm_{w}").split(H)
        bias = [of(f"b_{w}", gate) if spec.bias else torch.zeros(H) for gate in place]
        return {gate: part + b for gate, part, b in zip(place, parts, bias, strict=True)}

    def phi(activation: Any, a: Tensor, clip: float | None = spec.gate_clip) -> Tensor:
        a = a if clip is None else nn.functional.hardtanh(a, -clip, clip)
        name, alpha, beta = activation_of(activation)
        return FORMULAS[name](a, alpha, beta)

    def candidate(x: Tensor, row: int, h: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        xs, hs = products(x, "ih", row), products(h, "hh", row)
        sums = {gate: xs[gate] + hs[gate] for gate in place}
        if spec.cell == "rnn":
            return (phi(spec.activation, sums["h"]),)
        if spec.cell == "gru":
            r, z = (phi(spec.recurrent_activation, sums[gate]) for gate in "rz")
            inner = r * hs["n"]
            if not spec.reset_after:
                inner = of("w_hh", "n").mv(masked(r * h, "recurrent_mask", "n", row))
                inner = inner + of("b_hh", "n") if spec.bias else inner
            n = phi(spec.activation, xs["n"] + inner)
            return (n + z * (h - n),)
        peephole = dict(zip(spec.peepholes, v.get("peephole", ()), strict=True))
        i, f = (phi(spec.recurrent_activation, sums.get(k, 0 * c) + peephole.get(k, 0) * c) for k in "if")
        c = (1 - i if spec.coupled else f) * c + i * phi(spec.activation, sums["g"])
        c = c if spec.cell_clip is None else nn.functional.hardtanh(c, -spec.cell_clip, spec.cell_clip)
        o = phi(spec.recurrent_activation, sums["o"] + peephole.get("o", 0) * c)  # c not yet normalised
        c = layer_norm(c, v, "norm_c") if spec.layer_norm else c
        h = o * phi(spec.output_phi, c, None)
        return (v["w_hr"].mv(h) if spec.proj else h), c

    rows = []
    for row in range(B):
        state = [v[name][row] for name in spec.states]
        outputs = [[torch.zeros_like(s)] * T for s in state]
        end = T if lengths is None else max(0, min(T, int(lengths[row])))
        for t in reversed(range(end)) if reverse else range(end):
            if reset is not None and reset[t, row]:
                state = [torch.zeros_like(s) for s in state]
            if mask is not None and not mask[t, row]:
                continue
            new = candidate(v["x"][t, row], row, *state, *[None] * (2 - len(state)))
            for k, p in enumerate(spec.zoneout[: len(state)]):
                drawn = p if seed is None else kept_of(int(seed), t, row, len(state[k]), p, k)
                state[k] = outputs[k][t] = drawn * state[k] + (1 - drawn) * new[k]
        rows.append([*(torch.stack(o) for o in outputs), *state])
    found = [torch.stack(r, dim=-2) for r in zip(*rows, strict=True)]
    return (found[0], found[2], found[3], found[1]) if spec.cell == "lstm" else tuple(found)
