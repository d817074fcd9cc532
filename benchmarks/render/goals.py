"""The project's goals on a GPU, beside what was measured. The figures are ratios within one run."""

from collections.abc import Callable
from dataclasses import dataclass

LARGE = "step_gpu_xlmr_large"
MODES = ("float32", "bfloat16, float32 moments", "bfloat16")


def label(row: dict) -> str:
    return f"{row['name']} [{row['backend']}]" if row["backend"] else row["name"]


def measured(rows: list[dict], **wanted) -> list[dict]:
    """Returns the rows with figures that have these values."""
    return [row for row in rows if "error" not in row and all(row[key] == value for key, value in wanted.items())]


@dataclass(frozen=True)
class Goal:
    """``value`` takes the results of one machine, {benchmark: its JSON}; None if it was not measured."""

    text: str
    value: Callable[[dict], float | None]
    most: float | None = None
    least: float | None = None

    @property
    def bound(self) -> str:
        return f"at most {self.most:g}" if self.most is not None else f"at least {self.least:g}"

    def reached(self, value: float) -> bool:
        return value <= self.most if self.most is not None else value >= self.least


def _rows(results: dict, mode: str, **wanted) -> list[dict]:
    configs = results.get(LARGE, {}).get("configs", ())
    return measured([row for config in configs if config["mode"] == mode for row in config["rows"]], **wanted)


def _ours(mode: str, key: str, best: Callable = min) -> Callable[[dict], float | None]:
    """Returns the best backend's figure for GradDrop on XLM-R-large."""
    rows = lambda results: _rows(results, mode, name="GradDrop", kind="ours")
    return lambda results: best((row[key] for row in rows(results) if row[key] is not None), default=None)


def _against(mode: str, peer: str, peer_over_ours: bool) -> Callable[[dict], float | None]:
    """Returns GradDrop's time over a peer's, or the inverse."""

    def value(results: dict) -> float | None:
        own, peers = _ours(mode, "ratio")(results), _rows(results, mode, name=peer)
        if own is None or not peers:
            return None
        return peers[0]["ratio"] / own if peer_over_ours else own / peers[0]["ratio"]

    return value


def _host(moving: bool) -> Callable[[dict], float | None]:
    """Returns GradDrop's host time over that of torch fused."""

    def value(results: dict) -> float | None:
        rows = measured(results.get("host_gpu", {}).get("host", ()), moving=moving)
        ours = [row["seconds"] for row in rows if row["name"] == "GradDrop" and row["backend"]]
        fused = [row["seconds"] for row in rows if row["name"] == "torch fused"]
        return min(ours) / fused[0] if ours and fused else None

    return value


def _synchronizations(results: dict) -> float | None:
    rows = measured(results.get("host_gpu", {}).get("launches", ()), name="GradDrop")
    return min((row["synchronizations"] + bool(row["refused"]) for row in rows if row["backend"]), default=None)


def _replayed(results: dict) -> float | None:
    """Returns the share of captured policies that replay bit for bit, over all backends: the best does not hide the
    worst.
    """
    graphs = results.get("host_gpu", {}).get("graphs", ())
    return sum(row["identical"] is True for row in graphs) / len(graphs) if graphs else None


GOALS = (
    *(Goal(f"GradDrop, {mode}: time / torch fused", _ours(mode, "ratio"), most=1.0) for mode in MODES),
    Goal(f"GradDrop, {MODES[1]}: time / torch fused, all float32",
         _against(MODES[1], "torch fused, all float32", False), most=1.0),
    *(Goal(f"GradDrop, {mode}: share of copy bandwidth", _ours(mode, "of_copy", max), least=share)
      for mode, share in zip(MODES, (0.93, 0.90, 0.88))),
    *(Goal(f"GradDrop, {mode}: mask on / mask off", _ours(mode, "over_unmasked"), most=1.03) for mode in MODES),
    Goal("eager mask + torch fused / GradDrop, float32",
         _against("float32", "eager mask + torch fused", True), least=2.5),
    Goal("host time of 400 tensors, addresses fixed: time / torch fused", _host(False), most=0.33),
    Goal("host time of 400 tensors, addresses moving: time / torch fused", _host(True), most=0.5),
    Goal("synchronisations of a step", _synchronizations, most=0),
    Goal("share of captured steps that replay bit for bit", _replayed, least=1),
)  # fmt: skip


def judge(results: dict) -> list[tuple[Goal, float | None, bool | None]]:
    """Returns (goal, figure, whether it is reached); None, None if nothing was measured."""
    found = [(goal, goal.value(results)) for goal in GOALS]
    return [(goal, value, None if value is None else goal.reached(value)) for goal, value in found]
