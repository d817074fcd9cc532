"""PolicyBook: an optimizer's policies by their canonical JSON strings, which are stored in groups and checkpoints."""

import json
from typing import Any

from .blocks import GradFreeze, LayerGradDrop
from .elements import GaussianGradDrop, GradDrop, GradDropEpoch, RandomMask
from .fixed_mask import FixedMask
from .policy import _SCHEDULES, Policy
from .skip_update import SkipUpdate
from .train_rows import TrainRows
from .turns import CycleBlocks, SampleBlocks


class PolicyBook:
    """Keeps callable schedules and fixed masks, which a string cannot hold."""

    def __init__(self) -> None:
        self._by_json: dict[str, Policy] = {}

    def add(self, mask: Policy | str | None) -> str | None:
        """Adds a policy and returns its string. None stays None, and a string is checked.

        Raises:
            TypeError: ``mask`` is no policy.
            ValueError: a string that is no policy, or a second callable of the same name.
        """
        if mask is None:
            return None
        if isinstance(mask, str):
            self.get(mask)
            return mask
        if not isinstance(mask, Policy):
            raise TypeError(f"mask= must be a policy such as GradDrop(p=0.2), or None for plain AdamW; got {mask!r}")
        text = mask.to_json()
        if self._by_json.setdefault(text, mask) != mask:
            raise ValueError(
                f"two different callables p have one name, which a checkpoint could not tell apart: {text}; "
                "define them with def, by two names"
            )
        return text

    def get(self, text: str | None) -> Policy | None:
        """The policy of a string. Raises ValueError as ``policies.from_json`` does."""
        if text is None:
            return None
        if isinstance(text, Policy):
            raise TypeError(
                f"group['mask'] is the object {text!r}, and groups keep policies as text, for checkpoints: write "
                f"group['mask'] = {type(text).__name__}(...).to_json(), or give mask= when the group is made"
            )
        if text not in self._by_json:
            self._by_json[text] = from_json(text)
        return self._by_json[text]


def from_json(text: str) -> Policy:
    """Rebuilds a policy from its canonical string.

    Raises:
        ValueError: an unknown policy, or one that a string cannot hold (a callable p, a FixedMask). Pass the same one
            as ``mask=`` instead.
    """
    try:
        values = dict(json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text!r} is not a mask policy; pass an object such as GradDrop(p=0.2)") from error
    name = values.pop("policy", None)
    if name not in POLICIES:
        raise ValueError(f"unknown mask policy {name!r}; known are {', '.join(POLICIES)}")
    schedule: Any = values.get("p")
    if name == "FixedMask" or isinstance(schedule, dict) and schedule.get("schedule") == "callable":
        what = "a FixedMask" if name == "FixedMask" else f"the callable p {schedule.get('name')!r}"
        raise ValueError(
            f"{what} is not stored in a state dict; construct the optimizer with the same mask= before loading"
        )
    try:
        if isinstance(schedule, dict):
            schedule = dict(schedule)
            values["p"] = _SCHEDULES[schedule.pop("schedule", None)](**schedule)
        return POLICIES[name](**values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{text!r} is not a mask policy of this version: {error}") from error


POLICIES = {
    cls.__name__: cls
    for cls in (
        GradDrop, GaussianGradDrop, LayerGradDrop, GradDropEpoch, GradFreeze, FixedMask, RandomMask, SampleBlocks,
        CycleBlocks, TrainRows, SkipUpdate,
    )
}  # fmt: skip
