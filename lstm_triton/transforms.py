"""What is about to happen to a call: transforms of torch.func, forward-mode derivatives."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """A transform of torch.func is about, of which bare operators do not know."""
    return torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Forward-mode derivatives are about: of torch.autograd.forward_ad, or of torch.func, which uses the same."""
    return torch.autograd.forward_ad._current_level >= 0


def refuse_forward_mode() -> None:
    """For operators, above which a program has no code of ours: PyTorch would take their tangents as zeros."""
    if forward_mode():
        raise NotImplementedError(
            "forward-mode derivatives (jvp, jacfwd, forward_ad) of a compiled, exported or traced program are not "
            "available: take them of the layer or function itself"
        )
