"""The triton backend. Its kernels are imported at the first launch: they need triton."""

from .launch import bucket_planes, keep_mask, masked_adamw_, sum_of_squares
from .probe import DEVICES, interpreted, unavailable

__all__ = ["DEVICES", "bucket_planes", "interpreted", "keep_mask", "masked_adamw_", "sum_of_squares", "unavailable"]
