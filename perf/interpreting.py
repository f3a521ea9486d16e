"""Takes out of Triton's interpreter what it does again and again to no effect: half of a small launch's time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np


def take_shortcuts() -> None:
    """For the rest of this process, which interprets. The kernels compute what they did, to the bit.

    - Each call of a device function patches triton.language anew, by a walk over all of its members. Here each set of
      globals is patched once and stays so: in a process that interprets nothing else reads the language.
    - Each sum, difference and product of integers is made again in 64 bits for an assertion that is dropped unless
      `debug` is set, which the interpreter leaves off.
    - Each look at a dtype builds the table of all dtypes.
    """
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, {}

    def patch_once(fn: Callable[..., Any]) -> Any:
        scope = fn.__globals__
        if id(scope) not in patched:
            patch(fn)
            patched[id(scope)] = scope  # alive, so that no other takes its id
        return interpreter._LangPatchScope()  # with nothing to restore

    interpreter._patch_lang = patch_once

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    of_scalar, of_pointer = functools.cache(interpreter._get_np_dtype), np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda kind: of_pointer if kind.scalar.is_ptr() else of_scalar(kind.scalar)
