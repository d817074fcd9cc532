"""Canonical names: what keys a mask, whatever wraps the model."""

# DistributedDataParallel and most hand-made wrappers, torch.compile, FSDP1, torch's activation checkpointing.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def canonical_name(fqn: str) -> str:
    """Return the parameter name ``fqn`` without wrapper components, at any depth.

    Only whole components count (``submodule.`` is kept), and the last one, the parameter's own name, always stays.
    """
    *path, last = fqn.split(".")
    return ".".join([part for part in path if part not in WRAPPERS] + [last])


def canonical_module_name(fqn: str) -> str:
    """As ``canonical_name``, for a module. Its last component may be a wrapper too (``layer.0._orig_mod``)."""
    return canonical_name(f"{fqn}.").removesuffix(".")
