"""Examples -> numbers for a model, and its outputs -> predictions."""

from collections.abc import Callable, Sequence

from .examples import Example
from .tasks import Task


def encode(task: Task, examples: Sequence[Example], tokenizer, max_length: int, stride: int) -> list[dict]:
    """Features for ``transformers.Trainer``: dicts of ints and lists of ints; one an example, several for a long span.

    input_ids, attention_mask and token_type_ids if the tokenizer makes them; labels (start_positions and end_positions
    for spans), and "example", the index of the example, with what decode() needs; collator() leaves the rest out.

    Args:
        tokenizer: a fast tokenizer of transformers (``is_fast``).
        max_length: sub-words of an input, special ones included.
        stride: sub-words that two windows of a long context share; used for spans only.
    """
    raise NotImplementedError


def collator(task: Task, tokenizer) -> Callable[[list[dict]], dict]:
    """features -> a batch of int64 tensors, padded on the right to its longest feature."""
    raise NotImplementedError


def decode(task: Task, examples: Sequence[Example], features: Sequence[dict], logits):
    """Predictions: a label for each example (list[str]); of token tasks a list of tags for each (list[list[str]]),
    shorter than the words where the sentence was cut; of spans {guid: answer} (dict[str, str]).

    Args:
        logits: as ``Trainer.predict(...).predictions``: arrays (features, labels), (features, positions, labels), or
            for spans a pair (features, positions), of starts and ends.
    """
    raise NotImplementedError
