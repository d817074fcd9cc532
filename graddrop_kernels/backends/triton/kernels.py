"""All kernels, with keys that do not depend on which of them is launched first.

Triton keeps what it has compiled under a hash of a function, its callees and the constants of both. It leaves out the
constants of a callee that has not been hashed yet. So another first kernel would mean other keys, and files on the disk
that are not found again. Here callees are hashed first.
"""

from typing import Any

from . import arithmetic, gradient, masks, norm, prologue, random, row, update

__all__ = ["hash_callees_first", "masks", "norm", "update"]
_CALLEES_FIRST = (arithmetic, random, row, gradient, prologue, norm, update, masks)


def hash_callees_first() -> None:
    """Hashes every function. Within a file a callee stands above what calls it."""
    for module in _CALLEES_FIRST:
        functions: list[Any] = [each for each in vars(module).values() if hasattr(each, "cache_key")]
        for function in functions:
            function.cache_key  # noqa: B018 a property, which Triton computes once


hash_callees_first()
