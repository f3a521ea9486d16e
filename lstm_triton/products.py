"""What is one product over all time steps, in plain torch: gradients by x and the weights, and gates made again.

Names and shapes: ops.py. da [T, B, D*H] are the gradients by the pre-activations, in slots (constexprs.slots): those by
the input product first, of the GRU with reset after in the order n, r, z; then, or among them, those by the recurrent
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import constexprs
from .reference import activate
from .spec import EPSILON, RESET, VALID, Activation, CellSpec


class Kept(NamedTuple):
    """What forward keeps for backward beside h, None where the cell needs none of it."""

    gates: Tensor | None  # [T, B, G*H]
    extra: Tensor | None  # [T, B, H] c of the LSTM, W_hn h[t-1] + b_hn of the GRU, `extra` of a registered cell
    normed: Tensor | None  # [T, B, G*H] the recurrent product, normalised
    stats: Tensor | None  # [T, B, 4] its mean and 1 / standard deviation, and those of c


class Weights(NamedTuple):
    """What does not change with time."""

    w_ih: Tensor | None
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None
    params: Tensor | None
    mask: Tensor | None  # [B, P] or [G, B, P]


def per_sample(
    function: Callable[..., tuple[Tensor, ...]], samples: int, tensors: Sequence[Tensor | None],
    dims: Sequence[int | None], out_dims: tuple[int, ...],
) -> tuple[Tensor, ...]:  # fmt: skip
    """function() of each of `samples` parts of the batch, which lies at `dims`; stacked at `out_dims`."""
    if samples == 1:
        return tuple(found.unsqueeze(at) for found, at in zip(function(*tensors), out_dims, strict=True))
    dims = tuple(None if t is None else at for t, at in zip(tensors, dims, strict=True))
    parts = (t if at is None else t.unflatten(at, (samples, -1)) for t, at in zip(tensors, dims, strict=True))
    return torch.vmap(function, dims, out_dims)(*parts)


def remade(
    spec: CellSpec, x: Tensor, h_before: Tensor, c: Tensor | None, c_before: Tensor | None, weights: Weights
) -> Kept:
    """What the forward kernel keeps, from x[t], h[t-1], and of the LSTM c[t] and c[t-1], of all steps at once."""
    if not constexprs.saves(spec)[0]:
        return Kept(None, c, None, None)
    H = weights.w_hh.shape[0] // spec.gates
    high = torch.promote_types(x.dtype, torch.float32)
    a = x.to(high, copy=True) if weights.w_ih is None else linear(x, weights.w_ih, weights.b_ih).to(high)
    by_gate = [a[..., i * H : (i + 1) * H] for i in range(spec.gates)]
    product, normed, stats, extra = _recurrent_product(spec, h_before, weights), None, None, c
    if spec.layer_norm:
        product = product.to(high)
        variance, mean = torch.var_mean(product, -1, correction=0, keepdim=True)
        scale = torch.rsqrt(variance + EPSILON)
        normed = product.sub_(mean).mul_(scale)
        first = len(spec.vectors)
        product = normed * weights.params[first : first + spec.gates].flatten() + weights.b_hh
        stats = torch.cat((mean, scale, torch.zeros_like(mean), torch.ones_like(mean)), -1)
    if spec.cell == "gru":
        a[..., : 2 * H] += product[..., : 2 * H]
        r = opened(spec, by_gate[0], spec.recurrent_activation)
        if spec.reset_after:
            extra = product[..., 2 * H :].to(x.dtype).contiguous()
            by_gate[2].addcmul_(r, extra.to(high))
        else:
            rows = _masked_rows((r * h_before).to(x.dtype), weights.mask, 2)
            by_gate[2] += linear(rows, weights.w_hh[2 * H :], None if weights.b_hh is None else weights.b_hh[2 * H :])
    else:
        a += product
    if spec.has_c:
        _finish_lstm(spec, by_gate, c, c_before, stats, weights)
    for name, gate in zip(spec.gate_names, by_gate, strict=True):
        gate.copy_(kept_gate(spec, gate, _activation(spec, name)))
    return Kept(a.to(x.dtype), extra, None if normed is None else normed.to(x.dtype), stats)


def _finish_lstm(
    spec: CellSpec, gates: list[Tensor], c: Tensor, c_before: Tensor, stats: Tensor | None, weights: Weights
) -> None:
    """Add the peepholes to the pre-activations, and the statistics of c to stats."""
    if spec.peephole:
        for row, gate in zip(weights.params, range(len(spec.peepholes) - 1), strict=False):
            gates[gate] += row * c_before
    if spec.peephole or spec.layer_norm:
        made = c.to(gates[0].dtype)
        if spec.remakes_cell:
            values = [opened(spec, a, _activation(spec, n)) for a, n in zip(gates, spec.gate_names, strict=True)]
            made = _candidate(spec, values, c_before)
        if spec.peephole:
            gates[-1] += weights.params[len(spec.peepholes) - 1] * made
        if spec.layer_norm:
            variance, mean = torch.var_mean(made, -1, correction=0)
            stats[..., 2] = mean
            stats[..., 3] = torch.rsqrt(variance + EPSILON)


def opened(spec: CellSpec, a: Tensor, activation: Activation) -> Tensor:
    """A gate from its pre-activation."""
    a = a if spec.gate_clip is None else a.clamp(-spec.gate_clip, spec.gate_clip)
    return activate(a, activation)


def kept_gate(spec: CellSpec, a: Tensor, activation: Activation) -> Tensor:
    """What the kernels keep of a gate (kernels/cells.py, `keep`), from its pre-activation."""
    kept = opened(spec, a, activation) if spec.keeps_value(activation) else a
    if spec.gate_clip is None:
        return kept
    mark = 2 if spec.keeps_value(activation) else 2 * spec.gate_clip
    return torch.where(a.abs() > spec.gate_clip, mark * a.sign(), kept)


def reopened(spec: CellSpec, kept: Tensor, activation: Activation) -> Tensor:
    """A gate from what was kept of it."""
    if not spec.keeps_value(activation):
        return opened(spec, kept, activation)
    if spec.gate_clip is None:
        return kept
    return torch.where(kept.abs() > 1.5, opened(spec, kept.sign() * spec.gate_clip, activation), kept)


def input_gradient(spec: CellSpec, da: Tensor, w_ih: Tensor | None) -> Tensor:
    """dx [T, B, I]; without w_ih, by the input product [T, B, G*H]."""
    by_x = _by_input_product(spec, da)
    shift = spec.kind.shift * (by_x.shape[-1] // spec.gates)
    if w_ih is None:
        return by_x.roll(-shift, -1) if shift else by_x.contiguous()
    T, B, _ = da.shape
    return (_rows(by_x) @ (w_ih.roll(shift, 0) if shift else w_ih)).view(T, B, -1)


def weight_gradients(
    spec: CellSpec, reverse: bool, needs: Sequence[bool], samples: int, da: Tensor, dh_all: Tensor | None,
    dparams: Tensor | None, x: Tensor, h: Tensor, h0: Tensor, c0: Tensor | None, steps: Tensor | None, kept: Kept,
    weights: Weights,
) -> list[Tensor | None]:  # fmt: skip
    """Those by the Weights, where `needs` says so: [samples, ...], but by mask like it."""

    def of_one(
        da: Tensor, dh_all: Tensor | None, dparams: Tensor | None, x: Tensor, h: Tensor, h0: Tensor, c0: Tensor | None,
        steps: Tensor | None, gates: Tensor | None, extra: Tensor | None, stats: Tensor | None, mask: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        by_x, by_h = _by_input_product(spec, da), by_recurrent_product(spec, da)
        of = weights._replace(mask=mask)
        rows = len(spec.rows)
        found = []
        if needs[0]:
            found.append(_in_gate_order(spec, _summed_product(by_x, x)))
        if needs[1]:
            found.append(_recurrent_weight_gradient(spec, by_h, h, h0, steps, gates, reverse, of))
        if needs[2]:
            found.append(_in_gate_order(spec, by_x.sum((0, 1))))
        if needs[3]:
            found.append(dparams[:, rows:].sum(0).flatten().to(da.dtype) if spec.layer_norm else by_h.sum((0, 1)))
        if needs[4]:
            c_before = previous(extra, c0, steps, reverse) if spec.remakes_cell else None
            projected = unprojected(spec, gates, extra, c_before, stats, weights.params)
            found.append(_summed_product(dh_all, masked(projected.to(dh_all.dtype), steps)))
        if needs[5]:
            found.append(dparams[:, :rows].sum(0).to(da.dtype))
        if needs[6]:
            found.append(_mask_gradient(spec, by_h, previous(h, h0, steps, reverse), gates, of))
        return tuple(found)

    if not any(needs):
        return [None] * len(needs)
    tensors = (da, dh_all, dparams, x, h, h0, c0, steps, kept.gates, kept.extra, kept.stats, weights.mask)
    mask_dim = 0 if weights.mask is None else weights.mask.dim() - 2
    dims = (1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, mask_dim)
    out_dims = tuple(at for at, need in zip((0, 0, 0, 0, 0, 0, mask_dim), needs, strict=True) if need)
    found = iter(per_sample(of_one, samples, tensors, dims, out_dims))
    results = [next(found) if need else None for need in needs]
    if needs[6]:  # the samples are rows of the batch again
        results[6] = results[6].reshape(weights.mask.shape)
    return results


def unprojected(
    spec: CellSpec, gates: Tensor, c: Tensor, c_before: Tensor | None, stats: Tensor | None, params: Tensor | None
) -> Tensor:
    """r = o * phi(c), what an LSTM projects: cheaper to compute again than to keep."""
    H = c.shape[-1]
    kept = gates.split(H, -1)
    high = torch.promote_types(c.dtype, torch.float32)
    open_gate = [
        gate if spec.plain else reopened(spec, gate.to(high), _activation(spec, name))
        for name, gate in zip(spec.gate_names, kept, strict=True)
    ]
    made = _candidate(spec, open_gate, c_before) if spec.remakes_cell else c
    if spec.layer_norm:
        made = (made - stats[..., 2:3]) * stats[..., 3:] * params[-2] + params[-1]
    return open_gate[-1] * activate(made, spec.output_phi)


def _candidate(spec: CellSpec, gates: Sequence[Tensor], c_before: Tensor) -> Tensor:
    """c[t] as the step made it, clipped and before zoneout."""
    if spec.coupled:
        i, g, _ = gates
        made = (1 - i) * c_before + i * g
    else:
        i, f, g, _ = gates
        made = f * c_before + i * g
    return made if spec.cell_clip is None else made.clamp(-spec.cell_clip, spec.cell_clip)


def _activation(spec: CellSpec, gate: str) -> Activation:
    return spec.activation if gate in "gnh" else spec.recurrent_activation


def _recurrent_product(spec: CellSpec, h_before: Tensor, weights: Weights) -> Tensor:
    """W_hh h[t-1] of all gates, with b_hh unless it is normalised; where the reset comes first, of r and z alone."""
    w_hh, b_hh, mask = weights.w_hh, weights.b_hh, weights.mask
    H = w_hh.shape[0] // spec.gates
    count = spec.gates if spec.reset_after else 2
    bias = None if b_hh is None or spec.layer_norm else b_hh[: count * H]
    if mask is None or mask.dim() == 2:
        return linear(_masked_rows(h_before, mask, 0), w_hh[: count * H], bias)
    parts = [
        linear(h_before * mask[i], w_hh[i * H : (i + 1) * H], None if bias is None else bias[i * H : (i + 1) * H])
        for i in range(count)
    ]
    return torch.cat(parts, -1)


def _masked_rows(h: Tensor, mask: Tensor | None, gate: int) -> Tensor:
    """h [T, B, P] times the mask of a gate."""
    return h if mask is None else h * (mask if mask.dim() == 2 else mask[gate])


def _recurrent_weight_gradient(
    spec: CellSpec, by_h: Tensor, h: Tensor, h0: Tensor, steps: Tensor | None, gates: Tensor | None, reverse: bool,
    weights: Weights,
) -> Tensor:  # fmt: skip
    """sum over t of by_h[t]^T h[t-1], each gate with the rows that its product was of."""
    if weights.mask is None and spec.reset_after:
        return _summed_product_before(by_h, h, h0, steps, reverse)
    before = previous(h, h0, steps, reverse)
    H = by_h.shape[-1] // spec.gates
    if spec.reset_after and weights.mask.dim() == 2:
        return _summed_product(by_h, before * weights.mask)
    rows = _rows_of_gates(spec, before, gates, weights.mask)
    return torch.cat([_summed_product(by_h[..., i * H : (i + 1) * H], row) for i, row in enumerate(rows)])


def _rows_of_gates(spec: CellSpec, before: Tensor, gates: Tensor | None, mask: Tensor | None) -> list[Tensor]:
    """h[t-1] as each gate's product has it: masked, and of n, where the reset comes first, times r."""
    found = [_masked_rows(before, mask, i) for i in range(spec.gates)]
    if not spec.reset_after:
        found[2] = _masked_rows(_reset_state(spec, before, gates), mask, 2)
    return found


def _reset_state(spec: CellSpec, before: Tensor, gates: Tensor) -> Tensor:
    r = gates[..., : before.shape[-1]]
    r = reopened(spec, r, spec.recurrent_activation)
    return (r * before).to(before.dtype)


def _mask_gradient(spec: CellSpec, by_h: Tensor, before: Tensor, gates: Tensor | None, weights: Weights) -> Tensor:
    """By recurrent_mask, like it: sum over t of h[t-1] times the gradient by the masked one."""
    H = by_h.shape[-1] // spec.gates
    found = []
    for i, rows in enumerate(_rows_of_gates(spec, before, gates, None)):
        gate = slice(i * H, (i + 1) * H)
        found.append(((by_h[..., gate] @ weights.w_hh[gate]) * rows).sum(0))
    return sum(found) if weights.mask.dim() == 2 else torch.stack(found)


def _summed_product_before(by_h: Tensor, h: Tensor, h0: Tensor, steps: Tensor | None, reverse: bool) -> Tensor:
    """sum over t of by_h[t]^T h[t-1], h[t-1] in the order of processing and zero where the step starts from zeros."""
    T = h.shape[0]
    if isinstance(T, torch.SymInt):
        # For compilers, to which T-1 steps would make T = 2 a case of its own.
        return _summed_product(by_h, previous(h, h0, steps, reverse))
    first, rest, before = (T - 1, slice(0, T - 1), slice(1, T)) if reverse else (0, slice(1, T), slice(0, T - 1))
    h_before = h[before]
    if steps is not None:
        carry = carries(steps)
        h0, h_before = torch.where(carry[first], h0, 0), torch.where(carry[rest], h_before, 0)
    found = by_h[first].t() @ h0
    return found if T == 1 else torch.addmm(found, _rows(by_h[rest]).t(), _rows(h_before))


def _summed_product(left: Tensor, right: Tensor) -> Tensor:
    """sum over t of left[t]^T right[t]."""
    return _rows(left).t() @ _rows(right)


def _rows(tensor: Tensor) -> Tensor:
    """[T, B, any] -> [T*B, any]. `reshape` has a batching rule for is_grads_batched too, which `flatten` lacks."""
    T, B, columns = tensor.shape
    return tensor.reshape(T * B, columns)


def _by_input_product(spec: CellSpec, da: Tensor) -> Tensor:
    """The slots of da by the input product."""
    D, _ = constexprs.slots(spec)
    return da if spec.gates == D else da[..., : da.shape[-1] // D * spec.gates]


def by_recurrent_product(spec: CellSpec, da: Tensor) -> Tensor:
    """The slots of da by the recurrent product, in torch.nn's order."""
    D, first = constexprs.slots(spec)
    return da if spec.gates == D else da[..., da.shape[-1] // D * first :]


def _in_gate_order(spec: CellSpec, by_x: Tensor) -> Tensor:
    """From the order of _by_input_product along the rows to torch.nn's."""
    shift = spec.kind.shift * (by_x.shape[0] // spec.gates)
    return by_x.roll(-shift, 0) if shift else by_x


def previous(h: Tensor, h_first: Tensor, steps: Tensor | None, reverse: bool) -> Tensor:
    """h[t-1] of each of these steps, in the order of processing; zero where a step starts from zeros."""
    T = h.shape[0]
    shifted = torch.cat((h, h_first[None]))[1:] if reverse else torch.cat((h_first[None], h))[:T]
    return shifted if steps is None else torch.where(carries(steps), shifted, 0)


def carries(steps: Tensor) -> Tensor:
    """Where the state before a step matters to it: it counts and is not reset. [..., B, 1]"""
    return (steps & (VALID | RESET) == VALID).unsqueeze(-1)


def masked(tensor: Tensor, steps: Tensor | None) -> Tensor:
    """Zero where a step does not count. tensor [T, B, any]"""
    return tensor if steps is None else torch.where((steps & VALID).bool().unsqueeze(-1), tensor, 0)
