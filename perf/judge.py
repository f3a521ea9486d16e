"""The verdict on one cell of the sweep: numerics first, then times side by side, never one of ours that failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lstm_triton.launch import raise_timeout

from .cases import MODES, Case, inputs, oracle, precision, runner
from .floor import floor
from .memory import peak_mib, saved_mib
from .numerics import Check, LayerReference, alive, check_layer, compare
from .providers import PROVIDERS, absence, build, label
from .table import short
from .timing import Run, Timing, capture, clock_for, host_us, race

if TYPE_CHECKING:
    from lstm_triton.devices import Device

Verdict = dict[str, object]
#: A relative error from which on another provider does not compute this layer at all: its time would mean nothing.
ANOTHER_LAYER = 0.5


class _LostError(Exception):
    """The device is lost; the verdict at fault says so."""


@dataclass
class _Entry:
    """A provider whose numerics allow it to be measured."""

    name: str
    layer: nn.Module
    run: Run
    verdict: Verdict

    @property
    def ours(self) -> bool:
        return is_ours(self.name)


def is_ours(provider: str) -> bool:
    """Whether a provider is this package, with whatever engine."""
    return provider.partition(":")[0] == "ours"


class Judge:
    """Checks every provider of a case, then measures those that may be: ours if it passed, others if they are close.

    Another provider outside our tolerance is "loose": it keeps its time, and its error stands beside it. Where the
    device is lost, the verdict at fault has `lost`, and what had no time yet has no verdict: it can be tried again.
    """

    def __init__(self, device: str, seconds: float, *, graph: bool = False, model: Device | None = None) -> None:
        """`model` holds the constants of the floor; `graph` asks for CUDA-graph replays too."""
        self.device, self.seconds, self.graph, self.model = device, seconds, graph, model
        self.clock = clock_for(device)
        self.reference = LayerReference()
        self.absences: dict[str, str] = {}
        self.uncapturable: dict[tuple[str, str, str], str] = {}  # by provider, cell and mode
        self.drawn: tuple[Case, nn.Module, Tensor, Tensor] | None = None

    def __call__(self, case: Case, providers: list[str]) -> dict[str, Verdict]:
        verdicts: dict[str, Verdict] = {}
        with precision(case.dtype):
            try:
                self._judge(case, providers, verdicts)
            except _LostError:
                return {
                    name: verdict
                    for name, verdict in verdicts.items()
                    if verdict.get("median_ms") or verdict.get("status") not in ("ok", "loose")
                }
        return verdicts

    def _judge(self, case: Case, providers: list[str], verdicts: dict[str, Verdict]) -> None:
        try:
            exact, x, dy = self._draw(case)
            want = self.reference(case, exact, x, dy)
        except Exception as error:
            for name in providers:
                verdicts[name] = {"status": "error", "detail": f"reference: {short(error)}"}
            self._survived(verdicts[providers[0]])
            return
        entries = []
        for name in providers:
            verdict = verdicts[name] = {"version": "", "constants": self.model.constants if self.model else ""}
            layer = self._checked(name, case, exact, x, dy, want, verdict)
            if layer is not None:
                entries.append(_Entry(name, layer, runner(layer, case, x, dy), verdict))
        entries = self._time(case, entries)
        for entry in entries:
            self._costs(case, entry, x, dy)
        if self.graph and self.device == "cuda":
            self._replay(case, entries, want)

    def _draw(self, case: Case) -> tuple[nn.Module, Tensor, Tensor]:
        """Weights and inputs, the same for all modes of a shape."""
        shape = replace(case, mode=MODES[0])
        if self.drawn is None or self.drawn[0] != shape:
            self.drawn = None  # the last shape's memory is free before this one's is asked for
            self.drawn = shape, oracle(case), *inputs(case, self.device)
        return self.drawn[1:]

    def _checked(
        self, name: str, case: Case, exact: nn.Module, x: Tensor, dy: Tensor, want: dict[str, Tensor], verdict: Verdict
    ) -> nn.Module | None:
        """The provider's layer if it may be measured; the verdict says how it stands, or why not."""
        if name not in self.absences:
            self.absences[name] = absence(name)
        if self.absences[name]:
            verdict |= {"status": "absent", "detail": self.absences[name]}
            return None
        verdict["version"] = PROVIDERS[name].version
        try:
            verdict["plan"] = label(name, case, self.device)
            layer = build(name, case, exact.state_dict(), self.device)
        except ValueError as error:
            status = "error" if name in ("ours", "torch") else "refused"
            verdict |= {"status": status, "detail": short(error)}
            return None
        except Exception as error:
            self._fail(verdict, error)
            return None
        try:
            check = check_layer(layer, case, x, dy, want)
        except Exception as error:
            self._fail(verdict, error)
            return None
        verdict |= check.columns | {"status": _status(name, check)}
        return None if verdict["status"] == "failed" else layer

    def _time(self, case: Case, entries: list[_Entry]) -> list[_Entry]:
        """Time side by side; returns those that came through."""
        runs = {entry.name: entry.run for entry in entries}
        timed = race(runs, self.clock, self.seconds, alive=self._alive, check=self._waited)
        mhz = self.clock.mhz() if entries else ""
        for entry in entries:
            found = timed.get(entry.name)
            if isinstance(found, Exception):
                self._fail(entry.verdict, found, "timing: ")
        times = {name: found for name, found in timed.items() if isinstance(found, dict)}
        for entry in entries:
            if entry.name in times:
                entry.verdict |= self._columns(case, times[entry.name], times.get("torch")) | {"clock_mhz": mhz}
        return [entry for entry in entries if entry.name in times]

    def _waited(self, name: str) -> None:
        """Raise if a wait between programs ran out in what ran last: it is this provider's, not the next one's."""
        if self.device == "cuda" and is_ours(name):
            raise_timeout(torch.device(self.device, torch.cuda.current_device()))

    def _columns(self, case: Case, times: dict[str, Timing], torch_times: dict[str, Timing] | None) -> Verdict:
        cold = times["cold"]
        found = _times("", cold) | {"rounds": cold.rounds}
        found |= _times("warm_", times["warm"]) if "warm" in times else {}
        found["us_per_step"] = f"{cold.median_ms * 1e3 / case.seq / case.layers:.3f}"
        found["ratio"] = f"{torch_times['cold'].median_ms / cold.median_ms:#.4g}" if torch_times else ""
        if self.model:
            least = floor(case, self.model)
            found |= {"floor_us": f"{least.us_per_step:.3f}", "to_floor": f"{cold.median_ms / least.ms:.2f}"}
        return found

    def _costs(self, case: Case, entry: _Entry, x: Tensor, dy: Tensor) -> None:
        """Memory, and on a GPU what a call costs its caller: at T = 1, where there is least for the device to do."""

        def host() -> float:
            return host_us(runner(entry.layer, replace(case, seq=1), x[:1], dy[:1]), self.clock)

        costs: dict[str, Callable[[], float]] = {"saved_mib": lambda: saved_mib(entry.layer, case, x, dy)}
        if self.device == "cuda":
            costs |= {"peak_mib": lambda: peak_mib(entry.run), "host_us": host}
        for column, cost in costs.items():
            try:
                entry.verdict[column] = f"{cost():.2f}"
                self._waited(entry.name)
            except Exception as error:
                self._note(entry.verdict, column, error)

    def _replay(self, case: Case, entries: list[_Entry], want: dict[str, Tensor]) -> None:
        """Capture each as a CUDA graph, check what a replay leaves, and time replays side by side, the cache cold."""
        replays: dict[str, Run] = {}
        for entry in entries:
            try:
                if (entry.name, case.cell, case.mode) in self.uncapturable:
                    raise RuntimeError(f"not tried again after {self.uncapturable[entry.name, case.cell, case.mode]}")
                replay = capture(entry.run)
                replay.run()
                self.clock.synchronize()
                check = compare(replay.results, want, case.dtype)
                if _status(entry.name, check) == "failed":
                    raise RuntimeError(f"replayed results are wrong: {check.detail}")
                replays[entry.name] = replay.run
            except Exception as error:
                if not isinstance(error, torch.OutOfMemoryError):
                    self.uncapturable.setdefault((entry.name, case.cell, case.mode), short(error))
                self._note(entry.verdict, "graph", error)
        timed = race(replays, self.clock, self.seconds, ("cold",), self._alive, self._waited)
        for entry in entries:
            found = timed.get(entry.name)
            if isinstance(found, Exception):
                self._note(entry.verdict, "graph", found)
            elif found:
                entry.verdict |= _times("graph_", found["cold"])

    def _fail(self, verdict: Verdict, error: Exception, where: str = "") -> None:
        verdict |= {"status": "error", "detail": where + short(error)}
        self._survived(verdict)

    def _note(self, verdict: Verdict, what: str, error: Exception) -> None:
        """A part that could not be measured, beside the rest that could."""
        verdict["detail"] = "; ".join(filter(None, (str(verdict.get("detail", "")), f"{what}: {short(error)}")))
        self._survived(verdict)

    def _survived(self, verdict: Verdict) -> None:
        if not self._alive():
            verdict["lost"] = True
            raise _LostError

    def _alive(self) -> bool:
        return alive(self.device)


def _status(name: str, check: Check) -> str:
    if check.passed:
        return "ok"
    return "loose" if not is_ours(name) and check.error < ANOTHER_LAYER else "failed"


def _times(prefix: str, timing: Timing) -> Verdict:
    values = timing.median_ms, timing.p20_ms, timing.p80_ms
    names = f"{prefix or 'median_'}ms", f"{prefix}p20_ms", f"{prefix}p80_ms"
    return {name: f"{value:.4f}" for name, value in zip(names, values, strict=True)}
