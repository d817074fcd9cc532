"""The triton backend. Its kernels are imported at the first launch: they need triton."""

from .launch import masked_adamw_, masks, sum_of_squares
from .probe import DEVICES, interpreted, unavailable

__all__ = ["DEVICES", "interpreted", "masked_adamw_", "masks", "sum_of_squares", "unavailable"]
