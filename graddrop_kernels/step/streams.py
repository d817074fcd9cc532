"""Streams: notices that two optimizers of a process draw the same masks for different parameters."""

import itertools
import weakref
from collections.abc import Mapping

_holders: weakref.WeakValueDictionary[int, "Streams"] = weakref.WeakValueDictionary()  # of each random stream's key
_steps = itertools.count()  # of all optimizers


class Streams:
    """The random streams of one optimizer. They are a function of seed and name, so another may have the same."""

    def __init__(self) -> None:
        self._rivals: weakref.WeakKeyDictionary[Streams, str] = weakref.WeakKeyDictionary()
        self._last_step: int | None = None

    def hold(self, names: Mapping[int, str]) -> None:
        """Notes that the optimizer draws from the streams with these keys, for the parameters of these names."""
        for key, name in names.items():
            other = _holders.get(key)
            if other is not None and other is not self:
                self._rivals[other] = other._rivals[self] = name
            _holders[key] = self

    def warning_of_step(self) -> str | None:
        """Counts a step. Returns a warning if another optimizer with one of these streams has stepped since the last
        one. An optimizer that merely came before this one, as in a search of hyper-parameters, is none of these.
        """
        last, self._last_step = self._last_step, next(_steps)
        if not self._rivals or last is None:
            return None
        for rival, name in self._rivals.items():
            if rival._last_step is not None and rival._last_step > last:
                return (
                    f"two optimizers are stepped in turn and draw the same masks or rounding: both have a parameter "
                    f"{name!r} under the same seed. Give each optimizer a seed of its own, or names that differ "
                    "([(name, parameter), ...]); in place of one optimizer per parameter use step_in_backward()"
                )
        return None
