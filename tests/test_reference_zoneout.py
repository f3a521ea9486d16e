"""Which elements the oracle's zoneout keeps: Philox's known words, which are Triton's, and what is made of them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from cell_equations import philox_words
from reference_problems import SEED, call, tensors_of

from lstm_triton import reference
from lstm_triton.philox import philox
from lstm_triton.spec import CellSpec

# of Random123: counter, key, words
KNOWN = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    seed = key[1] * 2**32 + key[0]
    signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    found = philox(signed, tuple(torch.tensor(c) for c in counter))
    assert tuple(int(w) for w in found) == words == philox_words(seed, counter)


@triton.jit
def draw(
    words_ptr,  # [rows, BLOCK, 4]
    seed_ptr,
    t,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    units = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), units, row, t, 0)
    words_ptr += (row * BLOCK + units) * 4
    tl.store(words_ptr, w0.to(tl.int64))
    tl.store(words_ptr + 1, w1.to(tl.int64))
    tl.store(words_ptr + 2, w2.to(tl.int64))
    tl.store(words_ptr + 3, w3.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
def test_philox_is_tritons(seed: int) -> None:
    words = torch.full((3, 1024, 4), -1)
    draw[(3,)](words, torch.tensor([seed]), 1234567, BLOCK=1024)
    units, rows = torch.arange(1024), torch.arange(3)[:, None]
    assert torch.equal(torch.stack(philox(torch.tensor(seed), (units, rows, 1234567, 0)), dim=-1), words)


def test_kept_elements() -> None:
    seed, probability = torch.tensor(3), 0.3
    t = torch.arange(4)[:, None, None]
    h, c = (reference.kept(seed, t, 64, 257, probability, word) for word in (0, 1))
    assert h.shape == (4, 64, 257) and h.dtype == torch.bool
    # as often as they should, within five standard deviations; of neighbours and of the two states, both as often
    for both, p in ((h, 0.3), (c, 0.3), (h & c, 0.09), (h[1:] & h[:-1], 0.09), (h[:, 1:] & h[:, :-1], 0.09),
                    (h[..., 1:] & h[..., :-1], 0.09)):  # fmt: skip
        assert abs(both.double().mean().item() - p) < 5 * (p * (1 - p) / both.numel()) ** 0.5
    assert not torch.equal(h, reference.kept(torch.tensor(4), t, 64, 257, probability, 0))
    # a draw depends on its place and nothing else
    assert torch.equal(reference.kept(seed[None], 2, 5, 7, probability, 0), h[2, :5, :7])
    # of the same words the larger probability keeps more
    assert (reference.kept(seed, t, 64, 257, 0.5, 0) >= h).all()
    assert reference.kept(seed, t, 64, 257, 1.0, 0).all() and not reference.kept(seed, t, 64, 257, 0.0, 0).any()


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_zoneout_draws_what_it_expects(cell: str) -> None:
    """One step, linear in what is kept: its mean over many seeds, and its values those of either state."""
    spec = CellSpec(cell, zoneout=(0.3, 0.2) if cell == "lstm" else 0.3)
    v = tensors_of(spec, (1, 2, 3, 4))
    seeds = torch.arange(4000)
    drawn = torch.func.vmap(lambda seed: call(spec, v, seed=seed)[1 : 1 + len(spec.states)])(seeds)
    expected = call(spec, v)[1:]
    candidates = call(CellSpec(cell), v)[1:]
    for name, many, mean, new, p in zip(spec.states, drawn, expected, candidates, spec.zoneout, strict=False):
        held = many == v[name]
        assert (held | (many == new)).all()
        deviation = (v[name] - new).abs() * (p * (1 - p) / len(seeds)) ** 0.5
        assert ((many.mean(0) - mean).abs() <= 5 * deviation).all()
        # every element of every row of its own accord
        assert (abs(held.double().mean(0) - p) < 5 * (p * (1 - p) / len(seeds)) ** 0.5).all()


def test_zoneout_of_everything_and_of_nothing() -> None:
    v = tensors_of(CellSpec("lstm", zoneout=(1.0, 1.0)), (3, 2, 3, 4))
    for seed in (None, SEED):
        y, h_n, c_n, cells = call(CellSpec("lstm", zoneout=(1.0, 1.0)), v, seed=seed)
        assert torch.equal(y, v["h0"].expand(3, -1, -1)) and torch.equal(h_n, v["h0"])
        assert torch.equal(cells, v["c0"].expand(3, -1, -1)) and torch.equal(c_n, v["c0"])
    plain = call(CellSpec("lstm"), v)
    assert all(torch.equal(a, b) for a, b in zip(call(CellSpec("lstm"), v, seed=SEED), plain, strict=True))


def test_the_seed_alone_decides() -> None:
    spec = CellSpec("gru", zoneout=0.3)
    v = tensors_of(spec, (5, 3, 3, 4))
    first, again, other = (call(spec, v, seed=torch.tensor(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_zoneout_mixes_normalised_cells() -> None:
    """One step: what is not kept is LN(c), kept or mixed with is the state as it was carried."""
    v = tensors_of(CellSpec("lstm", layer_norm=True), (1, 2, 3, 4))
    old, new = v["c0"], call(CellSpec("lstm", layer_norm=True), v)[2]
    back = (new - v["norm_c.bias"]) / v["norm_c.weight"]
    torch.testing.assert_close(back.mean(-1), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    spec = CellSpec("lstm", layer_norm=True, zoneout=(0.0, 0.4))
    torch.testing.assert_close(call(spec, v)[2], 0.4 * old + 0.6 * new, rtol=1e-13, atol=1e-14)
    drawn = call(spec, v, seed=SEED)[2]
    kept = drawn == old
    assert kept.any() and not kept.all() and torch.equal(drawn, torch.where(kept, old, new))
