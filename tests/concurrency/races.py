"""Happens-before over the programs of one launch: vector clocks, and shadow memory with each element's last accesses.

A clock has a component a program, which counts that program's barriers: an access belongs to the stretch between two
of them. What orders accesses of different programs is a release that is acquired, and, since a release or an acquire
is one thread's and the accesses are all threads', a `tl.debug_barrier()` on either side:

    stores, barrier, release  ->  acquire that sees it, barrier, loads

So a release publishes the clock as it was at the last barrier, and an acquired clock counts from the next barrier on.
What a program acquired, its own release passes on. Relaxed atomics and those of scope "cta" order nothing, but, as
read-modify-writes, keep what was released to their location. No other barrier counts, though a compiled kernel has more
of them (in products, reductions, layout changes): the compiler puts them in for its own sake and may leave them out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

SITE_BITS = 16
SITE_MASK = (1 << SITE_BITS) - 1

#: Which earlier accesses of other programs an access must be ordered behind, besides plain writes, which all must.
CONFLICTS = {
    "read": ("atomic",),
    "write": ("read", "atomic", "atomic read"),
    "atomic": ("read",),
    "atomic read": (),
}
UNORDERED = "unordered within a program"


class OutOfBounds(RuntimeError):
    """An access outside of every tensor that was passed to the launch."""


@dataclass(frozen=True)
class Access:
    op: str  # "read", "write", "atomic" (a read-modify-write or atomic store), "atomic read"
    program: tuple[int, ...]
    place: str  # function and line


@dataclass(frozen=True)
class Race:
    """Two accesses of one element that nothing orders, in the order in which they came about in this run."""

    kind: str  # "write-read", "read-write", "write-write" (an atomic counts as a write), or UNORDERED
    address: int
    where: str  # the element by the kernel's own parameter: "y_ptr[3, 0, 16]"
    kernel: str
    first: Access
    second: Access

    def describe(self, where: str | None = None) -> str:
        second = f"{self.second.op} of {where or self.where} by program {self.second.program} at {self.second.place}"
        if self.kind == UNORDERED:
            why = "other threads of the program did that, with no tl.debug_barrier() in between"
            return f"{self.kernel}: {second} is not ordered behind its own {self.first.op} at {self.first.place}: {why}"
        first = f"{self.first.op} by program {self.first.program} at {self.first.place}"
        return f"{self.kernel}: {second} races with the {first}"


@dataclass(frozen=True)
class Extent:
    """Where a tensor lies; holds no reference to it."""

    name: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, name: str, tensor: Any) -> Extent:
        return cls(name, tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size())

    def locate(self, address: int) -> str | None:
        """The element at an address: "y[3, 0, 16]", or None if it is not in this tensor."""
        offset = (address - self.start) // self.itemsize
        index = [0] * len(self.shape)
        for dim in sorted(range(len(self.shape)), key=self.stride.__getitem__, reverse=True):
            if self.stride[dim] > 0 and self.shape[dim] > 1:
                index[dim], offset = divmod(offset, self.stride[dim])
        if address < self.start or offset or any(i >= size for i, size in zip(index, self.shape, strict=True)):
            return None
        return f"{self.name}{index}"


@dataclass
class Lanes:
    """The elements of one tile access that its mask lets through."""

    addresses: np.ndarray  # [n] int64
    positions: np.ndarray  # [n] flat positions in the tile
    shape: tuple[int, ...]  # of the whole tile
    itemsize: int
    start: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        if self.addresses.size:
            self.start = int(self.addresses.min())
            self.end = int(self.addresses.max()) + self.itemsize


class Region:
    """Shadow of one storage, a slot for each `grain` bytes, the smallest element it was accessed with.

    A stamp is an access: the clock component of its program, then its site (see RaceCheck.sites).
    """

    def __init__(self, start: int, size: int, programs: int):
        self.start, self.size, self.programs = start, size, programs
        self.grain = 0

    def refine(self, itemsize: int) -> None:
        if not self.grain:
            slots = math.ceil(self.size / itemsize)
            self.writer = np.full(slots, -1, np.int16)
            self.written = np.zeros(slots, np.int64)  # stamp of the last plain write
            self.position = np.zeros(slots, np.int64)  # and where in its tile that was
            self.seen: dict[str, np.ndarray] = {}  # other kinds of access: [slots, programs] stamps
            self.released: dict[int, np.ndarray] = {}  # slot -> clock
        else:
            factor = self.grain // itemsize
            self.writer, self.written, self.position = (
                np.repeat(table, factor) for table in (self.writer, self.written, self.position)
            )
            self.seen = {op: np.repeat(table, factor, axis=0) for op, table in self.seen.items()}
            self.released = {s * factor + i: clock for s, clock in self.released.items() for i in range(factor)}
        self.grain = itemsize

    def slots(self, lanes: Lanes, chosen: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Slots, and positions in the tile, of those lanes that are chosen."""
        if not self.grain or lanes.itemsize < self.grain:
            self.refine(lanes.itemsize)
        slots, positions = (lanes.addresses[chosen] - self.start) // self.grain, lanes.positions[chosen]
        parts = lanes.itemsize // self.grain
        if parts > 1:
            slots = (slots[:, None] + np.arange(parts)).ravel()
            positions = np.repeat(positions, parts)
        return slots, positions

    def table(self, op: str) -> np.ndarray:
        if op not in self.seen:
            self.seen[op] = np.zeros((len(self.writer), self.programs), np.int64)
        return self.seen[op]


class RaceCheck:
    """The happens-before relation of one launch. `found` fills with its races, one a pair of programs and sites."""

    def __init__(self, kernel: str, programs: list[tuple[int, ...]], tensors: dict[str, Any], intra: bool):
        self.kernel, self.programs, self.intra = kernel, programs, intra
        self.extents = [Extent.of(name, tensor) for name, tensor in tensors.items()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
        self.regions = [Region(start, size, len(programs)) for start, size in sorted(storages.items()) if size]
        self.starts = [region.start for region in self.regions]
        self.sites: list[tuple[str, str, tuple[int, ...]]] = []  # op, place, shape of the tile
        self.site_index: dict[tuple[str, str, tuple[int, ...]], int] = {}
        self.found: dict[tuple[str, str, Access, Access], Race] = {}

        count = len(programs)
        self.clock = np.eye(count, dtype=np.int64)  # [p]: what p's accesses are ordered behind
        self.published = np.zeros((count, count), np.int64)  # [p]: its clock at its last barrier
        self.acquired = np.zeros((count, count), np.int64)  # [p]: joins its clock at its next barrier
        self.limit = self.clock << SITE_BITS | SITE_MASK  # [p]: a stamp above is not ordered before p

    def barrier(self, program: int) -> None:
        clock = self.clock[program]
        np.maximum(clock, self.acquired[program], out=clock)
        self.published[program] = clock
        clock[program] += 1
        self.limit[program] = clock << SITE_BITS | SITE_MASK

    def access(self, program: int, op: str, lanes: Lanes, place: str) -> None:
        """Check a tile access against those before it, and remember it."""
        site = self._site(op, place, lanes.shape)
        stamp = int(self.clock[program, program]) << SITE_BITS | site
        limit = self.limit[program]
        for region, chosen in self._regions(program, op, lanes, place):
            slots, positions = region.slots(lanes, chosen)
            written, writer = region.written[slots], region.writer[slots]
            races = written > limit[writer]
            if races.any():
                self._report(program, site, region, slots[races], writer[races], written[races])
            for other in CONFLICTS[op]:
                if other in region.seen:
                    stamps = region.seen[other][slots]
                    lane, who = np.nonzero(stamps > limit)
                    if lane.size:
                        self._report(program, site, region, slots[lane], who, stamps[lane, who])
            if self.intra and op in ("read", "write"):
                self._check_threads(program, site, region, slots, positions, writer, written)
            if op == "write":
                region.writer[slots], region.written[slots], region.position[slots] = program, stamp, positions
            else:
                region.table(op)[slots, program] = stamp

    def acquire(self, program: int, lanes: Lanes) -> None:
        acquired = self.acquired[program]
        for region, slot in self._slots(lanes):
            if slot in region.released:
                np.maximum(acquired, region.released[slot], out=acquired)

    def release(self, program: int, lanes: Lanes) -> None:
        mine = np.maximum(self.published[program], self.acquired[program])
        for region, slot in self._slots(lanes):
            region.released[slot] = np.maximum(region.released.get(slot, 0), mine)

    def overwrite(self, lanes: Lanes) -> None:
        """A store, other than a read-modify-write, ends what was released to its location."""
        for region, chosen in self._regions(0, "write", lanes, ""):
            if region.released:
                for slot in region.slots(lanes, chosen)[0]:
                    region.released.pop(int(slot), None)

    def _slots(self, lanes: Lanes) -> Iterator[tuple[Region, int]]:
        for region, chosen in self._regions(0, "atomic", lanes, ""):
            for slot in region.slots(lanes, chosen)[0]:
                yield region, int(slot)

    def _regions(self, program: int, op: str, lanes: Lanes, place: str) -> Iterator[tuple[Region, np.ndarray | slice]]:
        last = bisect_right(self.starts, lanes.start) - 1
        if last >= 0 and lanes.end <= self.starts[last] + self.regions[last].size:
            yield self.regions[last], slice(None)
            return
        index = np.searchsorted(self.starts, lanes.addresses, side="right") - 1
        for i in np.unique(index):
            chosen = index == i
            region = self.regions[i] if i >= 0 else None
            if region is None or int(lanes.addresses[chosen].max()) + lanes.itemsize > region.start + region.size:
                raise OutOfBounds(
                    f"{self.kernel}: {op} by program {self.programs[program]} at {place}"
                    f" lies outside of every tensor that was passed"
                )
            yield region, chosen

    def _check_threads(
        self,
        program: int,
        site: int,
        region: Region,
        slots: np.ndarray,
        positions: np.ndarray,
        writer: np.ndarray,
        written: np.ndarray,
    ) -> None:
        """What the program itself stored since its last barrier, other threads stored, unless the tile is the same.

        Tiles of one shape are taken to have one layout: an element at one position is the same thread's in both. A
        scalar is stored by one thread and read by all. A load before the store is left alone: nearly always the stored
        value was computed from what was loaded there, which orders the two in any layout.
        """
        own = (writer == program) & (written >> SITE_BITS == self.clock[program, program])
        if not own.any():
            return
        op, _, shape = self.sites[site]
        moved = region.position[slots] != positions
        for earlier in np.unique(written[own] & SITE_MASK):
            other_shape = self.sites[earlier][2]
            scalar = op == "read" and math.prod(shape) == math.prod(other_shape) == 1
            if shape != other_shape or scalar:
                moved |= own & (written & SITE_MASK == earlier)
        moved &= own
        if moved.any():
            self._report(program, site, region, slots[moved], writer[moved], written[moved])

    def _site(self, op: str, place: str, shape: tuple[int, ...]) -> int:
        key = op, place, shape
        index = self.site_index.get(key)
        if index is None:
            index = self.site_index[key] = len(self.sites)
            self.sites.append(key)
        return index

    def _report(
        self, program: int, site: int, region: Region, slots: np.ndarray, who: np.ndarray, stamps: np.ndarray
    ) -> None:
        second = Access(self.sites[site][0], self.programs[program], self.sites[site][1])
        _, firsts = np.unique(np.stack([who, stamps & SITE_MASK]), axis=1, return_index=True)
        for i in firsts:
            op, place, _ = self.sites[int(stamps[i]) & SITE_MASK]
            first = Access(op, self.programs[who[i]], place)
            sides = ("read" if "read" in access.op else "write" for access in (first, second))
            kind = UNORDERED if who[i] == program else "-".join(sides)
            address = region.start + int(slots[i]) * region.grain
            where = next(filter(None, (extent.locate(address) for extent in self.extents)), hex(address))
            key = self.kernel, kind, first, second
            self.found.setdefault(key, Race(kind, address, where, self.kernel, first, second))
