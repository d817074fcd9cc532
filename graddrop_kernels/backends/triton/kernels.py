"""All kernels, with keys that do not depend on which of them is launched first.

Triton keeps what it has compiled under a hash of a function, its callees and the constants of both. It leaves out the
constants of a callee that has not been hashed yet. So another first kernel would mean other keys, and files on the disk
that are not found again. Here callees are hashed first.
"""

from . import arithmetic, gradient, mask_gradients, masks, norm, prologue, random, row, update

__all__ = ["hash_callees_first", "mask_gradients", "masks", "norm", "update"]
_CALLEES_FIRST = (arithmetic, random, row, gradient, prologue, norm, mask_gradients, update, masks)


def hash_callees_first() -> None:
    """Hashes every function. Within a file a callee stands above what calls it."""
    for module in _CALLEES_FIRST:
        for each in vars(module).values():
            getattr(each, "cache_key", None)  # of Triton's functions, which compute it now and once


hash_callees_first()
