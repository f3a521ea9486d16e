"""The oracle: every cell in eager PyTorch, written from the equations, any float dtype, differentiable to any order.

It knows nothing of the kernels. The signatures are those of lstm_triton.functional; `engine`, `tile` and `memory` say
how to compute and not what, so they are taken and not used. The equations are in `_lstm_step`, `_gru_step` and
`_rnn_step`, those of a registered cell in its own function; what goes on around a step, the states that it holds,
zeroes or keeps, in `_scan`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import elu, linear, softplus

from .philox import kept
from .spec import EPSILON, KINDS, Activation, CellSpec, activation_of

#: What `memory` may be: keep for the backward pass what it reads, or compute it again there.
MEMORY = ("store", "recompute")

#: Weight and bias of one layer normalisation.
Norm = tuple[Tensor, Tensor]

#: The states, h and for the LSTM c, each [B, P or H].
State = tuple[Tensor, ...]

#: x's part of the pre-activations of one step [B, G*H], and the state before it -> the state after it.
Step = Callable[[Tensor, State], State]

#: h, and which gates (first, past the last) -> their recurrent part of the pre-activations.
Recurrent = Callable[..., Tensor]


def lstm(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    peephole: Tensor | None = None, coupled: bool = False, w_hr: Tensor | None = None,
    activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    output_activation: Activation | None = None, cell_clip: float | None = None, gate_clip: float | None = None,
    input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None,
    norm_ih: Norm | None = None, norm_hh: Norm | None = None, norm_c: Norm | None = None,
    zoneout: float | tuple[float, float] = 0, seed: Tensor | None = None, lengths: Tensor | None = None,
    mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False, return_cells: bool = False,
    memory: str = "store", engine: str = "reference", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """c[t] = f c[t-1] + i g, h[t] = o tanh(c[t]); i, f, g, o from W_ih x[t] + b_ih + W_hh h[t-1] + b_hh.

    x [T, B, I], h0 and c0 [B, H], w_ih [4H, I], w_hh [4H, H], biases [4H] -> y [T, B, H], h_n [B, H], c_n [B, H], and
    with return_cells all c[t], [T, B, H]. With w_hr [P, H], h[t] = W_hr (o tanh(c[t])): h0, y, h_n have P columns, and
    so has w_hh. lengths [B], mask and reset [T, B]: see `step_masks`.

    peephole [3, H], of i, f and o: i and f read c[t-1] too, o reads c[t]. coupled: f = 1 - i, three gates i, g, o, and
    peephole is [2, H]. gate_clip bounds the pre-activations, cell_clip c[t]. input_mask [B, I] or [4, B, I] and
    recurrent_mask [B, P] or [4, B, P], for all gates or for each, multiply x[t] and h[t-1]. norm_ih, norm_hh [4H] and
    norm_c [H], each a weight and a bias: W_ih x[t] and W_hh h[t-1] are normalised, and so is c[t], which the next step
    reads and c_n and the cells show as normalised; cell_clip and o's peephole come before that. zoneout, of h and c:
    see `_zoneout`.

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000. w_hr: Sak et
    al., "Long short-term memory based recurrent neural network architectures", 2014. peephole: Gers and Schmidhuber,
    "Recurrent nets that time and count", 2000. coupled: Greff et al., "LSTM: a search space odyssey", 2017. Masks: Gal
    and Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", 2016. Norms: Ba et
    al., "Layer normalization", 2016, the carried cell normalised as in PyTorch's custom-LSTM benchmark.
    """
    spec = CellSpec(
        "lstm", activation, b_ih is not None or b_hh is not None, 0 if w_hr is None else w_hr.shape[0],
        recurrent_activation, output_activation, peephole is not None, coupled, cell_clip=cell_clip,
        gate_clip=gate_clip, layer_norm=_normalised(norm_ih=norm_ih, norm_hh=norm_hh, norm_c=norm_c), zoneout=zoneout,
    )  # fmt: skip
    outputs = _run(
        spec, memory, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, peephole, norm_ih, norm_hh, norm_c, input_mask,
        recurrent_mask, lengths, mask, reset, seed, reverse, return_cells,
    )  # fmt: skip
    return outputs if return_cells else outputs[:3]


def gru(
    x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    reset_after: bool = True, activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    gate_clip: float | None = None, input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None,
    norm_ih: Norm | None = None, norm_hh: Norm | None = None, zoneout: float = 0, seed: Tensor | None = None,
    lengths: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False,
    memory: str = "store", engine: str = "reference", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """n = tanh(x_n + r (W_hn h[t-1] + b_hn)), h[t] = (1 - z) n + z h[t-1]; gates r, z, n. Shapes: lstm's, 3H for 4H.

    With reset_after=False, n = tanh(x_n + W_hn (r h[t-1]) + b_hn). Options as `lstm`.

    Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014.
    """
    spec = CellSpec(
        "gru", activation, b_ih is not None or b_hh is not None, recurrent_activation=recurrent_activation,
        reset_after=reset_after, gate_clip=gate_clip, layer_norm=_normalised(norm_ih=norm_ih, norm_hh=norm_hh),
        zoneout=zoneout,
    )  # fmt: skip
    return _run(
        spec, memory, x, h0, None, w_ih, w_hh, b_ih, b_hh, None, None, norm_ih, norm_hh, None, input_mask,
        recurrent_mask, lengths, mask, reset, seed, reverse, False,
    )[:2]  # fmt: skip


def rnn(
    x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    activation: Activation = "tanh", gate_clip: float | None = None, input_mask: Tensor | None = None,
    recurrent_mask: Tensor | None = None, norm_ih: Norm | None = None, norm_hh: Norm | None = None,
    zoneout: float = 0, seed: Tensor | None = None, lengths: Tensor | None = None, mask: Tensor | None = None,
    reset: Tensor | None = None, reverse: bool = False,
    memory: str = "store", engine: str = "reference", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h[t] = activation(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh). Shapes: lstm's, H for 4H. Options as `lstm`.

    Elman, "Finding structure in time", 1990.
    """
    spec = CellSpec(
        "rnn", activation, b_ih is not None or b_hh is not None, gate_clip=gate_clip,
        layer_norm=_normalised(norm_ih=norm_ih, norm_hh=norm_hh), zoneout=zoneout,
    )  # fmt: skip
    return _run(
        spec, memory, x, h0, None, w_ih, w_hh, b_ih, b_hh, None, None, norm_ih, norm_hh, None, input_mask,
        recurrent_mask, lengths, mask, reset, seed, reverse, False,
    )[:2]  # fmt: skip


def function_of(cell: str) -> Callable[..., tuple[Tensor, ...]]:
    """The function of a registered cell, with the arguments of lt.functional's."""

    def run(
        x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None,
        b_hh: Tensor | None, *, params: Tensor | None = None, input_mask: Tensor | None = None,
        recurrent_mask: Tensor | None = None, norm_ih: Norm | None = None, norm_hh: Norm | None = None,
        zoneout: float | tuple[float, float] = 0, seed: Tensor | None = None, lengths: Tensor | None = None,
        mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False, return_cells: bool = False,
        memory: str = "store", engine: str = "reference", tile: tuple[int, int] | None = None, **options: Any,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        check_options(cell, options)
        rows = (len(KINDS[cell].vectors), w_hh.shape[1])
        if (params is None) if rows[0] else (params is not None):
            wanted = f"a Tensor {rows}" if rows[0] else "left out: the cell was registered without vectors"
            raise TypeError(f"params must be {wanted}, got {None if params is None else tuple(params.shape)}")
        normalised = _normalised(norm_ih=norm_ih, norm_hh=norm_hh)
        bias = b_ih is not None or b_hh is not None
        spec = CellSpec(cell, bias=bias, layer_norm=normalised, zoneout=zoneout, **options)
        return _run(
            spec, memory, x, h0, c0, w_ih, w_hh, b_ih, b_hh, None, params, norm_ih, norm_hh, None, input_mask,
            recurrent_mask, lengths, mask, reset, seed, reverse, return_cells,
        )  # fmt: skip

    def without_c(
        x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
        b_hh: Tensor | None = None, **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return run(x, h0, None, w_ih, w_hh, b_ih, b_hh, **options)[:2]

    def with_c(
        x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
        b_hh: Tensor | None = None, return_cells: bool = False, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        outputs = run(x, h0, c0, w_ih, w_hh, b_ih, b_hh, return_cells=return_cells, **options)
        return outputs if return_cells else outputs[:3]

    return named(cell, with_c if KINDS[cell].has_c else without_c)


def named(cell: str, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The function of a registered cell under its own name, and with a docstring."""
    kind = KINDS[cell]
    G, gates, state = len(kind.gates), ", ".join(kind.gates), ", c0 and c_n [B, H]" if kind.has_c else ""
    rows = f" params [{len(kind.vectors)}, H]: {', '.join(kind.vectors)}." if kind.vectors else ""
    takes = f" Options: {', '.join(kind.takes)}." if kind.takes else ""
    function.__name__ = function.__qualname__ = cell
    function.__doc__ = (
        f"The registered cell {cell}: one layer, one direction. x [T, B, I], h0 and h_n [B, H]{state}, w_ih [{G}H, I], "
        f"w_hh [{G}H, H], biases [{G}H], gates in the order {gates}; y [T, B, H].{rows}{takes} What else there is: "
        "lt.functional.lstm."
    )
    return function


def check_options(cell: str, options: dict[str, Any]) -> None:
    """TypeError for a keyword that the registered cell's functions do not have."""
    for name in options:
        if name not in KINDS[cell].takes:
            has = ", ".join(KINDS[cell].takes) or "none"
            raise TypeError(f"{cell}() got an unexpected keyword argument {name!r}: options of its own are {has}")


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation, a name or (name, alpha, beta), of x of any shape. See spec.ACTIVATIONS."""
    name, alpha, beta = activation_of(activation)
    match name:
        case "tanh":
            return x.tanh()
        case "sigmoid":
            return x.sigmoid()
        case "relu":
            return x.relu()
        case "hard_sigmoid":
            return (alpha * x + beta).clamp(0, 1)
        case "linear":
            return x
        case "affine":
            return alpha * x + beta
        case "elu":
            return elu(x, alpha)
        case "leaky_relu":
            return torch.where(x > 0, x, alpha * x)
        case "scaled_tanh":
            return alpha * (beta * x).tanh()
        case "softplus":
            return softplus(x, threshold=40)  # above it x, which float64 cannot tell apart
        case "softsign":
            return x / (1 + x.abs())
        case "thresholded_relu":
            return torch.where(x <= alpha, 0, x)  # this way round NaN stays NaN
    raise AssertionError(name)


def check_memory(memory: str) -> None:
    """ValueError unless `memory` is one that exists."""
    if memory not in MEMORY:
        raise ValueError(f"memory must be one of {', '.join(map(repr, MEMORY))}, got {memory!r}")


def step_masks(
    x: Tensor, lengths: Tensor | None, mask: Tensor | None, reset: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which steps of x [T, B, I] count, and before which the state is zeroed: bool [T, B], None for all and for none.

    A step counts if it lies within its row's `lengths` [B] (negative: 0; beyond T: T) and `mask` [T, B] is true there.
    One that does not count holds the state, and its output is zero. `reset` [T, B] zeroes the state before the step in
    the order of processing, also at steps that `mask` skips, but not past `lengths`, where the row has no steps at all.
    """
    if lengths is None:
        return mask, reset
    within = torch.arange(x.shape[0], device=x.device)[:, None] < lengths.long()
    return within if mask is None else within & mask, None if reset is None else within & reset


def sequence(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor | None, w_hh: Tensor, b_ih: Tensor | None,
    b_hh: Tensor | None, w_hr: Tensor | None, params: Tensor | None, recurrent_mask: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, reset: Tensor | None, seed: Tensor | None,
    *, spec: CellSpec, reverse: bool, return_cells: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The cell that `spec` names, with every tensor that some cell takes -> y, h_n, c_n or None, cells or None.

    Without w_ih, x is its finished part of the pre-activations, [T, B, G*H]. params [K, H]: see CellSpec.rows; the bias
    of the recurrent product's normalisation is in b_hh.
    """
    if w_ih is not None:
        x = _input_part(x, w_ih, b_ih, None, None, lengths, mask)
    H = w_hh.shape[0] // spec.gates
    rows = {} if params is None else dict(zip(spec.rows, params.unbind(0), strict=True))

    def recurrent(h: Tensor, first: int = 0, last: int = spec.gates) -> Tensor:
        gates = slice(first * H, last * H)
        bias = None if b_hh is None else b_hh[gates]
        factors = recurrent_mask if recurrent_mask is None or recurrent_mask.dim() == 2 else recurrent_mask[first:last]
        if not spec.layer_norm:
            return _product(h, w_hh[gates], bias, factors)
        weight = torch.cat([rows[f"norm_hh.{gate}"] for gate in spec.gate_names])
        return _normalise(_product(h, w_hh[gates], None, factors), weight, bias)

    step = STEPS[spec.cell](spec, recurrent, rows, w_hr)
    columns = (w_hh.shape[1], H)
    state = tuple(
        x.new_zeros(x.shape[1], n) if s is None else s
        for s, n in zip((h0, c0)[: len(spec.states)], columns, strict=False)
    )
    keep = _zoneout(spec.zoneout, seed, x.shape[0], state)
    outputs, state = _scan(step, keep, x, state, *step_masks(x, lengths, mask, reset), reverse)
    if not spec.has_c:
        return outputs[0], state[0], None, None
    return outputs[0], *state, outputs[1] if return_cells else None


def _lstm_step(spec: CellSpec, recurrent: Recurrent, rows: dict[str, Tensor], w_hr: Tensor | None) -> Step:
    def gate(a: Tensor) -> Tensor:
        return activate(_clip(a, spec.gate_clip), spec.recurrent_activation)

    def step(x_t: Tensor, state: State) -> State:
        h, c = state
        a = dict(zip(spec.gate_names, (x_t + recurrent(h)).chunk(spec.gates, dim=-1), strict=True))
        for name in spec.peepholes[:-1]:
            a[name] = a[name] + rows[f"peephole.{name}"] * c
        i = gate(a["i"])
        f = 1 - i if spec.coupled else gate(a["f"])
        g = activate(_clip(a["g"], spec.gate_clip), spec.activation)
        made = _clip(f * c + i * g, spec.cell_clip)
        o = gate(a["o"] + rows["peephole.o"] * made if spec.peephole else a["o"])
        c = _normalise(made, rows["norm_c.weight"], rows["norm_c.bias"]) if spec.layer_norm else made
        h = o * activate(c, spec.output_phi)
        return h if w_hr is None else linear(h, w_hr), c

    return step


def _gru_step(spec: CellSpec, recurrent: Recurrent, rows: dict[str, Tensor], w_hr: None) -> Step:
    def step(x_t: Tensor, state: State) -> State:
        (h,) = state
        x_rz, x_n = x_t.tensor_split([2 * x_t.shape[-1] // 3], dim=-1)
        if spec.reset_after:
            h_rz, h_n = recurrent(h).tensor_split([x_rz.shape[-1]], dim=-1)
        else:
            h_rz = recurrent(h, 0, 2)
        r, z = activate(_clip(x_rz + h_rz, spec.gate_clip), spec.recurrent_activation).chunk(2, dim=-1)
        a_n = x_n + (r * h_n if spec.reset_after else recurrent(r * h, 2, 3))
        n = activate(_clip(a_n, spec.gate_clip), spec.activation)
        return ((1 - z) * n + z * h,)

    return step


def _rnn_step(spec: CellSpec, recurrent: Recurrent, rows: dict[str, Tensor], w_hr: None) -> Step:
    def step(x_t: Tensor, state: State) -> State:
        return (activate(_clip(x_t + recurrent(state[0]), spec.gate_clip), spec.activation),)

    return step


def step_of(function: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> Callable[..., Step]:
    """The step of a registered cell: function(x, h, state, ...) -> h[t], or h[t] and c[t]. See registry.py."""

    def make(spec: CellSpec, recurrent: Recurrent, rows: dict[str, Tensor], w_hr: None) -> Step:
        told = {name: getattr(spec, name) for name in spec.kind.takes}
        if spec.vectors:
            told["params"] = tuple(rows[name] for name in spec.vectors)

        def step(x_t: Tensor, state: State) -> State:
            x, h = (product.chunk(spec.gates, dim=-1) for product in (x_t, recurrent(state[0])))
            made = function(x, h, state[-1], **told)
            return made if spec.has_c else (made,)

        return step

    return make


#: How a step of each cell is made, with those that registry.py adds.
STEPS = {"lstm": _lstm_step, "gru": _gru_step, "rnn": _rnn_step}


def _zoneout(
    probabilities: tuple[float, float], seed: Tensor | None, steps: int, state: State
) -> Callable[[int, State, State], State]:
    """(t, state before step t, state that the step made) -> the state after it.

    With a seed each element of a state stays what it was with the probability, see `kept`; without one it is what it
    would then be on average.

    Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", 2017.
    """
    draws: list[Tensor | None] = [None] * len(state)
    if seed is not None:
        t = torch.arange(steps, device=seed.device)[:, None, None]
        draws = [
            kept(seed, t, *s.shape, p, word) if p else None
            for word, (s, p) in enumerate(zip(state, probabilities, strict=False))
        ]

    def after(t: int, olds: State, news: State) -> State:
        mixed = []
        for old, new, p, drawn in zip(olds, news, probabilities, draws, strict=False):
            if p == 0:
                mixed.append(new)
            else:
                mixed.append(p * old + (1 - p) * new if drawn is None else torch.where(drawn[t], old, new))
        return tuple(mixed)

    return after


def _clip(value: Tensor, bound: float | None) -> Tensor:
    return value if bound is None else value.clamp(-bound, bound)


def _normalise(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Over all columns of each row of [..., N], weight and bias [N]."""
    variance, mean = torch.var_mean(value, dim=-1, correction=0, keepdim=True)
    return (value - mean) * (variance + EPSILON).rsqrt() * weight + bias


def _product(value: Tensor, w: Tensor, bias: Tensor | None, factors: Tensor | None) -> Tensor:
    """W (factors value) + bias: value [..., B, N], w [G*H, N], factors [B, N], or [G, B, N] with its own for a gate."""
    if factors is None or factors.dim() == 2:
        return linear(value if factors is None else value * factors, w, bias)
    gates = zip(factors, w.chunk(len(factors)), strict=True)
    product = torch.cat([linear(value * own, w_gate) for own, w_gate in gates], dim=-1)
    return product if bias is None else product + bias


def _input_part(
    x: Tensor, w_ih: Tensor, b_ih: Tensor | None, input_mask: Tensor | None, norm_ih: Norm | None,
    lengths: Tensor | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """What x [T, B, I] gives to the pre-activations of all steps, [T, B, G*H], zeros taken where none counts."""
    counts, _ = step_masks(x, lengths, mask, None)
    if counts is not None:
        x = x.masked_fill(~counts[..., None], 0)
    if norm_ih is None:
        return _product(x, w_ih, b_ih, input_mask)
    normalised = _normalise(_product(x, w_ih, None, input_mask), *norm_ih)
    return normalised if b_ih is None else normalised + b_ih


def _normalised(**norms: Norm | None) -> bool:
    """Whether they are given. ValueError for some without the others."""
    missing = [name for name, norm in norms.items() if norm is None]
    if 0 < len(missing) < len(norms):
        raise ValueError(f"{', '.join(norms)} go together, each a pair (weight, bias): got no {', '.join(missing)}")
    return not missing


def _run(
    spec: CellSpec, memory: str, x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None, b_hh: Tensor | None, w_hr: Tensor | None, vectors: Tensor | None, norm_ih: Norm | None,
    norm_hh: Norm | None, norm_c: Norm | None, input_mask: Tensor | None, recurrent_mask: Tensor | None,
    lengths: Tensor | None, mask: Tensor | None, reset: Tensor | None, seed: Tensor | None, reverse: bool,
    return_cells: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`sequence`, from the tensors as the public functions take them."""
    check_memory(memory)
    x = _input_part(x, w_ih, b_ih, input_mask, norm_ih, lengths, mask)
    H = w_hh.shape[0] // spec.gates
    rows = [] if vectors is None else [vectors]
    if norm_hh is not None:
        weight, bias = norm_hh
        rows.append(weight.reshape(-1, H))
        b_hh = bias if b_hh is None else b_hh + bias
    rows += [] if norm_c is None else [row[None] for row in norm_c]
    return sequence(
        x, h0, c0, None, w_hh, None, b_hh, w_hr, torch.cat(rows) if rows else None, recurrent_mask,
        lengths, mask, reset, seed, spec=spec, reverse=reverse, return_cells=return_cells,
    )  # fmt: skip


def _scan(
    step: Step, keep: Callable[[int, State, State], State], x: Tensor, state: State, counts: Tensor | None,
    zeroed: Tensor | None, reverse: bool,
) -> tuple[list[Tensor], State]:  # fmt: skip
    """Run `step` and `keep` over the input's part x [T, B, G*H], last step first if reverse. Masks: see `step_masks`.

    Returns what each state [B, ...] was after each step [T, B, ...], zero where the step does not count, and the last.
    """
    T = x.shape[0]
    skipped = None if counts is None else ~counts[..., None]
    zeroed = None if zeroed is None else zeroed[..., None]
    if skipped is not None:
        x = x.masked_fill(skipped, 0)
    inputs = [[None] * T if m is None else m.unbind(0) for m in (x, skipped, zeroed)]
    steps = list(zip(range(T), *inputs, strict=True))
    outputs = []
    for t, x_t, skipped_t, zeroed_t in reversed(steps) if reverse else steps:
        if zeroed_t is not None:
            state = tuple(s.masked_fill(zeroed_t, 0) for s in state)
        if skipped_t is None:
            state = keep(t, state, step(x_t, state))
            outputs.append(state)
        else:
            # A step that does not count runs on zeros, so that its gradients are zeros too, whatever state it holds.
            zeros = tuple(s.masked_fill(skipped_t, 0) for s in state)
            stepped = keep(t, zeros, step(x_t, zeros))
            state = tuple(torch.where(skipped_t, s, new) for s, new in zip(state, stepped, strict=True))
            outputs.append(tuple(new.masked_fill(skipped_t, 0) for new in stepped))
    if not outputs:
        return [s.new_empty(0, *s.shape) for s in state], state
    return [torch.stack(s) for s in zip(*(outputs[::-1] if reverse else outputs), strict=True)], state
