"""What one time step costs under the model: the chain that no schedule can shorten, part by part, in microseconds.

publish -> see -> read the group's rows -> multiply by the weights -> cell -> publish. It is a floor, not a measurement;
its constants are the device's (tuned/*.json).
"""

from __future__ import annotations

from .devices import Device

#: How the kernels' programs wait for one another (kernels/sync.py).
PROTOCOL = "counter"
#: Of the tensor cores' operands, out of shared memory, a clock and SM.
SHARED_BYTES_PER_CLOCK = 128
#: A cell's tile beyond the first costs so many clocks; an SM computes so many of its values a clock.
CLOCKS_A_TILE, CELL_VALUES_PER_CLOCK = 300, 4
#: Rows times columns of the smallest recurrence's product, which Device.cell_us holds already (LSTM, 16 x 16 units).
SMALLEST = 16 * 64


def step(
    device: Device, kind: str, itemsize: int, engine: str, *,
    block_b: int, k: int, n: int, tiles: int, programs: int, how: str, resident: bool,
) -> dict[str, float]:  # fmt: skip
    """One step of one program, by cause: rows [block_b, k] times columns [k, n], in a group of `programs`.

    `how` is "plain" or "batched", over slices of k; the cell works on `tiles` tiles, block_b x n gate values in all
    (none: a product alone).
    """
    parts = {}
    if engine == "step":
        parts["launch"] = device.launch_us()
    elif engine != "local":
        parts["wait"] = device.wait_us(PROTOCOL, programs)
    if engine != "local":
        parts["rows"] = rows(device, block_b, k, itemsize)
    parts["weights"] = weights(device, k, n, itemsize, resident=resident)
    parts["product"] = product(device, kind, block_b, k, n, how)
    if tiles:
        parts["cell"] = cell(device, block_b, n, tiles)
    return parts


def rows(device: Device, block_b: int, k: int, itemsize: int) -> float:
    """To read h[t-1] or da[t+1], block_b rows of k, which the whole group reads."""
    return _us(device, block_b * k * itemsize / device.l2_bytes_per_clock)


def weights(device: Device, k: int, n: int, itemsize: int, *, resident: bool) -> float:
    """To read the program's part of W_hh, k x n: from shared memory, or from L2 a part of its own each."""
    rate = SHARED_BYTES_PER_CLOCK if resident else device.l2_distinct_bytes_per_clock
    return _us(device, k * n * itemsize / rate)


def product(device: Device, kind: str, block_b: int, k: int, n: int, how: str) -> float:
    """To multiply rows [block_b, k] by columns [k, n], "plain" or "batched" over slices of k."""
    return _us(device, 2 * block_b * k * n / device.flops_per_clock(kind, block_b, n, how))


def cell(device: Device, block_b: int, n: int, tiles: int) -> float:
    """The pointwise part of block_b x n gate values in `tiles` tiles, and what else a step has to do."""
    beyond = CLOCKS_A_TILE * (tiles - 1) + (block_b * n - SMALLEST) / CELL_VALUES_PER_CLOCK
    return device.cell_us + _us(device, beyond)


def _us(device: Device, clocks: float) -> float:
    return clocks / (device.clock_ghz * 1e3)
