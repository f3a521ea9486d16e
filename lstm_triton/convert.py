"""Between torch.nn and ours: replace() makes a model's layers ours, to_torch() copies a model with torch.nn's again.

weights() and to() are of single layers: between the arrays of other libraries and the tensors of our functions.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from .cell_modules import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN, spec_of
from .weights import to, weights

__all__ = ["replace", "to", "to_torch", "weights"]

Model = TypeVar("Model", bound=nn.Module)

# "how" and not "what": the same results with any of them
_EXECUTION = ("engine", "memory")


class _Pair(NamedTuple):
    """torch.nn's class and ours, and what both are told of the layer and keep in attributes of the same names.

    Dropout is not among it: both read it at every call, and the constructors only check it.
    """

    torch: type[nn.Module]
    ours: type[nn.Module]
    arguments: tuple[str, ...]


_LAYER = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "bidirectional")
_CELL = ("input_size", "hidden_size", "bias")
_LAYERS = (
    _Pair(nn.LSTM, LSTM, (*_LAYER, "proj_size")),
    _Pair(nn.GRU, GRU, _LAYER),
    _Pair(nn.RNN, RNN, (*_LAYER, "nonlinearity")),
)
_CELLS = (
    _Pair(nn.LSTMCell, LSTMCell, _CELL),
    _Pair(nn.GRUCell, GRUCell, _CELL),
    _Pair(nn.RNNCell, RNNCell, (*_CELL, "nonlinearity")),
)


def replace(model: Model, *, engine: str = "auto", memory: str = "store") -> Model:
    """Make every torch.nn.LSTM, GRU and RNN in `model` one of ours, in place, and return `model`.

    Each layer stays the object that it was and changes its class; `model` may itself be such a layer. So everything
    that refers to a layer goes on doing so, and everything that it holds stays: parameters and buffers (not copied:
    optimizers, tied weights and views see the same tensors), hooks, the training flag, its own attributes, pruning,
    weight_norm, and parametrizations, whose generated class is generated again on ours. State dicts keep their keys.

    Left alone: layers that are ours already; torch.nn's cells; ScriptModules and quantized layers; modules that `model`
    holds without registering them; and, with a warning that names them, what may compute something else: subclasses of
    torch.nn's layers, and layers with a `forward` of their own in the object. Replace before fully_shard, which makes
    subclasses too, and before anything that keeps a layer's `forward` as a bound method to call it later: that method
    is torch.nn's and does not know ours.

    engine, memory: as the layers take them. Raises TypeError if model is no module, ValueError for a wrong option; no
    layer has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = []
    for path, module in model.named_modules():
        kind = type_before_parametrizations(module)
        for pair in _LAYERS:
            if not issubclass(kind, pair.torch):
                continue
            if changed := _changed(module, kind, pair.torch, "torch.nn"):
                warnings.warn(f"{path or 'the model itself'} was left as it is: {changed}", stacklevel=2)
                continue
            arguments = _arguments(module, pair)
            ours = pair.ours(**arguments, device="meta", engine=engine, memory=memory)
            found.append((module, pair.torch(**arguments, device="meta"), ours))
    for module, old, new in found:
        _change_class(module, old, new)
    return model


def to_torch(module: Model) -> Model:
    """A copy of `module` in which each of our layers and cells is torch.nn's; `module` stays as it is.

    Shared with `module`: every tensor that its modules hold (parameters with their gradients, buffers, others in
    attributes and in lists, tuples, sets and dicts of them), and modules that it holds without registering them. So
    training either trains both, and `.to()` on either moves the parameters of both; copy.deepcopy of the result has
    its own. Copied as copy.deepcopy does: the modules themselves, their other attributes and their hooks. (Functions
    are not copied: one that closes over a module refers to the module that it always did.) ScriptModules are shared.

    engine and memory do not change results and are dropped. On a CUDA device, flatten_parameters() on the new layers
    gives cuDNN the one buffer that it likes best; it is not called here, since it moves the parameters' storage, which
    views and captured graphs of `module` may point to. A model that calls our layers with lengths, mask, reset or
    return_cells still does so, and torch.nn raises TypeError.

    Raises TypeError if module is no module, ValueError naming the layer and the option that torch.nn lacks, and
    ValueError for a subclass of our layers and for a layer with a `forward` of its own in the object.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    found = []
    for path, layer in module.named_modules():
        kind = type_before_parametrizations(layer)
        name = path or "the module itself"
        for pair in _LAYERS + _CELLS:
            if not issubclass(kind, pair.ours):
                continue
            if changed := _changed(layer, kind, pair.ours, "lstm_triton"):
                raise ValueError(f"{name} cannot be made torch.nn's: {changed}")
            arguments = _arguments(layer, pair)
            plain = pair.ours(**arguments, device="meta")
            _refuse_options(name, layer, plain)
            found.append((layer, plain, pair.torch(**arguments, device="meta")))
    memo = _shared(module)
    twin = copy.deepcopy(module, memo)
    for layer, old, new in found:
        _change_class(memo[id(layer)], old, new)
    return twin


def _changed(layer: nn.Module, kind: type[nn.Module], plain: type[nn.Module], package: str) -> str:
    """Why a layer of this kind may compute something else than one of the plain class; empty if it does not."""
    if kind is not plain:
        why = f"its class {kind.__qualname__} is a subclass of {package}.{plain.__name__}, and may have changed"
    elif "forward" in vars(layer):
        why = "a forward of its own was set in the object, and may have changed"
    else:
        return ""
    return f"{why} what the layer computes"


def _arguments(layer: nn.Module, pair: _Pair) -> dict[str, object]:
    """What builds a layer like this one, torch.nn's or ours."""
    arguments = {name: getattr(layer, name) for name in pair.arguments}
    if arguments.get("nonlinearity", "tanh") not in ("tanh", "relu"):
        del arguments["nonlinearity"]  # one of our activations, for _refuse_options to name
    return arguments


def _change_class(layer: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Give `layer` the class of `new`; `old` and `new` are built with its arguments, in its class and in that one.

    What old has and new lacks is one class's bookkeeping and goes; what new has and old lacks is the other's.
    """
    for name in vars(old).keys() - vars(new).keys():
        vars(layer).pop(name, None)  # absent in layers unpickled from a torch that did not have it yet
    vars(layer).update({name: vars(new)[name] for name in vars(new).keys() - vars(old).keys()})
    kind = type(layer)
    if is_parametrized(layer):
        # a class made for this layer, with a property for each parametrized tensor
        own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        layer.__class__ = type(kind.__name__, (type(new),), own)
    else:
        layer.__class__ = type(new)
    if isinstance(new, nn.RNNBase):
        # torch.nn's list of the weights; what a parametrization makes it looks up at each call, and here nothing runs
        layer._flat_weights = [
            stale if is_parametrized(layer, name) else getattr(layer, name, None)
            for name, stale in zip(layer._flat_weights_names, new._flat_weights, strict=True)
        ]
        layer.__setstate__(vars(layer))  # as torch.nn does after unpickling: makes its weak references to these


def _refuse_options(name: str, layer: nn.Module, plain: nn.Module) -> None:
    """ValueError where `layer` computes something else than `plain`, the same layer without options."""
    parameters = inspect.signature(type(plain)).parameters.values()
    options = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _EXECUTION]
    lacking = [
        f"{option}={getattr(layer, option)!r}" for option in options if _meant(layer, option) != _meant(plain, option)
    ]
    if lacking:
        raise ValueError(
            f"{name} cannot be made torch.nn's: torch.nn.{type(plain).__name__} has no {', '.join(lacking)}"
        )


def _meant(layer: nn.Module, option: str) -> object:
    """An option's value, in one of the ways to write it."""
    spec = spec_of(layer)
    return getattr(spec, option) if hasattr(spec, option) else getattr(layer, option)


def _shared(module: nn.Module) -> dict[int, object]:
    """A memo with which copy.deepcopy copies `module`'s registered modules but keeps tensors and other modules."""
    copied = {id(m) for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)}
    memo: dict[int, object] = {}
    containers: dict[int, object] = {}
    left: list[object] = [vars(m) for m in module.modules()]
    while left:
        value = left.pop()
        if isinstance(value, Tensor) or (isinstance(value, nn.Module) and id(value) not in copied):
            memo[id(value)] = value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in containers:
            containers[id(value)] = value  # each once: a container may hold itself
            left.extend(value.values() if isinstance(value, dict) else value)
    return memo
