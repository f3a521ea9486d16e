"""What replace() leaves alone, with a warning, and what to_torch() refuses by name, before anything is changed:
subclasses, a forward of an object's own, options that torch.nn lacks.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from convert_cases import LAYERS, B, H, I, T, assert_same, in_float64, kinds, results
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lstm_triton as lt

pytestmark = pytest.mark.both
float64 = pytest.fixture(autouse=True)(in_float64)


def test_conversion_draws_no_random_numbers_and_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.ModuleList([nn.LSTM(I, H, dropout=0.5), nn.RNN(I, H)])
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lt.to_torch(lt.replace(net))
    assert torch.equal(torch.get_rng_state(), state)


class Own(nn.LSTM):
    def forward(self, x: Tensor, hx: Any = None) -> Any:
        return super().forward(x * 2, hx)


def test_subclasses_stay_with_a_warning() -> None:
    net = nn.ModuleDict({"a": nn.ModuleList([nn.LSTM(I, H), Own(I, H)]), "b": Own(I, H)})
    parametrizations.weight_norm(net["b"], "weight_hh_l0")
    x = torch.randn(T, B, I)
    wanted = [results(layer, x) for layer in (net["a"][1], net["b"])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lt.replace(net)
    assert [str(warning.message).split(":")[0] for warning in caught] == [
        "a.1 was left as it is", "b was left as it is",
    ]  # fmt: skip
    assert all("Own is a subclass of torch.nn.LSTM" in str(warning.message) for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    assert type(net["a"][0]) is lt.LSTM
    assert type(net["a"][1]) is Own
    assert isinstance(net["b"], Own)
    for layer, value in zip((net["a"][1], net["b"]), wanted, strict=True):
        assert_same(results(layer, x), value)
    with pytest.warns(UserWarning, match="^the model itself was left"):
        lt.replace(Own(I, H))


def test_a_forward_in_the_object_stays_with_a_warning() -> None:
    net = nn.Sequential(nn.GRU(I, H), nn.GRU(I, H))
    inner = net[0].forward
    net[0].forward = lambda x: inner(2 * x)
    x = torch.randn(T, B, I)
    wanted = net[0](x)[0]
    with pytest.warns(UserWarning, match="^0 was left as it is: a forward of its own"):
        lt.replace(net)
    assert kinds(net)[1:] == [nn.GRU, lt.GRU]
    assert torch.equal(net[0](x)[0], wanted)
    net[1].forward = net[1].forward
    with pytest.raises(ValueError, match=r"^1 cannot be made torch.nn's: a forward of its own"):
        lt.to_torch(net)


def test_subclasses_of_ours_cannot_become_torchs() -> None:
    class Ours(lt.GRU):
        pass

    with pytest.raises(ValueError, match=r"^1 cannot be made torch.nn's.*Ours is a subclass of lstm_triton.GRU"):
        lt.to_torch(nn.Sequential(nn.Identity(), Ours(I, H)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_left_alone() -> None:
    scripted = torch.jit.script(nn.GRU(I, H))
    quantized = torch.ao.nn.quantized.dynamic.LSTM
    ours = lt.LSTM(I, H, engine="reference")
    net = nn.ModuleList([scripted, nn.GRUCell(I, H), ours])
    state = dict(vars(ours))
    before = kinds(net)
    assert lt.replace(lt.replace(net, engine="step")) is net
    assert kinds(net) == before
    assert vars(ours) == state
    assert not issubclass(quantized, (nn.LSTM, nn.GRU, nn.RNN))
    back = lt.to_torch(net)
    assert back[0] is scripted
    assert kinds(back)[-1] is nn.LSTM


def test_a_warning_taken_as_an_error_leaves_everything() -> None:
    net = nn.ModuleList([nn.LSTM(I, H), Own(I, H)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="1 was left as it is"):
            lt.replace(net)
    assert kinds(net) == [nn.ModuleList, nn.LSTM, Own]


def test_engine_and_memory_are_handed_on_and_dropped() -> None:
    net = nn.Sequential(nn.LSTM(I, H), nn.Identity())
    lt.replace(net, engine="reference", memory="recompute")
    assert (net[0].engine, net[0].memory) == ("reference", "recompute")
    x = torch.randn(T, B, I)
    assert_same(results(lt.to_torch(net), x), results(net, x))
    lt.replace(net, engine="step")
    assert net[0].engine == "reference"


def test_nothing_changes_where_something_is_wrong() -> None:
    net = nn.ModuleList([nn.LSTM(I, H), nn.GRU(I, H)])
    with pytest.raises(ValueError, match=r"engine must be one of .* got 'treadmill'"):
        lt.replace(net, engine="treadmill")
    with pytest.raises(ValueError, match=r"memory must be .* got 'hoard'"):
        lt.replace(net, memory="hoard")
    assert kinds(net) == [nn.ModuleList, nn.LSTM, nn.GRU]
    for convert, name in ((lt.replace, "model"), (lt.to_torch, "module")):
        with pytest.raises(TypeError, match=f"{name} must be a torch.nn.Module, got list"):
            convert([net])


COMMON = {
    "activation": "softsign",
    "recurrent_activation": "hard_sigmoid",
    "layer_norm": True,
    "zoneout": 0.1,
    "recurrent_dropout": 0.1,
    "input_dropout": 0.1,
    "dropout_per_gate": True,
    "gate_clip": 5.0,
}
OWN = {
    "LSTM": {"peephole": True, "coupled": True, "cell_clip": 3.0, "output_activation": "relu", "zoneout": (0.0, 0.1)},
    "GRU": {"reset_after": False, "activation": ("elu", 0.5)},
    "RNN": {"activation": ("elu", 0.5)},
}
OPTIONS = [(cell, name, value) for cell in LAYERS for name, value in (*COMMON.items(), *OWN[cell].items())]
OPTIONS.remove(("RNN", "recurrent_activation", "hard_sigmoid"))  # which it has no gates for


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_options_that_torch_lacks_are_refused_by_name(option: tuple[str, str, Any]) -> None:
    cell, name, value = option
    layer = LAYERS[cell][1](I, H, **{name: value})
    with pytest.raises(ValueError, match=rf"^0 cannot be made torch.nn's: torch.nn.{cell} has no {name}="):
        lt.to_torch(nn.Sequential(layer))


def test_all_options_that_torch_lacks_are_named() -> None:
    layer = lt.LSTM(I, H, coupled=True, zoneout=(0.0, 0.1), gate_clip=2)
    words = r"coupled=True, zoneout=\(0.0, 0.1\), gate_clip=2$"
    with pytest.raises(ValueError, match=rf"torch.nn.LSTM has no {words}"):
        lt.to_torch(layer)


def test_options_that_say_what_torch_does_are_none() -> None:
    """Other ways to write the defaults."""
    layer = lt.LSTM(
        I, H, activation=("tanh", 2.0), recurrent_activation=("sigmoid",), output_activation="tanh", zoneout=(0, 0)
    )
    x = torch.randn(T, B, I)
    assert_same(results(lt.to_torch(layer), x), results(layer, x))


def test_an_option_is_refused_before_anything_is_copied() -> None:
    layer = lt.GRU(I, H)
    layer.activation = "relu"
    with pytest.raises(ValueError, match=r"^the module itself cannot be made torch.nn's.* has no activation='relu'"):
        lt.to_torch(layer)
    assert type(layer) is lt.GRU
