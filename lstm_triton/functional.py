"""lstm(), gru(), rnn(): one layer, one direction, as functions of tensors. And plan(): what they would run.

The functions of registered cells (registry.py) are attributes of this module too. calls.py says where they run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import ops, reference
from .calls import Norm, Settings, Tensors, as_run, autocast, autocasts, check, gates_of, on_kernels, run
from .devices import device_named
from .planner import make_plan
from .plans import LaunchPlan
from .spec import GATES, KINDS, Activation

# Defaults of numbers are ints or None: torch.compile(dynamic=True) takes a float for a variable, and starts again when
# it turns out to decide what is run.


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
    memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Long short-term memory: c[t] = f c[t-1] + i g, h[t] = o tanh(c[t]), gates W_ih x[t] + b_ih + W_hh h[t-1] + b_hh.

    Shapes: x [T, B, I]; h0, c0 [B, H] or None (zeros); w_ih [4H, I], w_hh [4H, H], b_ih, b_hh [4H] or None, gates in
    the order i, f, g, o. Returns y [T, B, H], h_n [B, H], c_n [B, H], in x's dtype: float16, bfloat16, float32 or
    float64; gates, states and sums are float32 (float64 for float64) inside. fp32 recurrent products use TF32 where
    torch.backends.cudnn allows it for RNNs; the products over all time steps follow torch.backends.cuda.matmul.

    Other cells, in any combination:
        w_hr: [P, H], 0 < P < H, projects: h[t] = w_hr (o tanh(c[t])). h0, h_n and y have P columns, and so has w_hh.
        peephole: [3, H], p_i, p_f, p_o: p c[t-1] is added to the gates i and f, p_o c[t] to o.
        coupled: f = 1 - i. w_ih, w_hh and the biases hold three gates, i, g, o; peephole [2, H] p_i, p_o.
        activation, recurrent_activation, output_activation: of g; of i, f, o; of c[t] (None: as activation). A name,
            (name, alpha) or (name, alpha, beta), as ONNX has them: "tanh", "sigmoid", "relu", "hard_sigmoid" (0.2,
            0.5: max(0, min(1, alpha x + beta))), "linear", "affine" (1, 0: alpha x + beta), "elu" (1), "leaky_relu"
            (0.01), "scaled_tanh" (1, 1: alpha tanh(beta x)), "softplus", "softsign", "thresholded_relu" (1).
        cell_clip: c[t] is held within +- this, before o's peephole reads it. gate_clip: so is every gate before its
            activation, peephole included. The gradient through either is 1 within and on the bound, 0 beyond.
        norm_ih, norm_hh, norm_c: layer normalisation, a pair (weight, bias) each, [G*H], [G*H] and [H], all or none: of
            W_ih x[t] and of W_hh h[t-1], over all gates and before the biases are added, and of what the step makes of
            c, which o's peephole reads before. c[t], as it is carried on and returned, is the normalised one.

    Regularisation, its random numbers drawn by the caller:
        input_mask, recurrent_mask: [B, I] and [B, H] (or P), or [G, B, ...] for each of the G gates its own, in x's
            dtype: x[t] and h[t-1] are multiplied by them at every step before the products.
        zoneout: probability, or a pair of them for h and c, with which a unit keeps its state instead of what the step
            made of it. seed: int64, one element, on x's device, decides by Philox 4x32-10 which; None takes the
            expectation, z times the old state and 1 - z times the new one, as evaluation does: in training as well.

    Steps that do not count hold the state and give zeros, and NaN in x there, or in their gradients, reaches nothing:
        lengths: [B], any integer dtype, on x's device. Row b ends after lengths[b] steps; the reverse direction begins
            there. Beyond T counts as T, below 0 as 0. On CUDA the values are not looked at, so that nothing waits.
        mask: bool [T, B]. Where false the step is skipped.
        reset: bool [T, B]. Where true the state is zeroed before the step, in the order of processing; also where mask
            is false, but not past a row's length.

    reverse runs from the last step to the first. return_cells adds c of every step, [T, B, H], to what is returned.
    memory="recompute" keeps less for the backward pass, which computes it again.
    engine is "auto", "local", "resident", "streamed", "step" or "reference"; tile=(block_b, block_h) overrides the
    plan's tile.
    Raises ValueError or TypeError naming the argument for wrong shapes, dtypes, devices, options, engines and tiles.

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000. w_hr: Sak et
    al., "Long short-term memory based recurrent neural network architectures", 2014. peephole: Gers and Schmidhuber,
    "Recurrent nets that time and count", 2000. coupled: Greff et al., "LSTM: a search space odyssey", 2017. norm_*: Ba
    et al., "Layer normalization", 2016. Masks: Gal and Ghahramani, "A theoretically grounded application of dropout in
    recurrent neural networks", 2016. zoneout: Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden
    activations", 2017.
    """
    tensors = Tensors(
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, peephole, norm_ih, norm_hh, norm_c,
        input_mask, recurrent_mask, lengths, mask, reset, seed,
    )  # fmt: skip
    options = {
        "activation": activation, "recurrent_activation": recurrent_activation, "output_activation": output_activation,
        "coupled": coupled, "cell_clip": cell_clip, "gate_clip": gate_clip, "zoneout": zoneout,
    }  # fmt: skip
    outputs = run("lstm", tensors, Settings(options, reverse, memory, engine, tile, return_cells))
    return outputs if return_cells else outputs[:3]


def gru(
    x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    reset_after: bool = True, activation: Activation = "tanh", recurrent_activation: Activation = "sigmoid",
    gate_clip: float | None = None, input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None,
    norm_ih: Norm | None = None, norm_hh: Norm | None = None, zoneout: float = 0, seed: Tensor | None = None,
    lengths: Tensor | None = None, mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False,
    memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gated recurrent unit, reset after the product: n = tanh(x_n + r (W_hn h[t-1] + b_hn)), h[t] = (1-z) n + z h[t-1].

    With reset_after=False before it: n = tanh(x_n + W_hn (r h[t-1]) + b_hn), which layer normalisation cannot go with.
    recurrent_mask is for the h[t-1] of the products alone, and for r h[t-1]; z h[t-1] takes the state as it is.

    Shapes, dtypes, options and errors as `lstm`, with 3H for 4H, gates in the order r, z, n, and no cell state.
    recurrent_activation is of r and z. Returns y [T, B, H], h_n [B, H].

    Cho et al., "Learning phrase representations using RNN encoder-decoder", 2014, which has the reset before the
    product; after it as in cuDNN and torch.nn. The options' papers: see `lstm`.
    """
    tensors = Tensors(
        x, h0, None, w_ih, w_hh, b_ih, b_hh, norm_ih=norm_ih, norm_hh=norm_hh, input_mask=input_mask,
        recurrent_mask=recurrent_mask, lengths=lengths, mask=mask, reset=reset, seed=seed,
    )  # fmt: skip
    options = {
        "activation": activation, "recurrent_activation": recurrent_activation, "reset_after": reset_after,
        "gate_clip": gate_clip, "zoneout": zoneout,
    }  # fmt: skip
    return run("gru", tensors, Settings(options, reverse, memory, engine, tile))[:2]


def rnn(
    x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
    b_ih: Tensor | None = None, b_hh: Tensor | None = None, *,
    activation: Activation = "tanh", gate_clip: float | None = None, input_mask: Tensor | None = None,
    recurrent_mask: Tensor | None = None, norm_ih: Norm | None = None, norm_hh: Norm | None = None,
    zoneout: float = 0, seed: Tensor | None = None, lengths: Tensor | None = None, mask: Tensor | None = None,
    reset: Tensor | None = None, reverse: bool = False,
    memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Elman network: h[t] = activation(W_ih x[t] + b_ih + W_hh h[t-1] + b_hh).

    Shapes, dtypes, options and errors as `lstm`, with H for 4H and no cell state. Returns y [T, B, H], h_n [B, H].

    Elman, "Finding structure in time", 1990. The options' papers: see `lstm`.
    """
    tensors = Tensors(
        x, h0, None, w_ih, w_hh, b_ih, b_hh, norm_ih=norm_ih, norm_hh=norm_hh, input_mask=input_mask,
        recurrent_mask=recurrent_mask, lengths=lengths, mask=mask, reset=reset, seed=seed,
    )  # fmt: skip
    options = {"activation": activation, "gate_clip": gate_clip, "zoneout": zoneout}
    return run("rnn", tensors, Settings(options, reverse, memory, engine, tile))[:2]


def function_of(cell: str) -> Callable[..., tuple[Tensor, ...]]:
    """The function of a registered cell, which `plan` then knows too."""

    def without_c(
        x: Tensor, h0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
        b_ih: Tensor | None = None, b_hh: Tensor | None = None, *, params: Tensor | None = None,
        input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None, norm_ih: Norm | None = None,
        norm_hh: Norm | None = None, zoneout: float = 0, seed: Tensor | None = None, lengths: Tensor | None = None,
        mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False,
        memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None, **options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tensors = Tensors(
            x, h0, None, w_ih, w_hh, b_ih, b_hh, norm_ih=norm_ih, norm_hh=norm_hh, input_mask=input_mask,
            recurrent_mask=recurrent_mask, lengths=lengths, mask=mask, reset=reset, seed=seed, params=params,
        )  # fmt: skip
        reference.check_options(cell, options)
        settings = Settings(options | {"zoneout": zoneout}, reverse, memory, engine, tile)
        return run(cell, tensors, settings)[:2]

    def with_c(
        x: Tensor, h0: Tensor | None, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor,
        b_ih: Tensor | None = None, b_hh: Tensor | None = None, *, params: Tensor | None = None,
        input_mask: Tensor | None = None, recurrent_mask: Tensor | None = None,
        zoneout: float | tuple[float, float] = 0, seed: Tensor | None = None, lengths: Tensor | None = None,
        mask: Tensor | None = None, reset: Tensor | None = None, reverse: bool = False, return_cells: bool = False,
        memory: str = "store", engine: str = "auto", tile: tuple[int, int] | None = None, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tensors = Tensors(
            x, h0, c0, w_ih, w_hh, b_ih, b_hh, input_mask=input_mask, recurrent_mask=recurrent_mask, lengths=lengths,
            mask=mask, reset=reset, seed=seed, params=params,
        )  # fmt: skip
        reference.check_options(cell, options)
        settings = Settings(options | {"zoneout": zoneout}, reverse, memory, engine, tile, return_cells)
        outputs = run(cell, tensors, settings)
        return outputs if return_cells else outputs[:3]

    _FUNCTIONS[cell] = reference.named(cell, with_c if KINDS[cell].has_c else without_c)
    return _FUNCTIONS[cell]


_FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {"lstm": lstm, "gru": gru, "rnn": rnn}


def plan(cell: str, *args: Any, target: str | None = None, **kwargs: Any) -> LaunchPlan:
    """The LaunchPlan that the cell's function would use for the same arguments; nothing runs, meta tensors do.

    target names a GPU that need not be there ("H200", "A100", "sm_90", ...); without it the plan is for the tensors'
    own device, and ValueError is raised where no kernel would run on it.
    """
    if not isinstance(cell, str) or cell not in _FUNCTIONS:
        raise ValueError(f"cell must be one of {', '.join(map(repr, _FUNCTIONS))}, got {cell!r}")
    bound = inspect.signature(_FUNCTIONS[cell]).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    tensors = Tensors(*(given.pop(name, None) for name in Tensors._fields))
    options = given.pop("options", {})
    called = {name: given.pop(name) for name in Settings._fields if name in given}
    settings = Settings(options=given | options, **called)
    if autocasts(tensors.x):
        tensors = autocast(tensors)
    if cell not in GATES:
        reference.check_options(cell, options)
    spec = as_run(check(cell, tensors, settings), tensors)
    x, engine, tile = tensors.x, settings.engine, settings.tile
    T, B, _ = x.shape
    H = tensors.w_ih.shape[0] // spec.gates
    masks = gates_of(tensors.recurrent_mask)
    if target is None:
        if engine == "reference" or not on_kernels(x):
            raise ValueError(f"no kernel runs with engine={engine!r} and x on {x.device}: name a target to plan for")
        return ops.plan_for(spec, x, H, engine, tile, masks=masks)
    return make_plan(
        spec, T, B, H, x.dtype, device_named(target),
        engine=engine, tile=tile, precision=ops.fp32_precision(), masks=masks,
    )  # fmt: skip
