"""WarnOnce: gives each warning of an optimizer once, at the line of the user's code that called it."""

import sys
import warnings


class WarnOnce:
    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, message: str | None) -> None:
        """Gives a warning unless it has been given before. Does nothing for None."""
        if message is not None and message not in self._given:
            self._given.add(message)
            frame, level = sys._getframe(), 1  # shown at the caller's line, however deep we are
            while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("graddrop_kernels", "torch"):
                frame, level = frame.f_back, level + 1
            warnings.warn(message, stacklevel=level)
