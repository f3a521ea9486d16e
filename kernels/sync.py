"""How the programs of one batch group wait for one another: a counter a group, release to publish, acquire to wait.

A time step is: every program stores its tile, then `publish`es; before it reads the whole group's tiles it `wait`s for
n_h publications. Tiles of different time steps are different memory, so no program ever waits before it writes.
"""

import triton
import triton.language as tl

#: int32 counters a group: a line of the cache of its own.
COUNTER_STRIDE = tl.constexpr(32)

#: Above any count that publishing reaches: n_h * T stays below it (the host checks).
RELEASED = tl.constexpr(1 << 30)


@triton.jit
def publish(counter_ptr):
    """Make what this program stored so far visible to every program that sees the count."""
    # The release below is one thread's: without the barrier the stores of the other warps may still be on their way.
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, target, polls):
    """Poll until the count reaches `target`, `polls` more times at most; returns whether it did, and nobody gave up."""
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while (seen < target) & (polls > 0):
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        polls -= 1
    # The acquire above is one thread's, too: the barrier orders the other threads' loads behind it.
    tl.debug_barrier()
    return (seen >= target) & (seen < RELEASED)


@triton.jit
def meet(counter_ptr, target, ok, PLAN: tl.constexpr):
    """Wait until the whole group has published once more, where programs do wait.

    Returns what to wait for next time, whether all went well, and NaN if not, which poisons what is computed from then.
    """
    poison = 0.0
    if PLAN.SYNC:
        target += PLAN.N_H
        ok = wait(counter_ptr, target - PLAN.N_H, tl.where(ok, PLAN.POLLS, 0)) & ok
        poison = tl.where(ok, 0.0, float("nan"))
    return target, ok, poison


@triton.jit
def give_up(counter_ptr, error_ptr, ok):
    """After a wait that ran out: tell the host, and let the rest of the group through, to give up as well."""
    tl.atomic_max(counter_ptr, RELEASED, mask=ok == 0, sem="release", scope="gpu")
    # The word is in host memory, where an exchange is an atomic that the bus knows.
    tl.atomic_xchg(error_ptr, 1, mask=ok == 0, sem="relaxed", scope="sys")
