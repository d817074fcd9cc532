"""find_blocks on real architectures (tiny, random weights), under wrappers, on hand-written models; what it refuses."""

import random
import subprocess
import sys

import pytest
import torch
from lazy import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from graddrop_kernels.groups.blocks import find_blocks, parameter_blocks
from graddrop_kernels.groups.names import block_of, match_layers
from graddrop_kernels.masks.names import canonical_module_name, canonical_name

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KEY_VALUE = {"num_key_value_heads": 1, **SPECIAL}


def classifier(config, **sizes):
    return transformers.AutoModelForSequenceClassification.from_config(getattr(transformers, config)(**sizes))


def causal(config, **sizes):
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))


def xlm_roberta():
    return classifier("XLMRobertaConfig", **SIZES)


def distilbert():
    return classifier("DistilBertConfig", vocab_size=40, dim=16, n_layers=3, n_heads=2, hidden_dim=24)


def deberta_v2():
    attention = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
    return classifier("DebertaV2Config", **SIZES, **attention, conv_kernel_size=3)


def modernbert():
    return classifier("ModernBertConfig", **SIZES, **SPECIAL, cls_token_id=1, sep_token_id=2)


def gpt2():
    return causal("GPT2Config", vocab_size=40, n_embd=16, n_layer=3, n_head=2, **SPECIAL)


def t5():
    depth = {"num_layers": 3, "num_decoder_layers": 2}
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_heads=2, **depth)
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
    )
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


def vit():
    sizes = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "max_position_embeddings")}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))


def albert(**groups):
    return classifier("AlbertConfig", **SIZES, embedding_size=8, **groups)


def torch_transformer():
    return nn.Transformer(16, 2, num_encoder_layers=3, num_decoder_layers=2, dim_feedforward=24, batch_first=True)


def torch_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(16))


class Block(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))
        self.norm = nn.LayerNorm(size)
        self.project = nn.Linear(size, size)
        self.experts = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(2))


class HandWritten(nn.Module):
    """Embedding, a stack, a list of heads: what nobody named as transformers does."""

    def __init__(self, depth=3, size=4):
        super().__init__()
        self.embed = nn.Embedding(7, size)
        self.stack = nn.ModuleList(Block(size) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Linear(size, 2) for _ in range(2))


class Holder(nn.Module):
    """A module with the given children, in the given order."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def numbered(stack, count=3):
    return [f"{stack}.{index}" for index in range(count)]


# name: (build, blocks, number of parameters, of them outside the blocks)
MODELS = {
    "xlm-roberta": (xlm_roberta, numbered("roberta.encoder.layer"), 57, 9),
    "bert": (lambda: classifier("BertConfig", **SIZES), numbered("bert.encoder.layer"), 57, 9),
    "roberta": (lambda: classifier("RobertaConfig", **SIZES), numbered("roberta.encoder.layer"), 57, 9),
    "distilbert": (distilbert, numbered("distilbert.transformer.layer"), 56, 8),
    "deberta-v2": (deberta_v2, numbered("deberta.encoder.layer"), 75, 15),
    "modernbert": (modernbert, numbered("model.layers"), 24, 7),
    "gpt2": (gpt2, numbered("transformer.h"), 40, 4),
    "llama": (lambda: causal("LlamaConfig", **SIZES, **KEY_VALUE), numbered("model.layers"), 30, 3),
    "qwen2": (lambda: causal("Qwen2Config", **SIZES, **KEY_VALUE), numbered("model.layers"), 39, 3),
    "qwen3": (lambda: causal("Qwen3Config", **SIZES, **KEY_VALUE, head_dim=8), numbered("model.layers"), 36, 3),
    "t5": (t5, numbered("encoder.block") + numbered("decoder.block", 2), 55, 3),
    "bart": (bart, numbered("model.encoder.layers") + numbered("model.decoder.layers", 2), 107, 7),
    "vit": (vit, numbered("vit.layers"), 56, 8),
    "nn.TransformerEncoder": (torch_encoder, numbered("layers"), 38, 2),
    "nn.Transformer": (torch_transformer, numbered("encoder.layers") + numbered("decoder.layers", 2), 76, 4),
    "hand-written": (HandWritten, numbered("stack"), 26, 5),
}


def names_of(blocks):
    return [name for name, _ in blocks]


@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_known_models(name):
    build, expected, total, outside = MODELS[name]
    model = build()
    blocks = find_blocks(model)
    assert names_of(blocks) == expected
    assert all(module is model.get_submodule(block) for block, module in blocks)

    owner = parameter_blocks(model, blocks)
    every = dict(model.named_parameters())
    for parameter_name, param in every.items():
        by_prefix = [block for block in expected if parameter_name.startswith(f"{block}.")]
        assert by_prefix == ([owner[id(param)]] if id(param) in owner else []), parameter_name
    assert set(owner) <= set(map(id, every.values()))
    assert (len(every), len(every) - len(owner)) == (total, outside)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_names_alone_give_the_same_blocks(name):
    build, expected, _, _ = MODELS[name]
    names = [parameter_name for parameter_name, _ in build().named_parameters()]
    patterns = list(dict.fromkeys(block.rpartition(".")[0] + ".*" for block in expected))
    assert match_layers(patterns, names) == expected
    assert match_layers(patterns[::-1], names[::-1]) == expected
    inside = [parameter_name for parameter_name in names if block_of(parameter_name, expected)]
    assert {block_of(parameter_name, expected) for parameter_name in inside} == set(expected)
    assert len(names) - len(inside) == MODELS[name][3]


WRAPPED = {
    "compiled": torch.compile,
    "checkpoint": checkpoint_wrapper,
    "fsdp-like": lambda module: Holder(_fsdp_wrapped_module=module),
    "fsdp-like of compiled": lambda module: Holder(_fsdp_wrapped_module=torch.compile(module)),
    "ddp-like": lambda module: Holder(module=module),
    "ddp-like of compiled": lambda module: Holder(module=torch.compile(module)),
}


@pytest.mark.parametrize("build", [xlm_roberta, t5, HandWritten, torch_transformer])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_model_keeps_its_block_names(wrapper, build):
    plain = names_of(find_blocks(build()))
    model = WRAPPED[wrapper](build())
    assert names_of(find_blocks(model)) == plain
    assert names_of(find_blocks(model, layers=plain[1:])) == plain[1:]


@pytest.mark.parametrize("build", [xlm_roberta, t5, HandWritten, torch_transformer])
@pytest.mark.parametrize("wrapper", list(WRAPPED)[:4])
def test_some_wrapped_blocks_keep_their_names(wrapper, build):
    model = build()
    plain = names_of(find_blocks(model))
    stack, _, last = plain[1].rpartition(".")
    blocks = model.get_submodule(stack)
    blocks[int(last)] = WRAPPED[wrapper](blocks[int(last)])
    assert names_of(find_blocks(model, list(blocks))) == [name for name in plain if name.startswith(f"{stack}.")]
    for layers in (None, plain):
        found = find_blocks(model, layers)
        assert names_of(found) == plain
        owner = parameter_blocks(model, found)
        for name, param in model.named_parameters():
            assert owner.get(id(param)) == block_of(canonical_name(name), plain), name


def test_peft_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    model = peft.get_peft_model(xlm_roberta(), config)
    blocks = find_blocks(model)
    assert names_of(blocks) == numbered("base_model.model.roberta.encoder.layer")
    owner = parameter_blocks(model, blocks)
    trained = {name: owner.get(id(param)) for name, param in model.named_parameters() if param.requires_grad}
    lora = {name: block for name, block in trained.items() if "lora_" in name}
    assert len(lora) == 3 * 2 * 2 and all(name.startswith(f"{block}.") for name, block in lora.items())
    assert {block for name, block in trained.items() if name not in lora} == {None}
    assert names_of(find_blocks(model, ["base_model.model.roberta.encoder.layer.*"])) == names_of(blocks)


@pytest.mark.parametrize("build", [xlm_roberta, bart, HandWritten])
def test_nesting_by_hand(build):
    plain = names_of(find_blocks(build()))
    adapters = nn.ModuleList([nn.Linear(2, 2)])
    nested = Holder(base_model=Holder(model=build()), adapters=adapters)
    assert names_of(find_blocks(nested)) == [f"base_model.model.{name}" for name in plain]


def test_layers_by_pattern():
    model = bart()
    assert names_of(find_blocks(model, "model.encoder.layers.*")) == numbered("model.encoder.layers")
    assert names_of(find_blocks(model, ["model.encoder.layers.[02]"])) == [
        "model.encoder.layers.0",
        "model.encoder.layers.2",
    ]
    assert names_of(find_blocks(model, ["model.*coder.layers.*", "model.encoder.layers.1"])) == MODELS["bart"][1]
    both = find_blocks(model, ["model.decoder.layers.*", model.model.encoder.layers[1]])
    assert names_of(both) == ["model.encoder.layers.1", *numbered("model.decoder.layers", 2)]
    first_decoder = model.model.decoder.layers[0]
    mixed = find_blocks(model, [first_decoder, model.model.encoder.layers[2], "model.encoder.layers.*"])
    assert names_of(mixed) == numbered("model.encoder.layers") + ["model.decoder.layers.0"]
    # The user's word goes first, also against what would be found.
    assert names_of(find_blocks(model, ["model.*coder"])) == ["model.encoder", "model.decoder"]


def test_layers_by_module_keep_their_order():
    model = bart()
    upside_down = [*reversed(model.model.decoder.layers), *model.model.encoder.layers]
    found = find_blocks(model, upside_down)
    assert names_of(found) == [*numbered("model.decoder.layers", 2)[::-1], *numbered("model.encoder.layers")]
    assert all(module is given for (_, module), given in zip(found, upside_down, strict=True))
    assert names_of(find_blocks(model, model.model.encoder.layers)) == numbered("model.encoder.layers")


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (["encoder.layers.*"], ["'encoder.layers.*' finds no block", "'model.encoder.layers.*'"]),
        (
            ["model.encoder.layers.*", "model.decoder.blocks.*"],
            ["'model.decoder.blocks.*'", "'model.decoder.layers.*'"],
        ),
        (["model.encoder.*.*.*.*.*.*"], ["finds no block"]),
        (["model.shared.weight"], ["finds no block"]),
        (["model.encoder.layers"], ["ModuleList 'model.encoder.layers'", "'model.encoder.layers.*'"]),
        (["model.encoder", "model.encoder.layers.*"], ["'model.encoder.layers.0' inside block 'model.encoder'"]),
        ([], ["layers is empty"]),
        ([nn.Linear(2, 2)], ["Linear that is no submodule"]),
    ],
)
def test_layers_that_cannot_be_meant(layers, words):
    with pytest.raises(ValueError) as error:
        find_blocks(bart(), layers)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("layers", [3, [3], [None], b"encoder.layer.*", {"encoder.layer.*": 1}, nn.Linear(2, 2)])
def test_layers_of_a_wrong_type(layers):
    with pytest.raises(TypeError, match=r"layers.*pass layers=\["):
        find_blocks(bart(), layers)


def test_model_of_a_wrong_type():
    with pytest.raises(TypeError, match="not list"):
        find_blocks(list(xlm_roberta().parameters()))


def test_module_given_twice_or_outside_its_model():
    model = HandWritten()
    with pytest.raises(ValueError, match=r"'stack\.0' and 'stack\.0' both hold .*layers="):
        find_blocks(model, [model.stack[0], model.stack[0]])
    with pytest.raises(ValueError, match="no submodule"):
        find_blocks(model, [model])
    with pytest.raises(ValueError, match=r"'stack\.1' and 'stack\.1\.project' both hold"):
        find_blocks(model, [model.stack[1], model.stack[1].project])


def test_decoder_registered_first_still_comes_last():
    stacks = {side: nn.ModuleList(Block() for _ in range(11)) for side in ("text_decoder", "text_encoder")}
    model = Holder(**stacks)
    expected = numbered("text_encoder", 11) + numbered("text_decoder", 11)
    assert names_of(find_blocks(model)) == expected
    assert names_of(find_blocks(model, ["*.*"])) == expected
    # The outermost word decides, as in a decoder made of a BERT.
    nested = Holder(decoder=Holder(bert=Holder(encoder=stacks["text_encoder"])), encoder=stacks["text_decoder"])
    assert names_of(find_blocks(nested)) == numbered("encoder", 11) + numbered("decoder.bert.encoder", 11)


@pytest.mark.parametrize("layers", [None, "stack.*"])
def test_block_that_wraps_a_module_keeps_what_it_adds(layers):
    model = Holder(
        stack=nn.ModuleList(Holder(module=nn.Linear(2, 2), gate=nn.Parameter(torch.ones(2))) for _ in range(2))
    )
    blocks = find_blocks(model, layers)
    assert names_of(blocks) == ["stack.0", "stack.1"]
    assert len(parameter_blocks(model, blocks)) == 2 * 3


def test_lists_that_are_not_stacks():
    tables = nn.ModuleList(nn.Embedding(3, 4) for _ in range(4))
    stack = nn.ModuleList(Block() for _ in range(2))
    mixed = nn.ModuleList([Block(), nn.Linear(4, 4)])
    single = nn.ModuleList([Block()])
    weights = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    assert names_of(find_blocks(Holder(a=tables, b=mixed, c=single, d=stack, e=weights))) == ["d.0", "d.1"]
    assert names_of(find_blocks(Holder(a=tables, e=weights))) == numbered("e", 4)
    with pytest.raises(ValueError, match=r"no clear transformer blocks.*'a' \(4 of Embedding\)"):
        find_blocks(Holder(a=tables))
    assert names_of(find_blocks(stack)) == ["0", "1"]
    # A list of one tower is looked into, and a list under two names is one list.
    assert names_of(find_blocks(Holder(towers=nn.ModuleList([Holder(stack=stack)]), again=stack))) == numbered(
        "towers.0.stack", 2
    )


def test_nothing_found_lists_the_candidates():
    single = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)])])
    model = Holder(
        mixed=nn.ModuleList([nn.Linear(2, 2), nn.ReLU()]), single=single, row=nn.Sequential(nn.Tanh(), nn.Tanh())
    )
    with pytest.raises(ValueError) as error:
        find_blocks(model)
    for word in [
        "Holder",
        "pass layers=[",
        "'mixed' (2 of Linear, ReLU)",
        "'single.0' (1 of Linear)",
        "'row' (2 of Tanh)",
    ]:
        assert word in str(error.value)
    halves = {half: nn.ModuleList(Block() for _ in range(2)) for half in ("attentions", "ffns")}
    with pytest.raises(ValueError, match=r"layers=.*'attentions' \(2 of Block\).*'ffns' \(2 of Block\)"):
        find_blocks(Holder(**halves))
    assert names_of(find_blocks(Holder(**halves), ["*.*"])) == numbered("attentions", 2) + numbered("ffns", 2)
    assert names_of(find_blocks(Holder(a=Holder(x=halves["ffns"]), b=Holder(x=halves["attentions"])))) == (
        numbered("a.x", 2) + numbered("b.x", 2)
    )
    with pytest.raises(ValueError, match="no ModuleList or Sequential"):
        find_blocks(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "groups",
    [
        {"num_hidden_groups": 1},
        {"num_hidden_groups": 2},
        {"num_hidden_groups": 1, "inner_group_num": 2},
    ],
)
def test_albert_is_refused(groups):
    stored = groups["num_hidden_groups"]
    with pytest.raises(ValueError, match=rf"runs 3 layers on {stored} stored group.*single elements.*layers=\["):
        find_blocks(albert(**groups))
    with pytest.raises(ValueError, match="share weights"):
        find_blocks(Holder(module=Holder(image=vit(), text=albert(**groups))))
    named = find_blocks(albert(**groups), ["albert.encoder.albert_layer_groups.*"])
    assert names_of(named) == numbered("albert.encoder.albert_layer_groups", stored)


def test_albert_without_sharing_is_a_stack():
    model = albert(num_hidden_groups=3)
    assert names_of(find_blocks(model)) == numbered("albert.encoder.albert_layer_groups")


def test_one_module_at_two_places_is_refused():
    block = Block()
    repeated = Holder(stack=nn.ModuleList([block, Block(), block]))
    for layers in (None, ["stack.*"], list(repeated.stack)):
        with pytest.raises(ValueError, match=r"'stack\.0' and 'stack\.[02]' both hold the parameter.*share weights"):
            find_blocks(repeated, layers)
    checkpointing = xlm_roberta()
    checkpointing.roberta.encoder.layer[2] = checkpointing.roberta.encoder.layer[0]
    with pytest.raises(ValueError, match=r"layer\.0' and 'roberta\.encoder\.layer\.2' both hold"):
        find_blocks(checkpointing)


def test_one_parameter_in_two_blocks_is_refused():
    model = gpt2()
    model.transformer.h[2].attn.c_proj.weight = model.transformer.h[1].attn.c_proj.weight
    for layers in (None, ["transformer.h.*"]):
        with pytest.raises(
            ValueError, match=r"h\.1' and 'transformer\.h\.2' both hold the parameter 'attn\.c_proj\.weight'"
        ):
            find_blocks(model, layers)
    assert names_of(find_blocks(model, ["transformer.h.[01]"])) == numbered("transformer.h", 2)


def test_tied_to_the_outside_is_outside():
    model = HandWritten()
    model.output = nn.Linear(4, 4)
    for block in model.stack[:2]:
        block.project.weight = model.output.weight
    model.shortcut = model.stack[2].norm
    owner = parameter_blocks(model, find_blocks(model))
    outside = {name for name, param in model.named_parameters() if id(param) not in owner}
    tied = {"stack.0.project.weight", "stack.2.norm.weight", "stack.2.norm.bias", "output.bias"}
    assert outside == tied | {"embed.weight"} | {f"heads.{i}.{key}" for i in range(2) for key in ("weight", "bias")}
    assert len(owner) == len(list(model.parameters())) - len(outside)


def test_alias_of_the_stack_is_not_outside():
    model = HandWritten()
    model.again = Holder(same=model.stack)
    owner = parameter_blocks(model, find_blocks(model))
    assert len(owner) == 3 * 7 and names_of(find_blocks(model)) == numbered("stack")
    checkpointing = xlm_roberta()
    checkpointing.again = checkpointing.roberta
    assert names_of(find_blocks(checkpointing)) == numbered("roberta.encoder.layer")


def test_checkpointing_layer_is_known_by_its_full_name():
    real = type("GradientCheckpointingLayer", (nn.Linear,), {"__module__": "transformers.modeling_layers"})
    namesake = type("GradientCheckpointingLayer", (nn.Linear,), {"__module__": "elsewhere"})
    layer, other = type("Layer", (real,), {}), type("Layer", (namesake,), {})
    model = Holder(a=layer(2, 2), b=nn.ModuleList([Block(), Block()]), c=Holder(d=layer(2, 2)))
    assert names_of(find_blocks(model)) == ["a", "c.d"]
    assert names_of(find_blocks(Holder(a=other(2, 2), b=model.b))) == ["b.0", "b.1"]


def test_match_layers():
    names = [
        "emb.weight",
        "module.enc.layer.10.w.weight",
        "enc._orig_mod.layer.9.w.weight",
        "enc.layer.norm.weight",
        "layer.0.w",
    ]
    assert match_layers(["enc.layer.*"], names) == ["enc.layer.9", "enc.layer.10", "enc.layer.norm"]
    assert match_layers(["enc.layer.1*"], names) == ["enc.layer.10"]
    assert match_layers("layer.*", names) == ["layer.0"]
    assert match_layers(["layer.*", "enc.layer.?"], reversed(names)) == ["layer.0", "enc.layer.9"]
    nested = ["encoder.decoder.0.w", "middle.1.w", "middle.0.w"]
    assert match_layers(["middle.*", "*.decoder.*"], nested) == ["encoder.decoder.0", "middle.0", "middle.1"]
    with pytest.raises(ValueError, match=r"'enc\.\*\.\*\.\*\.\*' finds no block"):
        match_layers(["enc.*.*.*.*"], names)
    with pytest.raises(ValueError, match=r"'layer'.*Nearest names: none: there are no names"):
        match_layers(["layer"], [])
    with pytest.raises(ValueError, match=r"'enc\.layer\.9' inside block 'enc\.layer'"):
        match_layers(["enc.layer.*", "enc.layer"], names[2:3])
    for wrong in (5, [5], [b"x"], None):
        with pytest.raises(TypeError, match="not a pattern"):
            match_layers(wrong, names)


def test_block_of():
    blocks = {"layer.1", "layer.10", "decoder.layer.1"}
    assert block_of("layer.1.weight", blocks) == "layer.1"
    assert block_of("layer.10.a.b.weight", blocks) == "layer.10"
    assert block_of("decoder.layer.1.weight", list(blocks)) == "decoder.layer.1"
    for name in ("layer.1", "layer.100.weight", "layer", "encoder.layer.1.weight", "xlayer.1.weight"):
        assert block_of(name, blocks) is None


def test_canonical_names(seed):
    random.seed(seed)
    wrappers = ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
    parts = random.choices(["submodule", "modules", "layer", "0", "orig_mod"], k=5)
    wrapped = list(parts)
    for _ in range(6):
        wrapped.insert(random.randrange(len(parts)), random.choice(wrappers))  # never after the parameter's own name
    assert canonical_name(".".join(wrapped)) == ".".join(parts)
    assert canonical_module_name(".".join(wrapped)) == ".".join(parts)
    assert canonical_module_name(".".join([*wrapped, random.choice(wrappers)])) == ".".join(parts)
    assert (canonical_name("module.module"), canonical_module_name("module"), canonical_module_name("")) == (
        "module",
        "",
        "",
    )


def test_works_without_transformers_and_says_nothing():
    code = """
import sys
sys.modules["transformers"] = None
from torch import nn
from graddrop_kernels.groups.blocks import find_blocks
from graddrop_kernels import param_groups
model = nn.Transformer(4, 2, 2, 2, 4, batch_first=True)
assert len(find_blocks(model)) == 4 and len(param_groups(model)) == 3
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "graddrop" not in done.stderr
