"""The concurrent executor and its race check, on a toy with a persistent RNN's pattern and known faults planted in it.

Programs form groups. At each step each stores its tile and publishes it, waits for its group's and reads all of them.
"""

import pytest
import torch
import triton
import triton.language as tl
from concurrency import POLICIES, Livelock, OutOfBounds, concurrent
from concurrency.faults import publish_by_store, publish_relaxed, publish_without_barrier
from concurrency.races import UNORDERED
from triton.runtime.errors import InterpreterError

GROUPS, MEMBERS, BLOCK, STEPS = 2, 3, 4, 6
SEEDS = range(8)


@triton.jit
def wait(counter_ptr, target):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def no_wait(counter_ptr, target):
    tl.debug_barrier()


@triton.jit
def wait_one_too_few(counter_ptr, target):
    wait(counter_ptr, target - 1)


@triton.jit
def wait_no_barrier(counter_ptr, target):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
        pass


@triton.jit
def wait_relaxed(counter_ptr, target):
    while tl.atomic_add(counter_ptr, 0, sem="relaxed", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def wait_plain(counter_ptr, target):
    while tl.load(counter_ptr, volatile=True) < target:
        pass
    tl.debug_barrier()


@triton.jit
def publish(counter_ptr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def publish_cta(counter_ptr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="cta")


@triton.jit
def chain(
    y_ptr,  # [T, groups, members * BLOCK]
    counter_ptr,  # [groups]
    T,
    WAIT: tl.constexpr,
    PUBLISH: tl.constexpr,
    MEMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    group = tl.program_id(0)
    member = tl.program_id(1)
    width = MEMBERS * BLOCK
    offs = tl.arange(0, TILES)
    tile = member
    if OVERLAP:
        tile = member // 2
    own = tile * BLOCK + tl.arange(0, BLOCK)
    stride_t = tl.num_programs(0) * width
    y_ptr += group * width
    tl.store(y_ptr + own, own)
    PUBLISH(counter_ptr + group)
    for t in range(1, T):
        WAIT(counter_ptr + group, t * MEMBERS)
        before = tl.load(y_ptr + offs, mask=offs < width, other=0)
        y_ptr += stride_t
        tl.store(y_ptr + own, (tl.sum(before, axis=0) + own * t) % 1009)
        PUBLISH(counter_ptr + group)


def expected():
    own = torch.arange(MEMBERS * BLOCK)
    steps = [own.expand(GROUPS, -1)]
    for t in range(1, STEPS):
        steps.append((steps[-1].sum(1, keepdim=True) + own * t) % 1009)
    return torch.stack(steps).int()


def run_chain(wait_fn=wait, publish_fn=publish, overlap=False, steps=STEPS, **options):
    y = torch.full((steps, GROUPS, MEMBERS * BLOCK), -1, dtype=torch.int32)
    counter = torch.zeros(GROUPS, dtype=torch.int32)
    with concurrent(**options) as run:
        chain[(GROUPS, MEMBERS)](
            y, counter, steps, wait_fn, publish_fn, MEMBERS, BLOCK, triton.next_power_of_2(MEMBERS * BLOCK), overlap
        )
    run.name(y=y, counter=counter)
    return run, torch.equal(y, expected()[:steps])


def kinds(run):
    return {race.kind for race in run.races}


@pytest.mark.parametrize("policy", POLICIES)
def test_correct_kernel_is_clean(policy):
    for seed in range(20):
        run, right = run_chain(seed=seed, policy=policy)
        assert not run.races, run.describe()
        assert right
        assert run.switches > STEPS * GROUPS * MEMBERS / 2


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "faults",
    [
        {"wait_fn": no_wait},
        {"wait_fn": wait_no_barrier},
        {"wait_fn": wait_relaxed},
        {"wait_fn": wait_plain},
        {"publish_fn": publish_without_barrier},
        {"publish_fn": publish_relaxed},
        {"publish_fn": publish_cta},
        {"overlap": True},
    ],
    ids=lambda faults: "-".join(getattr(fault, "__name__", name) for name, fault in faults.items()),
)
def test_fault_is_caught_in_every_run(policy, faults):
    for seed in SEEDS:
        run, _ = run_chain(seed=seed, policy=policy, **faults)
        assert kinds(run) & {"write-read", "read-write", "write-write"}


@pytest.mark.parametrize("policy", ["random", "round_robin"])
def test_wait_off_by_one_is_caught_even_where_the_numbers_are_right(policy):
    runs = [run_chain(wait_one_too_few, steps=2, seed=seed, policy=policy) for seed in range(20)]
    assert sum(right and bool(run.races) for run, right in runs) >= 5
    assert all(run.races for run, right in runs if not right)


@pytest.mark.parametrize("policy", POLICIES)
def test_wait_off_by_one_is_caught_in_every_run_of_some_steps(policy):
    assert all(run_chain(wait_one_too_few, seed=seed, policy=policy)[0].races for seed in SEEDS)


def test_plain_store_instead_of_the_release_is_caught():
    """Its lost updates can make programs wait for ever, too: the races up to there are kept."""
    outcomes = set()
    for seed in SEEDS:
        y = torch.zeros((STEPS, 1, 2 * BLOCK), dtype=torch.int32)
        counter = torch.zeros(1, dtype=torch.int32)
        with concurrent(seed=seed, max_idle=50) as run:
            try:
                chain[(1, 2)](y, counter, STEPS, wait, publish_by_store, 2, BLOCK, 2 * BLOCK, False)
                outcomes.add("ended")
            except Livelock:
                outcomes.add("livelock")
        assert any(race.where == "counter_ptr[0]" and "write" in (race.first.op, race.second.op) for race in run.races)
    assert "livelock" in outcomes


def test_a_seed_decides_the_schedule():
    for policy in POLICIES:
        schedules = [run_chain(seed=seed, policy=policy)[0].schedule for seed in (3, 3, 4)]
        assert schedules[0] == schedules[1] != schedules[2]


def test_races_are_described_by_the_names_given():
    run, _ = run_chain(no_wait, seed=0)
    race = next(race for race in run.races if race.kind == "read-write")
    assert race.where.startswith("y_ptr[")
    assert f"races with the read by program {race.first.program} at test_concurrency.py:" in run.describe()
    assert f"write of y[{race.where[len('y_ptr[') :]} by program {race.second.program}" in run.describe()
    assert race.first.program[0] == race.second.program[0], "groups share no tile"


@triton.jit
def handshake(data_ptr, flag_ptr, out_ptr, HOW: tl.constexpr):
    offs = tl.arange(0, 8)
    if tl.program_id(0) == 0:
        tl.store(data_ptr + offs, offs)
        tl.debug_barrier()
        if HOW == "xchg":
            tl.atomic_xchg(flag_ptr, 1, sem="release")
        elif HOW == "cas":
            tl.atomic_cas(flag_ptr, 0, 1, sem="acq_rel")
        elif HOW == "relaxed cas":
            tl.atomic_cas(flag_ptr, 0, 1, sem="relaxed")
        elif HOW == "failing cas":
            tl.atomic_cas(flag_ptr, 5, 6, sem="release")
            tl.atomic_xchg(flag_ptr, 1, sem="relaxed")
        elif HOW == "plain store":
            tl.store(flag_ptr, 1)
        else:
            tl.atomic_store(flag_ptr, 1, sem="release" if HOW != "relaxed store" else "relaxed")
    else:
        if HOW == "poll":
            tl.atomic_poll(flag_ptr, 1, sem="acquire")
        elif HOW == "xchg" or HOW == "failing cas" or HOW == "plain store":
            while tl.atomic_or(flag_ptr, 0, sem="acquire") == 0:
                pass
        elif HOW == "cas" or HOW == "relaxed cas":
            while tl.atomic_cas(flag_ptr, 7, 7, sem="acquire") == 0:
                pass
        else:
            while tl.atomic_load(flag_ptr, sem="acquire") == 0:
                pass
        tl.debug_barrier()
        tl.store(out_ptr + offs, tl.load(data_ptr + offs))


HANDSHAKES = {
    "xchg": set(),
    "cas": set(),
    "relaxed cas": {"write-read"},
    "failing cas": {"write-read"},
    "plain store": {"write-read", "write-write"},
}
if hasattr(tl, "atomic_store"):
    HANDSHAKES |= {"store": set(), "poll": set(), "relaxed store": {"write-read"}}


@pytest.mark.parametrize("how", HANDSHAKES)
def test_which_atomics_order(how):
    for seed in SEEDS:
        data, flag, out = (torch.zeros(size, dtype=torch.int32) for size in (8, 1, 8))
        with concurrent(seed=seed) as run:
            handshake[(2,)](data, flag, out, how)
        assert out.tolist() == list(range(8))
        assert kinds(run) == HANDSHAKES[how], run.describe()


@triton.jit
def relay(data_ptr, flag_ptr, out_ptr):
    """0 lets 1 go, 1 lets 2 go, and 2 reads what 0 stored. 1 acquires and releases in one thread: no barrier."""
    offs = tl.arange(0, 8)
    if tl.program_id(0) == 0:
        tl.store(data_ptr + offs, offs)
        publish(flag_ptr)
    elif tl.program_id(0) == 1:
        wait_no_barrier(flag_ptr, 1)
        publish_without_barrier(flag_ptr + 1)
    else:
        wait(flag_ptr + 1, 1)
        tl.store(out_ptr + offs, tl.load(data_ptr + offs))


def test_order_is_transitive():
    for seed in SEEDS:
        data, flag, out = (torch.zeros(size, dtype=torch.int32) for size in (8, 2, 8))
        with concurrent(seed=seed) as run:
            relay[(3,)](data, flag, out)
        assert not run.races, run.describe()
        assert out.tolist() == list(range(8))


@triton.jit
def neighbours(x_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr, SHIFT: tl.constexpr):
    """Each program stores a tile of its own and reads it back, SHIFT elements further on."""
    x_ptr += tl.program_id(0) * 2 * BLOCK
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) + 1)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + offs, tl.load(x_ptr + SHIFT + offs))


@pytest.mark.parametrize("barrier, shift, intra, racy", [
    (False, 0, True, False), (False, 1, True, True), (True, 1, True, False), (False, 1, False, False),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float64])
def test_threads_of_one_program(barrier, shift, intra, racy, dtype):
    """What other threads stored needs a barrier before it is read; a tile's own elements do not."""
    with concurrent(intra=intra) as run:
        neighbours[(3,)](torch.zeros(3, 16, dtype=dtype), 8, barrier, shift)
    assert kinds(run) == ({UNORDERED} if racy else set()), run.describe()
    assert not racy or "no tl.debug_barrier() in between" in run.describe()


@triton.jit
def narrow_and_wide(x_ptr, WIDE_FIRST: tl.constexpr, AT: tl.constexpr):
    """Program 0 stores the int64 at 1, that is the bytes 8 to 15; program 1 one byte."""
    if (tl.program_id(0) == 0) == WIDE_FIRST:
        tl.store(x_ptr + 1, 7)
    else:
        tl.store(x_ptr.to(tl.pointer_type(tl.int8)) + AT, 7)


@pytest.mark.parametrize("wide_first", [True, False])
@pytest.mark.parametrize("at, racy", [(7, False), (8, True), (13, True), (15, True), (16, False)])
def test_elements_of_different_sizes(wide_first, at, racy):
    with concurrent() as run:
        narrow_and_wide[(2,)](torch.zeros(4, dtype=torch.int64), wide_first, at)
    assert kinds(run) == ({"write-write"} if racy else set())


@triton.jit
def described(x_ptr, WIDTH, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """A tile of 2 rows a program, STEP columns on from the one before; the last hangs over the edge."""
    x = tl.make_tensor_descriptor(x_ptr, [2, WIDTH], [WIDTH, 1], [2, BLOCK])
    at = tl.program_id(0) * STEP
    x.store([0, at], x.load([0, at]) + 1)


@pytest.mark.parametrize("step, racy", [(8, False), (4, True)])
def test_tensor_descriptors(step, racy):
    x = torch.zeros(2, 20)
    with concurrent() as run:
        described[(3,)](x, 20, 8, step)
    assert bool(run.races) == racy
    assert racy or x.eq(1).all()


@triton.jit
def fill(x_ptr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Every program stores its place in the grid; those before and after are in the tile, and masked."""
    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    offs = program + tl.arange(0, 4) - 1
    mask = (offs >= 0) & (offs < SIZE)
    if MASKED:
        mask = mask & (offs == program)
    tl.store(x_ptr + offs, program, mask=mask)


@pytest.mark.parametrize("grid", [(5,), (3, 7), (3, 2, 5), (64,)])
def test_grids_and_masks(grid):
    size = torch.Size(grid).numel()
    x = torch.zeros(size, dtype=torch.int32)
    with concurrent() as run:
        fill[grid](x, size, True)
    assert not run.races
    assert x.tolist() == list(range(size))
    with concurrent() as run:
        fill[grid](x, size, False)
    assert kinds(run) == {"write-write"}
    assert all(len(race.first.program) == len(grid) for race in run.races)


def test_launches_are_ordered_and_the_interpreter_is_left_as_it_was():
    x = torch.zeros(6, dtype=torch.int32)
    with concurrent() as run:
        for grid in [(6,), (2, 3), (6,)]:
            fill[lambda meta, grid=grid: grid](x, 6, True)
    assert not run.races and run.launches == 3
    x.zero_()
    fill[(6,)](x, 6, True)
    assert x.tolist() == list(range(6)) and run.launches == 3


@triton.jit
def stuck(flag_ptr, LIMIT: tl.constexpr, TWO: tl.constexpr):
    polls = 0
    while (tl.atomic_add(flag_ptr, 0, sem="acquire") == 0) & (polls < LIMIT):
        if TWO:
            tl.atomic_add(flag_ptr + 1, 0, sem="acquire")
        polls += 1


def test_livelock_is_reported_and_a_bounded_wait_ends():
    flag = torch.zeros(2, dtype=torch.int32)
    with concurrent(max_idle=100), pytest.raises(Livelock, match=r"all 3 programs left.* \(stuck\)"):
        stuck[(3,)](flag, 1 << 30, False)
    with concurrent(max_steps=500), pytest.raises(Livelock, match="max_steps"):
        stuck[(3,)](flag, 1 << 30, True)
    with concurrent() as run:
        stuck[(3,)](flag, 20, False)
    assert len(run.schedule) == 3 * 21


@triton.jit
def fails(x_ptr, AT: tl.constexpr):
    program = tl.program_id(0)
    tl.store(x_ptr + program, program)
    if program == 1:
        tl.static_assert(False, "the second program's")
    wait(x_ptr + AT, 1 << 20)


def test_exceptions_arrive():
    with concurrent(), pytest.raises(InterpreterError, match="the second program's"):
        fails[(3,)](torch.zeros(4, dtype=torch.int32), 3)
    with concurrent(), pytest.raises(OutOfBounds, match=r"atomic by program \(0,\) at test_concurrency.py"):
        fails[(1,)](torch.zeros(4, dtype=torch.int32), 1 << 40)
