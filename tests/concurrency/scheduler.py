"""One thread a program, exactly one running at a time; a seeded policy picks the next at every memory operation.

A program that does the same read again (same addresses, same values, no memory operation in between) only spins. It is
parked until somebody writes there. That loses no interleaving, since another poll would see the same, and it keeps
waiting programs from starving those they wait for. When all are parked, they poll in turn, so that a bounded wait still
ends; past `max_idle` such polls the launch is a livelock.
"""

from __future__ import annotations

import contextvars
import random
import threading
from collections.abc import Callable


class Livelock(RuntimeError):
    """No program gets on: all of them wait for a write that none will do, or the launch passed its limit of steps."""


class Abandoned(BaseException):
    """Unwinds a program whose launch has failed. Not an Exception: the interpreter wraps those."""


class Random:
    """Uniform among the programs that can run."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def start(self, count: int) -> None:
        pass

    def choose(self, current: int, ready: list[int]) -> int:
        return ready[int(self.rng.random() * len(ready))]


class RoundRobin(Random):
    """Each in turn, for one to four operations: near lock step."""

    def start(self, count: int) -> None:
        self.left = 0

    def choose(self, current: int, ready: list[int]) -> int:
        self.left -= 1
        if self.left > 0 and current in ready:
            return current
        self.left = self.rng.randint(1, 4)
        return next((program for program in ready if program > current), ready[0])


class Priority(Random):
    """Random priorities, the highest runs; now and then the running one drops to the last place.

    Probabilistic concurrency testing (Burckhardt et al., ASPLOS 2010): it lets a program run far ahead, or hang far
    behind, which a uniform choice practically never does.
    """

    CHANGE = 1 / 40

    def start(self, count: int) -> None:
        self.rank = self.rng.sample(range(count), count)

    def choose(self, current: int, ready: list[int]) -> int:
        if self.rng.random() < self.CHANGE:
            self.rank[current] = min(self.rank) - 1
        return max(ready, key=self.rank.__getitem__)


POLICIES = {"random": Random, "round_robin": RoundRobin, "priority": Priority}


class Scheduler:
    """Runs the programs of one launch to their end. Its methods below `run` are for the running program to call."""

    def __init__(self, policy: Random, max_steps: int, max_idle: int):
        self.policy = policy
        self.max_steps = max_steps
        self.max_idle = max_idle
        self.schedule: list[int] = []  # the program that ran at each step
        self.switches = 0
        self.current = 0
        self.failure: BaseException | None = None
        self.parked: dict[int, tuple[int, int, str]] = {}  # program -> first address it polls, past the last, and where
        self.idle = 0

    def run(self, programs: list[Callable[[], None]]) -> None:
        self.live = list(range(len(programs)))
        self.ready = list(self.live)
        # A held lock is a program that sleeps: releasing it hands the baton over.
        self.batons = [threading.Lock() for _ in programs]
        self.ended = threading.Lock()
        for lock in (*self.batons, self.ended):
            lock.acquire()
        self.policy.start(len(programs))
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._body, index, program), daemon=True)
            for index, program in enumerate(programs)
        ]
        for thread in threads:
            thread.start()
        self.current = self.policy.choose(0, self.ready)
        self.batons[self.current].release()
        self.ended.acquire()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _body(self, index: int, program: Callable[[], None]) -> None:
        self.batons[index].acquire()
        try:
            if self.failure is None:
                program()
        except Abandoned:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        self.live.remove(index)
        self.unpark(index)
        self.ready.remove(index)
        if self.live:
            self.current = self.policy.choose(index, self.ready) if self.ready else self.live[0]
            self.batons[self.current].release()
        else:
            self.ended.release()

    def switch(self) -> None:
        """Let the policy decide who does the next memory operation; returns when it is the caller's turn."""
        me = self.current
        if len(self.schedule) >= self.max_steps:
            self.fail(Livelock(f"the launch is not over after {self.max_steps} steps (max_steps)"))
        if self.ready:
            following = self.policy.choose(me, self.ready)
        else:
            self.idle += 1
            if self.idle > self.max_idle:
                places = ", ".join(sorted({place for *_, place in self.parked.values()}))
                self.fail(Livelock(f"all {len(self.live)} programs left wait for a write that none does, at {places}"))
            following = next((program for program in self.live if program > me), self.live[0])
        self.schedule.append(following)
        if following == me:
            return
        self.switches += 1
        self.current = following
        self.batons[following].release()
        self.batons[me].acquire()
        if self.failure is not None:
            raise Abandoned

    def fail(self, error: Exception) -> None:
        self.failure = error
        raise Abandoned

    def park(self, start: int, end: int, place: str) -> None:
        """The running program polled [start, end) again and saw nothing new."""
        if self.current not in self.parked:
            self.ready.remove(self.current)
        self.parked[self.current] = start, end, place

    def unpark(self, program: int) -> None:
        if self.parked.pop(program, None) is not None:
            self.ready.append(program)
            self.ready.sort()
            self.idle = 0

    def wrote(self, start: int, end: int) -> None:
        """The running program wrote to [start, end): whoever polls there has something to see."""
        for program, (first, last, _) in list(self.parked.items()):
            if start < last and first < end:
                self.unpark(program)
