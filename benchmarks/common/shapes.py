"""Shapes to step: the parameters of real models, from the plain numbers of their configurations, and flat splits.

A test compares names, shapes and totals with what transformers builds on the meta device.
"""

from collections.abc import Callable
from dataclasses import dataclass

LAYERS = 25  # of ``encoder``
Named = tuple[str, str | None, tuple[int, ...]]  # name, block (None: outside the blocks), shape


def xlm_roberta(layers: int, hidden: int, vocabulary: int = 250_002, positions: int = 514) -> list[Named]:
    """XLMRobertaModel with its pooler. The feed-forward layer is 4 times as wide as the others."""
    found: list[Named] = [
        ("embeddings.word_embeddings.weight", None, (vocabulary, hidden)),
        ("embeddings.token_type_embeddings.weight", None, (1, hidden)),
        ("embeddings.LayerNorm.weight", None, (hidden,)),
        ("embeddings.LayerNorm.bias", None, (hidden,)),
        ("embeddings.position_embeddings.weight", None, (positions, hidden)),
    ]
    linear = {
        **{f"attention.{name}": (hidden, hidden) for name in ("self.query", "self.key", "self.value", "output.dense")},
        "attention.output.LayerNorm": (hidden,),
        "intermediate.dense": (4 * hidden, hidden),
        "output.dense": (hidden, 4 * hidden),
        "output.LayerNorm": (hidden,),
    }
    for block in (f"encoder.layer.{i}" for i in range(layers)):
        for name, shape in linear.items():
            found += [(f"{block}.{name}.weight", block, shape), (f"{block}.{name}.bias", block, shape[:1])]
    return [*found, ("pooler.dense.weight", None, (hidden, hidden)), ("pooler.dense.bias", None, (hidden,))]


def encoder(numel: int) -> list[Named]:
    """Returns 25 layers of XLM-R, 400 tensors, of the width that comes nearest to ``numel`` parameters: 576 for
    100M.
    """
    hidden = max(8, round((numel / LAYERS / 12) ** 0.5 / 8) * 8)
    return [named for named in xlm_roberta(LAYERS, hidden) if named[1] is not None]


def llama(layers: int, hidden: int, feed_forward: int, key_values: int, vocabulary: int) -> list[Named]:
    """LlamaForCausalLM with tied embeddings. ``key_values``: heads of keys times the size of a head."""
    found: list[Named] = [("model.embed_tokens.weight", None, (vocabulary, hidden))]
    for block in (f"model.layers.{i}" for i in range(layers)):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (key_values, hidden),
            "self_attn.v_proj": (key_values, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (feed_forward, hidden),
            "mlp.up_proj": (feed_forward, hidden),
            "mlp.down_proj": (hidden, feed_forward),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found += [(f"{block}.{name}.weight", block, shape) for name, shape in shapes.items()]
    return [*found, ("model.norm.weight", None, (hidden,))]


def flat(numel: int, tensors: int = 1) -> list[Named]:
    """Splits ``numel`` elements into equal vectors; the last takes the remainder. No blocks."""
    size = numel // tensors
    sizes = [size] * (tensors - 1) + [numel - size * (tensors - 1)]
    return [(f"weight{i}", None, (n,)) for i, n in enumerate(sizes)]


@dataclass(frozen=True)
class Work:
    """A set of tensors to step, and the same on a scale that runs anywhere (the rehearsal)."""

    label: str
    tensors: Callable[[], list[Named]]
    small: Callable[[], list[Named]]


WORK = {
    "xlmr_large": Work("XLM-R-large", lambda: xlm_roberta(24, 1024), lambda: xlm_roberta(4, 16, 50, 8)),
    "xlmr_base": Work("XLM-R-base", lambda: xlm_roberta(12, 768), lambda: xlm_roberta(2, 8, 50, 8)),
    "llama_1b": Work(
        "Llama-3.2-1B", lambda: llama(16, 2048, 8192, 512, 128_256), lambda: llama(2, 16, 64, 8, 50)
    ),
    "one_tensor": Work("one tensor", lambda: flat(500_000_000), lambda: flat(5003)),
}  # fmt: skip
SIZES = (100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000)  # elements of one tensor
COUNTS = (1, 4, 16, 64, 256, 1000, 4000)  # tensors
COUNT_TOTALS = (4_000_000, 100_000_000)  # elements in all of them: of 4000 tensors, each has 1000 or 25 000
