"""The verdict on one cell of the sweep: numerics first, then times side by side, never one of ours that failed."""

from __future__ import annotations

from .numerics import LayerReference, alive, check_layer, timeouts_at_once
from .providers import Case, build, inputs, oracle, plan, precision, runner
from .timing import measure


class Judge:
    """Checks every provider of a case, then times torch.nn and, if it passed, ours.

    torch.nn outside our tolerance is "loose": what it is compared with keeps its time, and its error stands beside it.
    """

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.reference = LayerReference()

    def __call__(self, case: Case, providers: list[str]) -> dict[str, dict[str, object]]:
        with precision(case.dtype):
            return self._judge(case, providers)

    def _judge(self, case: Case, providers: list[str]) -> dict[str, dict[str, object]]:
        verdicts: dict[str, dict[str, object]] = {}
        runs = {}
        try:
            exact = oracle(case)
            weights = exact.state_dict()
            x, dy = inputs(case, self.device)
            want = self.reference(case, exact, x, dy)
        except Exception as error:
            return {name: self._error(error, "reference: ") for name in providers}
        for name in providers:
            try:
                verdicts[name] = {"plan": self._label(case)} if name == "ours" else {}
                layer = build(name, case, weights, self.device)
                check = check_layer(layer, case, x, dy, want)
                verdicts[name] |= check.columns
                if name == "torch" and not check.passed:
                    verdicts[name]["status"] = "loose"
                if verdicts[name]["status"] != "failed":
                    runs[name] = runner(layer, case, x, dy)
            except Exception as error:
                refused = name == "ours" and case.engine != "auto" and isinstance(error, ValueError)
                verdicts[name] = {"status": "refused", "detail": _short(error)} if refused else self._error(error)
        del want
        try:
            timings = measure(runs, self.device, self.seconds) if runs else {}
            if "ours" in runs:  # a wait that ran out while it was timed is this case's
                with timeouts_at_once():
                    runs["ours"]()
        except Exception as error:
            return verdicts | {name: self._error(error, "timing: ") for name in runs}
        for name, timing in timings.items():
            verdicts[name] |= {
                "median_ms": f"{timing.median_ms:.4f}",
                "p20_ms": f"{timing.p20_ms:.4f}",
                "p80_ms": f"{timing.p80_ms:.4f}",
                "rounds": timing.rounds,
                "us_per_step": f"{timing.median_ms * 1e3 / case.seq / case.layers:.3f}",
                "ratio": f"{timings['torch'].median_ms / timing.median_ms:.3f}" if "torch" in timings else "",
            }
        return verdicts

    def _label(self, case: Case) -> str:
        found = plan(case, self.device)
        return "aten" if found is None else found.label

    def _error(self, error: Exception, where: str = "") -> dict[str, object]:
        lost = {} if alive(self.device) else {"lost": True}
        return {"status": "error", "detail": where + _short(error), **lost}


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
