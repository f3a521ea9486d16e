"""What the tests against other libraries' numbers share: the call with what convert.weights gave, and the comparison.

Every case goes through lt.functional, on the reference, and on what "auto" is: the interpreted kernels under
TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import Tensor

import lstm_triton as lt

engines = pytest.mark.parametrize("engine", ["reference", "auto"])
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def assert_close(ours: Any, theirs: np.ndarray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=tolerance, atol=tolerance)


def call(cell: str, x: Tensor, states: list[Tensor | None], weights: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """lt.functional's `cell` with what convert.weights gave."""
    matrices = [weights["weight_ih"], weights["weight_hh"], weights.get("bias_ih"), weights.get("bias_hh")]
    if "peephole" in weights:
        options["peephole"] = weights["peephole"]
    return list(getattr(lt.functional, cell)(x, *states, *matrices, **options))
