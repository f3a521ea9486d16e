"""LSTM, GRU and RNN in hand-written Triton kernels: a drop-in for torch.nn.

lstm_triton.LSTM, GRU, RNN are modules; lstm_triton.functional has one layer and direction as functions;
lstm_triton.reference the same in eager PyTorch; lstm_triton.plan says what would run on which GPU, and why.
"""

from . import functional, reference
from .functional import plan
from .modules import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "functional", "plan", "reference"]
__version__ = "0.1.0"
