"""TrainRows: trains the rows of a parameter that the user names (beyond the paper)."""

from collections.abc import Hashable, Mapping
from typing import Any

from ..masks.names import canonical_name
from ..masks.plan import MaskPlan
from .clock import PlanContext
from .policy import KEEP, Policy
from .rows import NO_ROWS, Rows

LEFT_OUT = "rows that are not trained"  # the unit of their elements, where a step must know them


class TrainRows(Policy):
    """Trains only the given rows of some parameters, in every step: new tokens of an embedding and its head, classes of
    a classifier, experts that are stacked in one tensor. All other rows stay as they are, bit for bit.

    The step does not touch those rows. Of a parameter that is not sharded, moments and masters exist for the trained
    rows only, with shape (trained rows, ...).

    Args:
        rows: {parameter name: its rows to train}. Rows are indices of dimension 0: a slice, ints, a bool vector with an
            entry per row, or text such as ``"5,17,128256:"``. Names of a wrapped or compiled model (``module.``,
            ``_orig_mod.``) are taken too. Tied weights are one parameter, of the name it has in
            ``model.named_parameters()``.
        rest: what becomes of the parameters that are not named: ``"dense"`` trains them, ``"frozen"`` leaves them.

    Raises:
        ValueError: no parameters, no or unusable rows, another ``rest``. Names and rows are compared with the
            parameters when the optimizer is made.
    """

    masked = "frozen"
    takes_any_masked = False  # other rows are not stepped
    follows_epochs = False
    draws = None

    def __init__(self, rows: Mapping[str, Any], rest: str = "dense"):
        if not isinstance(rows, Mapping) or not rows:
            raise ValueError(f"TrainRows(rows=) must be a non-empty mapping from parameter names to rows, got {rows!r}")
        if rest not in ("dense", "frozen"):
            raise ValueError(f"TrainRows(rest=) must be 'dense' or 'frozen', got {rest!r}")
        if others := [name for name in rows if not isinstance(name, str)]:
            raise ValueError(f"TrainRows(rows=) has the key {others[0]!r}: give the name of a parameter")
        if len(set(map(canonical_name, rows))) < len(rows):
            raise ValueError("TrainRows(rows=) names a parameter twice, with and without a wrapper's name: leave one")
        self.rest = rest
        self.rows: dict[str, Rows] = {}
        for name, given in rows.items():
            try:
                self.rows[canonical_name(name)] = Rows.parse(given)
            except ValueError as error:
                raise ValueError(f"TrainRows(rows=), parameter {name!r}: {error}") from None
        self._json = super().to_json()  # once, as it is long if the rows are many

    def rows_of(self, name: str) -> Rows | None:
        return self.rows.get(name, NO_ROWS if self.rest == "frozen" else None)

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(self.rows)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not shape:
            raise ValueError(f"TrainRows: {name!r} is a scalar and has no rows: leave it out")
        try:
            self.rows[name].runs(shape[0])
        except ValueError as error:
            raise ValueError(f"TrainRows: {name!r} of shape {shape} is given {error}") from None

    def plan(self, context: PlanContext, unit: Hashable) -> MaskPlan:
        return MaskPlan("off", frozen=True) if unit == LEFT_OUT else KEEP

    def counts_steps(self, frozen: bool) -> bool:
        return False

    def to_json(self) -> str:
        return self._json

    def _values(self) -> dict[str, Any]:
        return {"rows": {name: str(rows) for name, rows in self.rows.items()}, "rest": self.rest}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainRows) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __repr__(self) -> str:
        rows = ", ".join(f"{name!r}: {_short(str(rows))!r}" for name, rows in self.rows.items())
        return f"TrainRows({{{rows}}}, rest={self.rest!r})"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40].rpartition(',')[0]},..."
