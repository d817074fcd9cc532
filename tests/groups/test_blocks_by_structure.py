"""find_blocks and param_groups on models that are built as other libraries build theirs (timm, torchvision, torchtitan,
torchtune, nanoGPT, mamba), on adapters of PEFT, and on what is no transformer.
"""

import random
import time
import warnings
from collections import OrderedDict

import pytest
import torch
from lazy import transformers
from test_blocks import Holder, bart, names_of, numbered
from torch import nn

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradFreeze, LayerGradDrop, find_blocks, param_groups

SIZE = 4


def linear():
    return nn.Linear(SIZE, SIZE)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(SIZE, 3 * SIZE), linear()


class Mamba(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj, self.conv1d, self.out_proj = linear(), nn.Conv1d(SIZE, SIZE, 3), linear()


def mlp():
    return nn.Sequential(linear(), nn.GELU(), linear())


def vit_block():
    return Holder(norm1=nn.LayerNorm(SIZE), attn=Attention(), norm2=nn.LayerNorm(SIZE), mlp=mlp())


def conv_block():
    return Holder(conv1=nn.Conv2d(SIZE, SIZE, 1), conv2=nn.Conv2d(SIZE, SIZE, 3), norm=nn.BatchNorm2d(SIZE))


def convnext_block():
    return Holder(depthwise=nn.Conv2d(SIZE, SIZE, 7, groups=SIZE), norm=nn.LayerNorm(SIZE), mlp=mlp())


def many(build, count=3):
    return [build() for _ in range(count)]


def timm_vit():
    return Holder(patch_embed=Holder(proj=nn.Conv2d(3, SIZE, 4)), blocks=nn.Sequential(*many(vit_block)), head=linear())


def torchvision_vit():
    def block():
        attention = nn.MultiheadAttention(SIZE, 2)
        return Holder(ln_1=nn.LayerNorm(SIZE), self_attention=attention, ln_2=nn.LayerNorm(SIZE), mlp=mlp())

    layers = OrderedDict((f"encoder_layer_{number}", block()) for number in range(12))
    return Holder(conv_proj=nn.Conv2d(3, SIZE, 4), encoder=Holder(layers=nn.Sequential(layers)), heads=linear())


def cait():
    return Holder(
        blocks_token_only=nn.ModuleList(many(vit_block, 2)), blocks=nn.Sequential(*many(vit_block, 5)), head=linear()
    )


def swin(depths=(2, 2, 3, 1)):
    stages = [Holder(downsample=linear(), blocks=nn.Sequential(*many(vit_block, depth))) for depth in depths]
    return Holder(patch_embed=nn.Conv2d(3, SIZE, 4), layers=nn.Sequential(*stages))


def torchvision_swin():
    steps = [nn.Sequential(nn.Conv2d(3, SIZE, 4), nn.LayerNorm(SIZE))]
    for depth in (2, 3):
        steps += [nn.Sequential(*many(vit_block, depth)), Holder(reduction=linear(), norm=nn.LayerNorm(SIZE))]
    return Holder(features=nn.Sequential(*steps), head=linear())


def torchtitan():
    def block():
        attention = Holder(wq=linear(), wk=linear(), wv=linear(), wo=linear())
        feed_forward = Holder(w1=linear(), w2=linear(), w3=linear())
        return Holder(attention=attention, feed_forward=feed_forward, attention_norm=nn.RMSNorm(SIZE))

    layers = nn.ModuleDict({str(number): block() for number in range(11)})
    return Holder(tok_embeddings=nn.Embedding(5, SIZE), layers=layers, output=linear())


def torchtune_fusion():
    class TransformerSelfAttentionLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = Attention(), mlp()

    class FusionLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.fusion_layer = TransformerSelfAttentionLayer(), TransformerSelfAttentionLayer()

    layers = [TransformerSelfAttentionLayer(), FusionLayer(), TransformerSelfAttentionLayer()]
    return Holder(tok_embeddings=nn.Embedding(5, SIZE), layers=nn.ModuleList(layers))


def nano_gpt():
    parts = {"wte": nn.Embedding(5, SIZE), "h": nn.ModuleList(many(vit_block)), "ln_f": nn.LayerNorm(SIZE)}
    return Holder(transformer=nn.ModuleDict(parts), lm_head=linear())


def lucidrains():
    pairs = [nn.ModuleList([Attention(), Holder(net=mlp())]) for _ in range(3)]
    return Holder(transformer=Holder(layers=nn.ModuleList(pairs)), mlp_head=linear())


def mamba():
    return Holder(backbone=Holder(layers=nn.ModuleList(many(lambda: Holder(norm=nn.RMSNorm(SIZE), mixer=Mamba())))))


def hybrid():
    """Attention and Mamba layers in one list, with experts in some."""
    mixture = Holder(attn=Attention(), gate=linear(), experts=nn.ModuleList(many(lambda: Holder(w1=linear()), 8)))
    return Holder(layers=nn.ModuleList([vit_block(), Holder(norm=nn.RMSNorm(SIZE), mixer=Mamba()), mixture]))


def mlp_mixer():
    class MixerBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.mlp_tokens, self.mlp_channels = nn.LayerNorm(SIZE), mlp(), mlp()

    return Holder(stem=nn.Conv2d(3, SIZE, 4), blocks=nn.Sequential(*many(MixerBlock)), head=linear())


def detector():
    """A convolutional backbone, an encoder and a decoder, and lists of heads as long as the decoder."""
    return Holder(
        backbone=nn.Sequential(*many(conv_block)),
        class_embed=nn.ModuleList(many(linear)),
        bbox_embed=nn.ModuleList(many(lambda: Holder(layers=nn.ModuleList(many(linear))))),
        decoder=Holder(layers=nn.ModuleList(many(vit_block))),
        encoder=Holder(layers=nn.ModuleList(many(vit_block, 2))),
    )


def codec():
    codebooks = nn.ModuleList(many(lambda: Holder(codebook=nn.Embedding(5, SIZE), project=linear()), 8))
    trunk = Holder(layers=nn.ModuleList(many(vit_block)))
    return Holder(convolutions=nn.ModuleList(many(conv_block)), quantizer=Holder(layers=codebooks), transformer=trunk)


def multimodal():
    """The trunk is registered before the towers that it reads, as in Phi-4 multimodal."""
    tower = lambda: Holder(encoder=Holder(layers=nn.ModuleList(many(vit_block, 2))))
    inputs = Holder(image_embed=tower(), audio_embed=tower())
    return Holder(layers=nn.ModuleList(many(vit_block)), embed_tokens_extend=inputs)


def memory_attention():
    """Of SAM 2's kind: the feed-forward part's class says attention, too."""

    class MemoryAttentionMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = linear(), linear()

    layers = many(lambda: Holder(self_attn=Attention(), norm=nn.LayerNorm(SIZE), mlp=MemoryAttentionMLP()))
    return Holder(vision=nn.ModuleList(many(vit_block)), memory_attention=Holder(layers=nn.ModuleList(layers)))


def compiled_blocks():
    return Holder(blocks=nn.Sequential(*map(torch.compile, many(vit_block))))


def pipeline_stage():
    return Holder(layers=nn.ModuleList([nn.Identity(), nn.Identity(), *many(vit_block)]))


MODELS = {
    "timm's ViT": (timm_vit, numbered("blocks")),
    "torchvision's ViT": (torchvision_vit, [f"encoder.layers.encoder_layer_{number}" for number in range(12)]),
    "timm's CaiT": (cait, numbered("blocks_token_only", 2) + numbered("blocks", 5)),
    "timm's Swin": (
        swin, [f"layers.{stage}.blocks.{number}" for stage, depth in enumerate((2, 2, 3, 1)) for number in range(depth)]
    ),
    "torchvision's Swin": (torchvision_swin, numbered("features.1", 2) + numbered("features.3", 3)),
    "torchtitan": (torchtitan, numbered("layers", 11)),
    "torchtune's fusion": (torchtune_fusion, numbered("layers")),
    "nanoGPT": (nano_gpt, numbered("transformer.h")),
    "pairs in a list": (lucidrains, numbered("transformer.layers")),
    "Mamba": (mamba, numbered("backbone.layers")),
    "hybrid": (hybrid, numbered("layers")),
    "MLP-Mixer": (mlp_mixer, numbered("blocks")),
    "detector": (detector, numbered("encoder.layers", 2) + numbered("decoder.layers")),
    "codec": (codec, numbered("transformer.layers")),
    "multimodal": (
        multimodal,
        numbered("embed_tokens_extend.image_embed.encoder.layers", 2)
        + numbered("embed_tokens_extend.audio_embed.encoder.layers", 2)
        + numbered("layers"),
    ),
    "attention in every name": (memory_attention, numbered("vision") + numbered("memory_attention.layers")),
    "compiled blocks": (compiled_blocks, numbered("blocks")),
    "stage of a pipeline": (pipeline_stage, [f"layers.{number}" for number in (2, 3, 4)]),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_found(name):
    build, expected = MODELS[name]
    assert names_of(find_blocks(build())) == expected
    assert names_of(find_blocks(Holder(module=Holder(_orig_mod=build())))) == expected


def wav2vec2():
    """Its convolutions are declared as layers, its feature encoder is frozen in every recipe."""
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, num_feat_extract_layers=3,
        conv_dim=(8, 8, 8), conv_kernel=(10, 3, 1), conv_stride=(5, 2, 1), num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    model.freeze_feature_encoder()
    return model


def hugging_swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=4
    )
    return transformers.SwinForImageClassification(config)


def wav2vec2_and_bert():
    """Of a speech encoder and a text decoder."""
    text = transformers.BertConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return Holder(decoder=transformers.BertModel(text), encoder=wav2vec2().wav2vec2)


TRANSFORMERS = {
    "speech": (wav2vec2, numbered("wav2vec2.encoder.layers")),
    "stages": (hugging_swin, [*numbered("swin.encoder.layers.0.blocks", 2), "swin.encoder.layers.1.blocks.0"]),
    "both": (wav2vec2_and_bert, numbered("encoder.encoder.layers") + numbered("decoder.encoder.layer", 2)),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_are_found_among_what_transformers_declares(name):
    build, expected = TRANSFORMERS[name]
    assert names_of(find_blocks(build())) == expected


CONVOLUTIONAL = {
    "ResNet": lambda: Holder(layer1=nn.Sequential(*many(conv_block)), layer2=nn.Sequential(*many(conv_block))),
    "ConvNeXt": lambda: Holder(stages=nn.Sequential(*many(lambda: nn.Sequential(*many(convnext_block))))),
    "heads as well": lambda: Holder(
        stages=nn.ModuleList(many(conv_block)), heads=nn.ModuleList(many(lambda: Holder(linear=linear())))
    ),
    "attention of channels": lambda: nn.Sequential(
        *many(lambda: Holder(conv=conv_block(), attention=nn.Sequential(nn.Conv2d(SIZE, SIZE, 1), nn.Sigmoid())))
    ),
    "a list": lambda: Holder(blocks=nn.ModuleList(many(conv_block))),
}


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_convolutional_networks_have_no_blocks(name):
    model = Holder(trunk=CONVOLUTIONAL[name](), head=linear())
    with pytest.raises(ValueError, match=r"no clear transformer blocks: pass layers=\[.*Candidates: 'trunk"):
        find_blocks(model)
    with pytest.warns(UserWarning, match="Every matrix outside embeddings, head and pooler is masked"):
        groups = param_groups(model)
    kernels = [key for key, param in model.named_parameters() if param.dim() > 1 and "head" not in key]
    assert groups[0]["name"] == "matrices" and [key for key, _ in groups[0]["params"]] == kernels
    FusedGradDropAdamW(groups, mask=GradDrop(p=0.5))
    with pytest.raises(ValueError, match=r"drops whole transformer blocks: .*no clear transformer blocks.*layers=\["):
        FusedGradDropAdamW(groups, mask=LayerGradDrop(p=0.5))


def test_much_that_is_left_dense_is_told():
    model = timm_vit()
    inner = sum(param.numel() for param in model.blocks.parameters() if param.dim() > 1)
    model.neck = Holder(wide=nn.Linear(SIZE, inner // SIZE // 10 - 1), token=nn.Parameter(torch.zeros(9, 9)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a tenth is little; embeddings and heads do not count
        assert "notes" not in param_groups(model)[0]
    model.neck.more = linear()
    model.backbone = Holder(conv=nn.Conv2d(SIZE, SIZE, 3))
    words = r"^\d\d% of the trained matrix elements .*largest modules: 'backbone' \(\d+%\), 'neck' \(\d+%\)"
    with pytest.warns(UserWarning, match=words) as caught:
        groups = param_groups(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert str(caught[0].message) in FusedGradDropAdamW(groups).describe()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model, exclude=["neck.*", "backbone.*"])
        model.neck.requires_grad_(False)
        model.backbone.requires_grad_(False)
        param_groups(model)


def llama(layers=4, **sizes):
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def adapted(config, model=None, **arguments):
    peft = pytest.importorskip("peft")
    if not hasattr(peft, config):
        pytest.skip(f"this peft has no {config}")
    return peft.get_peft_model(model or llama(), getattr(peft, config)(task_type="CAUSAL_LM", **arguments))


LLAMA = numbered("base_model.model.model.layers", 4)
ADAPTERS = {
    "LoRA": (lambda: adapted("LoraConfig", r=2, target_modules=["q_proj", "up_proj"]), LLAMA),
    "LoRA on all": (lambda: adapted("LoraConfig", r=2, target_modules="all-linear"), LLAMA),
    "DoRA": (lambda: adapted("LoraConfig", r=2, use_dora=True), LLAMA),
    "some layers": (lambda: adapted("LoraConfig", r=2, layers_to_transform=[1, 3]), LLAMA[1::2]),
    "modules_to_save": (lambda: adapted("LoraConfig", r=2, modules_to_save=["lm_head"]), LLAMA),
    "a saved module in the layers": (
        lambda: adapted("LoraConfig", r=2, target_modules=["q_proj"], modules_to_save=["mlp"]), LLAMA
    ),
    "layer_replication": (
        lambda: adapted("LoraConfig", r=2, layer_replication=[[0, 3], [1, 4]]),
        numbered("base_model.model.model.layers", 6),
    ),
    "IA3": (
        lambda: adapted("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), LLAMA
    ),
    "prompt tuning": (lambda: adapted("PromptTuningConfig", num_virtual_tokens=3), []),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name):
    build, expected = ADAPTERS[name]
    model = build()
    groups = param_groups(model)
    blocks = [group for group in groups if "blocks" in group]
    assert [group["blocks"] for group in blocks] == [expected] * len(blocks) and bool(blocks) == bool(expected)
    assert {name for group in groups for name, _ in group["params"]} == {
        name for name, param in model.named_parameters() if param.requires_grad
    }
    # Every epoch unfreezes something, and in the end everything is trained.
    optimizer = FusedGradDropAdamW(groups, mask=GradFreeze(epochs=2))
    shares = []
    for epoch in range(2):
        optimizer.set_epoch(epoch)
        shares.append(optimizer.active_fraction()[0])
    assert not expected or 0 < shares[0] < shares[1] == 1


def test_adapters_that_share_weights_between_layers():
    model = adapted("LilyConfig", r=2, target_modules=["q_proj", "up_proj"], stride_A=2, num_B=2)
    owners = {}
    for block, module in find_blocks_of_frozen(model):
        for param in module.parameters():
            owners.setdefault(param, set()).add(block)
    assert any(param.requires_grad and len(blocks) > 1 for param, blocks in owners.items())
    with pytest.raises(ValueError, match="both hold the parameter .*lily.*share weights"):
        find_blocks(model)
    with pytest.warns(UserWarning, match="share weights"):
        groups = param_groups(model)
    matrices = {name for name, param in model.named_parameters() if param.requires_grad and param.dim() > 1}
    assert groups[0]["name"] == "matrices" and {name for name, _ in groups[0]["params"]} == matrices
    FusedGradDropAdamW(groups, mask=GradDrop(p=0.2))


def find_blocks_of_frozen(model):
    """The blocks, found while nothing is trained, so that nothing that is shared is in the way."""
    trained = [param for param in model.parameters() if param.requires_grad]
    for param in trained:
        param.requires_grad_(False)
    found = find_blocks(model)
    for param in trained:
        param.requires_grad_(True)
    return found


def test_only_trained_blocks_have_a_turn(seed):
    model = bart()
    blocks = find_blocks(model)
    idle = set(random.Random(seed).sample(names_of(blocks), 2))
    for name, module in blocks:
        module.requires_grad_(name not in idle)
    busy = [name for name in names_of(blocks) if name not in idle]
    patterns = ["model.*coder.layers.*"]
    optimizers = [
        FusedGradDropAdamW(param_groups(model), mask=GradFreeze(epochs=3, direction="bottom_up")),
        FusedGradDropAdamW(param_groups(model, layers=patterns), mask=GradFreeze(epochs=3, direction="bottom_up")),
        FusedGradDropAdamW(model.named_parameters(), mask=GradFreeze(epochs=3, direction="bottom_up", layers=patterns)),
    ]
    for optimizer in optimizers:
        assert optimizer.masking.blocks(0) == tuple(busy)
        for epoch in range(3):
            optimizer.set_epoch(epoch)
            for number, name in enumerate(busy):
                weight = f"{name}.self_attn.q_proj.weight"
                assert optimizer.mask(weight).all() if number <= epoch else not optimizer.mask(weight).any()
        lines = optimizer.describe().splitlines()
        assert any(line.startswith("note") and "nothing in them is trained: model." in line for line in lines)


def test_what_is_thawed_late_is_trained_and_drawn_by_its_name():
    model = timm_vit()
    model.blocks[1].requires_grad_(False)
    freeze = FusedGradDropAdamW(model.named_parameters(), mask=GradFreeze(epochs=2, layers=["blocks.*"]))
    drop = FusedGradDropAdamW(model.named_parameters(), mask=LayerGradDrop(p=0.5, layers=["blocks.*"]))
    model.blocks[1].requires_grad_(True)
    assert freeze.mask("blocks.1.mlp.0.weight").all() and not freeze.mask("blocks.0.mlp.0.weight").any()
    whole = FusedGradDropAdamW(param_groups(timm_vit()), mask=LayerGradDrop(p=0.5))
    for step in range(20):
        name = "blocks.1.mlp.0.weight"
        assert torch.equal(drop.mask(name, step), whole.mask(name, step))


def test_what_is_shared_but_frozen_is_not_shared():
    model = timm_vit()
    model.blocks[2] = model.blocks[0]
    model.blocks[0].requires_grad_(False)
    assert names_of(find_blocks(model)) == numbered("blocks")
    assert param_groups(model)[0]["blocks"] == ["blocks.1"]
    model.blocks[0].mlp.requires_grad_(True)
    with pytest.raises(ValueError, match="share weights"):
        find_blocks(model)


def test_large_models_take_no_time():
    experts = lambda: nn.ModuleList(many(lambda: Holder(w1=nn.Linear(1, 1), w2=nn.Linear(1, 1)), 64))
    with torch.device("meta"):
        layer = lambda: Holder(attn=Attention(), mlp=Holder(gate=linear(), experts=experts()))
        model = Holder(layers=nn.ModuleList(many(layer, 60)))
    took = []
    for _ in range(3):
        start = time.process_time()
        assert len(find_blocks(model)) == 60
        took.append(time.process_time() - start)
    assert min(took) < 2  # for 11,900 modules; a quarter of a second where nothing else runs
