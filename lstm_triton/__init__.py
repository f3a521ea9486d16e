"""LSTM, GRU and RNN in hand-written Triton kernels: a drop-in for torch.nn.

lstm_triton.LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell are modules; replace and to_torch exchange them with torch.nn's;
lstm_triton.functional has one layer and direction as functions, lstm_triton.reference the same in eager PyTorch;
lstm_triton.plan says what would run on which GPU, and why; lstm_triton.register_cell adds a cell of your own, and
check_cell tests it.
"""

from . import convert, functional, reference
from .cell_modules import GRUCell, LSTMCell, RNNCell
from .convert import replace, to_torch
from .functional import plan
from .modules import GRU, LSTM, RNN
from .registry import check_cell, register_cell

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "check_cell",
    "convert",
    "functional",
    "plan",
    "reference",
    "register_cell",
    "replace",
    "to_torch",
]
__version__ = "0.1.0"
