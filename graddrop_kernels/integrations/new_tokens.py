"""new_token_rows(): TrainRows for the tokens that were added to a language model."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..groups.names import canonical_name
from ..policies import TrainRows


def new_token_rows(model: nn.Module, old_vocab_size: int | None = None, rest: str = "dense") -> TrainRows:
    """Returns the policy that trains the rows of new tokens in the input embeddings and in the head, tied or not. Of
    their weights, and of a bias with an entry per token, all other rows stay as they are, bit for bit.

    Args:
        model: one of transformers, also wrapped or with adapters, after ``resize_token_embeddings()``, before FSDP1
            flattens it. Embeddings or heads with ``requires_grad=False`` are left out.
        old_vocab_size: the number of rows before new ones were added. Default: that of the checkpoint which the model
            was loaded from.
        rest: what becomes of all other parameters, see ``TrainRows``.

    Raises:
        TypeError: no model of transformers is in ``model``.
        ValueError: there are no rows after the first ``old_vocab_size``; the checkpoint is not to be found; neither
            embeddings nor head are trained.
    """
    inner = next((each for each in model.modules() if callable(getattr(each, "get_input_embeddings", None))), None)
    if inner is None:
        raise TypeError(
            f"new_token_rows: {type(model).__name__} has no get_input_embeddings(), as models of transformers have: "
            "name the rows yourself, with TrainRows({name: slice(old_vocab_size, None)})"
        )
    embeddings: Any = inner.get_input_embeddings()  # type: ignore[operator]  # callable, as was seen
    tables = [_shape(param) for param in embeddings.parameters() if len(_shape(param)) == 2]
    size = max((shape[0] for shape in tables), default=0)
    if old_vocab_size is None:
        old_vocab_size = _of_checkpoint(inner)
    if isinstance(old_vocab_size, bool) or not isinstance(old_vocab_size, int) or not 0 < old_vocab_size < size:
        raise ValueError(
            f"new_token_rows(old_vocab_size={old_vocab_size!r}) must be an int from 1 to {size - 1}, as the embeddings "
            f"have {size} rows: add the tokens with model.resize_token_embeddings(len(tokenizer)) first"
        )
    per_token = {id(param) for module in (embeddings, _head(inner)) for param in _trained(module, size)}
    names = [canonical_name(name) for name, param in model.named_parameters() if id(param) in per_token]
    if not names:
        raise ValueError(
            f"new_token_rows: neither the input embeddings of {type(model).__name__} nor its head are trained: set "
            "requires_grad=True of their weights (with PEFT: modules_to_save)"
        )
    return TrainRows({name: slice(old_vocab_size, None) for name in names}, rest)


def _head(model: Any) -> nn.Module | None:
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head


def _trained(module: nn.Module | None, size: int) -> Iterator[nn.Parameter]:
    """The parameters with a row per token."""
    for param in module.parameters() if module is not None else ():
        if param.requires_grad and _shape(param)[:1] == (size,):
            yield param


def _shape(param: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(param, "ds_shape", param.shape))  # DeepSpeed's stage 3 leaves an empty tensor


def _of_checkpoint(model: Any) -> int:
    config: Any = getattr(model, "config", None)
    path = getattr(config, "_name_or_path", "")
    try:
        saved: Any = type(config).from_pretrained(path, local_files_only=True) if path else None
    except (OSError, ValueError, AttributeError):
        saved = None
    if saved is None:
        raise ValueError(
            f"new_token_rows: the checkpoint {path!r} of the model is not to be found: give old_vocab_size=, the "
            "number of rows before the new tokens"
        )
    size: int = saved.get_text_config().vocab_size
    return size
