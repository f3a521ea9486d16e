"""The concurrent executor: hooks on the interpreter's builder, under Triton's own grid executor.

Triton's GridExecutor prepares a launch (arguments to the host, language patched) and calls the kernel for each program
in turn. Here those calls are collected, and the last one runs them all. While they run, the builder's memory operations
are places where the scheduler may switch, and are shown to the race check.
"""

from __future__ import annotations

import inspect
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton
from triton.runtime import interpreter

from .races import Extent, Lanes, OutOfBounds, Race, RaceCheck
from .scheduler import POLICIES, Livelock, Random, Scheduler

BUILDER = interpreter.interpreter_builder
SEM, SCOPE = interpreter._ir.MEM_SEMANTIC, interpreter._ir.MEM_SYNC_SCOPE
NOT_KERNELS = (os.path.dirname(triton.__file__) + os.sep, os.path.dirname(__file__) + os.sep)


class Run:
    """What happened inside a `with concurrent(...)` block, over all its launches."""

    def __init__(self, policy: Random, intra: bool, max_steps: int, max_idle: int):
        self.policy, self.intra, self.max_steps, self.max_idle = policy, intra, max_steps, max_idle
        self.schedule: list[int] = []  # the program, by its place in the grid, that did each memory operation
        self.switches = 0
        self.launches = 0
        self._found: dict[Any, Race] = {}
        self._names: list[Extent] = []

    @property
    def races(self) -> list[Race]:
        return list(self._found.values())

    def name(self, **tensors: Any) -> None:
        """Names for `describe`, instead of the kernels' parameters, for tensors that were alive during the launch."""
        self._names += [Extent.of(name, tensor) for name, tensor in tensors.items()]

    def describe(self) -> str:
        """The races, one a line."""
        return "\n".join(
            race.describe(next(filter(None, (extent.locate(race.address) for extent in self._names)), None))
            for race in self.races
        )


@contextmanager
def concurrent(
    seed: int = 0, policy: str = "random", *, intra: bool = True, max_steps: int = 1_000_000, max_idle: int = 10_000
) -> Iterator[Run]:
    """Run every interpreted launch in the block with all programs of its grid concurrently, and check it for races.

    seed: decides the schedule, all of it. policy: one of POLICIES. intra: also report what a program stores and then
    loads, or stores again, through other threads of its own without a barrier. max_steps: memory operations a launch
    may do; max_idle: polls in vain while all programs wait; past either, Livelock is raised.
    """
    run = Run(POLICIES[policy](random.Random(seed)), intra, max_steps, max_idle)
    plain = interpreter.GridExecutor

    class ConcurrentExecutor(plain):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            dims = 3 if callable(self.grid) else len(self.grid)
            self.fn = launch = Launch(run, self.fn, dims)
            try:
                return super().__call__(*args, **kwargs)
            except interpreter.InterpreterError as error:
                if isinstance(error.__cause__, (Livelock, OutOfBounds)):
                    raise error.__cause__ from None
                raise
            finally:
                launch.record()

        def _init_args_hst(self, args: Any, kwargs: Any) -> Any:
            on_host = super()._init_args_hst(args, kwargs)
            for name, value in (*zip(self.arg_names, on_host[0], strict=False), *on_host[1].items()):
                self.fn.add_argument(name, value)
            return on_host

    interpreter.GridExecutor = ConcurrentExecutor
    try:
        yield run
    finally:
        interpreter.GridExecutor = plain


class Launch:
    """Stands in for the kernel of one launch: collects the calls, runs them together, and is the builder's hooks."""

    def __init__(self, run: Run, fn: Callable[..., None], dims: int):
        self.settings, self.fn, self.dims = run, fn, dims
        self.__name__, self.__globals__, self.__signature__ = fn.__name__, fn.__globals__, inspect.signature(fn)
        self.tensors: dict[str, Any] = {}
        self.programs: list[tuple[int, int, int]] = []
        self.scheduler = Scheduler(run.policy, run.max_steps, run.max_idle)
        self.check: RaceCheck | None = None
        self.order: dict[int, tuple[Any, Any]] = {}  # program inside an atomic load, store or poll -> its sem and scope
        self.places: dict[int, str] = {}  # program -> where its last operation stands
        self.polls: dict[int, tuple[str, np.ndarray, bytes]] = {}  # program -> its last operation, if that only read

    def add_argument(self, name: str, value: Any) -> None:
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                self.add_argument(f"{name}.{i}", item)
        elif isinstance(value, interpreter.TensorDescriptor):
            self.add_argument(name, value.base)
        elif hasattr(value, "data_ptr"):
            self.tensors[name] = interpreter._unwrap_tensor(value)

    def __call__(self, **arguments: Any) -> None:
        self.programs.append(BUILDER.grid_idx)
        if len(self.programs) == np.prod(BUILDER.grid_dim):
            names = [program[: self.dims] for program in self.programs]
            self.check = RaceCheck(self.__name__, names, self.tensors, self.settings.intra)
            with self._hooked():
                self.scheduler.run([lambda p=p: self._program(p, arguments) for p in range(len(self.programs))])

    def _program(self, program: int, arguments: dict[str, Any]) -> None:
        BUILDER.grid_idx = self.programs[program]
        self.fn(**arguments)

    def record(self) -> None:
        run = self.settings
        run.launches += 1
        run.switches += self.scheduler.switches
        run.schedule += self.scheduler.schedule
        if self.check is not None:
            run._found = {**self.check.found, **run._found}

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        hooks = {
            "create_masked_load": self._load,
            "create_masked_store": self._store,
            "create_atomic_rmw": self._rmw,
            "create_atomic_cas": self._cas,
            "create_barrier": self._barrier,
            "create_atomic_load": self._atomic_load,
            "create_atomic_store": self._atomic_store,
            "create_atomic_poll": self._atomic_poll,
        }
        # Newer versions have the last three; plain loads and stores go through the masked ones.
        hooks = {name: hook for name, hook in hooks.items() if hasattr(BUILDER, name)}
        self.plain = {name: getattr(BUILDER, name) for name in hooks}
        for name, hook in hooks.items():
            setattr(BUILDER, name, hook)
        try:
            yield
        finally:
            for name in hooks:
                delattr(BUILDER, name)

    # The hooks. Each lets others go first, shows its access to the check, does it, and tells whether it only read.

    def _load(self, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        lanes = _lanes(ptrs, mask)
        if lanes.addresses.size:
            sem, scope = self.order.get(self.scheduler.current, (None, None))
            program = self._turn(lanes, "read" if sem is None else "atomic read")
            if _acquires(sem, scope):
                self.check.acquire(program, lanes)
        result = self.plain["create_masked_load"](ptrs, mask, *rest, **options)
        if lanes.addresses.size:
            self._only_read("load", lanes, result.data)
        return result

    def _store(self, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        lanes = _lanes(ptrs, mask)
        if lanes.addresses.size:
            sem, scope = self.order.get(self.scheduler.current, (None, None))
            program = self._turn(lanes, "write" if sem is None else "atomic")
            self.check.overwrite(lanes)
            if _releases(sem, scope):
                self.check.release(program, lanes)
            self._wrote(lanes)
        return self.plain["create_masked_store"](ptrs, value, mask, *rest, **options)

    def _rmw(self, op: Any, ptrs: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        lanes = _lanes(ptrs, mask)
        do = self.plain["create_atomic_rmw"]
        if not lanes.addresses.size:
            return do(op, ptrs, value, mask, sem, scope)
        program = self._turn(lanes, "atomic")
        if _acquires(sem, scope):
            self.check.acquire(program, lanes)
        if _releases(sem, scope):
            self.check.release(program, lanes)
        before = self._peek(ptrs, mask)
        result = do(op, ptrs, value, mask, sem, scope)
        self._changed("rmw", lanes, before, self._peek(ptrs, mask))
        return result

    def _cas(self, ptrs: Any, expected: Any, value: Any, sem: Any, scope: Any) -> Any:
        lanes = _lanes(ptrs, None)
        program = self._turn(lanes, "atomic")
        everywhere = interpreter.TensorHandle(np.ones_like(ptrs.data, dtype=bool), interpreter.tl.int1)
        before = self._peek(ptrs, everywhere)
        if _acquires(sem, scope):
            self.check.acquire(program, lanes)
        swaps = np.ravel(before == expected.data)
        if _releases(sem, scope) and swaps.any():
            self.check.release(
                program, Lanes(lanes.addresses[swaps], lanes.positions[swaps], lanes.shape, lanes.itemsize)
            )
        result = self.plain["create_atomic_cas"](ptrs, expected, value, sem, scope)
        self._changed("cas", lanes, before, self._peek(ptrs, everywhere))
        return result

    def _barrier(self) -> None:
        self.check.barrier(self.scheduler.current)

    def _atomic_load(self, ptrs: Any, mask: Any, sem: Any, scope: Any) -> Any:
        with self._ordered(sem, scope):
            return self.plain["create_atomic_load"](ptrs, mask, sem, scope)

    def _atomic_store(self, ptrs: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        with self._ordered(sem, scope):
            return self.plain["create_atomic_store"](ptrs, value, mask, sem, scope)

    def _atomic_poll(self, ptrs: Any, expected: Any, timeout: Any, sem: Any, scope: Any) -> Any:
        timeout = timeout if isinstance(timeout, interpreter.TensorHandle) else None
        with self._ordered(sem, scope):
            return self.plain["create_atomic_poll"](ptrs, expected, timeout, sem, scope)

    @contextmanager
    def _ordered(self, sem: Any, scope: Any) -> Iterator[None]:
        """The builder does these by its plain load and store, which then are not plain."""
        program = self.scheduler.current
        self.order[program] = sem, scope
        try:
            yield
        finally:
            del self.order[program]

    def _turn(self, lanes: Lanes, op: str) -> int:
        program = self.scheduler.current
        place = self.places[program] = _place()
        self.scheduler.switch()
        BUILDER.grid_idx = self.programs[program]
        try:
            self.check.access(program, op, lanes, place)
        except OutOfBounds as error:
            self.scheduler.fail(error)
        return program

    def _peek(self, ptrs: Any, mask: Any) -> np.ndarray:
        return self.plain["create_masked_load"](ptrs, mask, *[None] * _LOAD_OPTIONS).data

    def _changed(self, kind: str, lanes: Lanes, before: np.ndarray, after: np.ndarray) -> None:
        if before.tobytes() == after.tobytes():
            self._only_read(kind, lanes, after)
        else:
            self._wrote(lanes)

    def _only_read(self, kind: str, lanes: Lanes, values: np.ndarray) -> None:
        program, seen = self.scheduler.current, values.tobytes()
        last = self.polls.get(program)
        if last and last[0] == kind and last[2] == seen and np.array_equal(last[1], lanes.addresses):
            self.scheduler.park(lanes.start, lanes.end, self.places[program])
        else:
            self.scheduler.unpark(program)
        self.polls[program] = kind, lanes.addresses, seen

    def _wrote(self, lanes: Lanes) -> None:
        self.polls.pop(self.scheduler.current, None)
        self.scheduler.unpark(self.scheduler.current)
        self.scheduler.wrote(lanes.start, lanes.end)


#: The builder's masked load takes pointers, mask, other, and then cache options, one or two of them, and volatility.
_LOAD_OPTIONS = len(inspect.signature(BUILDER.create_masked_load).parameters) - 2


def _lanes(ptrs: Any, mask: Any) -> Lanes:
    addresses = np.ravel(ptrs.data).astype(np.int64)
    positions = np.arange(addresses.size)
    if mask is not None:
        # A block pointer's mask is a bare array, whose .data is a buffer.
        chosen = np.broadcast_to(np.asarray(mask.data).astype(bool), ptrs.data.shape).ravel()
        if not chosen.all():
            addresses, positions = addresses[chosen], positions[chosen]
    return Lanes(addresses, positions, ptrs.data.shape, max(1, ptrs.get_element_ty().primitive_bitwidth // 8))


def _acquires(sem: Any, scope: Any) -> bool:
    return sem in (SEM.ACQUIRE, SEM.ACQUIRE_RELEASE) and scope != SCOPE.CTA


def _releases(sem: Any, scope: Any) -> bool:
    return sem in (SEM.RELEASE, SEM.ACQUIRE_RELEASE) and scope != SCOPE.CTA


def _place() -> str:
    """Function and line of the kernel's text that the running operation stands in."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.startswith(NOT_KERNELS):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"
