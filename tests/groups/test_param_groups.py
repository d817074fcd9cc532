"""param_groups: every trainable parameter once, in the right one of four groups, and clear refusals."""

import copy
import math
import random

import pytest
import torch
from lazy import transformers
from test_blocks import MODELS, Block, HandWritten, Holder, albert, gpt2, numbered, t5, xlm_roberta
from torch import nn

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradFreeze, LayerGradDrop
from graddrop_kernels.groups.param_groups import param_groups

ORDER = ["blocks", "blocks_no_decay", "dense", "dense_no_decay"]


def by_name(groups):
    return {group["name"]: group for group in groups}


def names_in(groups, *which):
    groups = by_name(groups)
    return [name for key in which if key in groups for name, _ in groups[key]["params"]]


def where(groups):
    """{parameter name: group name}; fails if a parameter comes twice."""
    place = [(name, group["name"]) for group in groups for name, _ in group["params"]]
    assert len(dict(place)) == len(place)
    return dict(place)


def check_form(groups, blocks, weight_decay):
    """What must hold for the groups of any model."""
    assert [group["name"] for group in groups] == [name for name in ORDER if name in by_name(groups)]
    for group in groups:
        assert group["params"]
        assert type(group["weight_decay"]) is float
        assert group["weight_decay"] == (0.0 if group["name"].endswith("no_decay") else weight_decay)
        if group["name"].startswith("dense"):
            assert set(group) == {"name", "params", "weight_decay", "mask"} and group["mask"] is None
        else:
            assert set(group) == {"name", "params", "weight_decay", "blocks", "param_blocks"}
            assert group["blocks"] == blocks
            assert len(group["param_blocks"]) == len(group["params"])
            for (name, _), block in zip(group["params"], group["param_blocks"], strict=True):
                assert name.startswith(f"{block}.") and block in blocks


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_once(name):
    build, blocks, total, outside = MODELS[name]
    model = build()
    groups = param_groups(model, weight_decay=0.07)
    check_form(groups, blocks, 0.07)
    every = dict(model.named_parameters())
    place = where(groups)
    assert set(place) == set(every) and len(place) == total
    assert all(param is every[name] for group in groups for name, param in group["params"])
    assert {name for name in every if place[name].startswith("blocks")} == {
        name for name in every if any(name.startswith(f"{block}.") for block in blocks)
    }
    assert sum(group.startswith("dense") for group in place.values()) == outside
    for group in groups:
        assert [name for name, _ in group["params"]] == [name for name in every if place[name] == group["name"]]


@pytest.mark.parametrize("name", MODELS)
def test_decay_split_is_the_trainers(name):
    model = MODELS[name][0]()
    decaying = transformers.Trainer.get_decay_parameter_names(None, model)
    every = [parameter for parameter, _ in model.named_parameters()]
    groups = param_groups(model)
    assert set(names_in(groups, "blocks", "dense")) == set(decaying) & set(every)
    assert set(names_in(groups, "blocks_no_decay", "dense_no_decay")) == set(every) - set(decaying)


def test_all_of_a_small_model():
    groups = param_groups(HandWritten(depth=2), weight_decay=0.3)
    inner = ["scale", "project.weight", "experts.0.weight", "experts.1.weight"]
    assert {group["name"]: [name for name, _ in group["params"]] for group in groups} == {
        "blocks": [f"stack.{i}.{name}" for i in range(2) for name in inner],
        "blocks_no_decay": [
            f"stack.{i}.{name}" for i in range(2) for name in ("norm.weight", "norm.bias", "project.bias")
        ],
        "dense": ["embed.weight", "heads.0.weight", "heads.1.weight"],
        "dense_no_decay": ["heads.0.bias", "heads.1.bias"],
    }
    for group, group_size in zip(groups[:2], (4, 3), strict=True):
        assert group["param_blocks"] == ["stack.0"] * group_size + ["stack.1"] * group_size
    assert groups[0]["blocks"] is not groups[1]["blocks"]


def scales(class_name, base=nn.Module):
    """A module of a class with this name and one parameter, `gain`."""
    module = type(class_name, (base,), {})()
    module.gain = nn.Parameter(torch.ones(3))
    return module


def test_what_counts_as_a_norm():
    class Affine(nn.LayerNorm):
        pass

    norms = {
        "a": nn.RMSNorm(4),
        "b": Affine(4),
        "c": nn.BatchNorm1d(4),
        "d": nn.GroupNorm(2, 4),
        "e": scales("ScaleNorm"),
        "f": scales("FrozenNorm2d"),
        "g": scales("MambaRMSNormGated"),
        "norm": scales("Scale"),
        "q_norm": scales("Scale"),
        "InputLayerNorm": scales("Scale"),
        "myrmsnorm2": scales("Scale"),
    }
    others = {
        "h": scales("PreNormMixer"),
        "normalizer": scales("Scale"),
        "subnorm": scales("Normalizer"),
        "norm2": scales("S"),
    }
    model = Holder(stack=nn.ModuleList([Block(), Block()]), out=Holder(**norms, **others))
    place = where(param_groups(model))
    for name, _ in model.out.named_parameters():
        assert place[f"out.{name}"] == ("dense_no_decay" if name.split(".")[0] in norms else "dense"), name


def test_tied_head_is_an_embedding():
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    place = where(param_groups(model))
    assert place["transformer.wte.weight"] == "dense" and "lm_head.weight" not in place


def test_tied_to_the_outside_is_dense():
    model = HandWritten()
    model.stack[1].project.weight = nn.Parameter(torch.zeros(4, 4))
    model.output = nn.Linear(4, 4, bias=False)
    model.output.weight = model.stack[1].project.weight
    place = where(param_groups(model))
    assert place["stack.1.project.weight"] == "dense" and place["stack.0.project.weight"] == "blocks"


def test_t5_position_bias_is_block_zeros():
    groups = by_name(param_groups(t5()))
    of_block = {
        name: block
        for (name, _), block in zip(groups["blocks_no_decay"]["params"], groups["blocks_no_decay"]["param_blocks"])
    }
    for side in ("encoder", "decoder"):
        assert of_block[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == f"{side}.block.0"
    assert names_in(groups.values(), "dense") == ["shared.weight"]
    assert names_in(groups.values(), "dense_no_decay") == [
        f"{side}.final_layer_norm.weight" for side in ("encoder", "decoder")
    ]


def test_exclude():
    model = xlm_roberta()
    plain = where(param_groups(model))
    groups = param_groups(model, exclude=["*.bias", "roberta.encoder.layer.1.*"])
    check_form(groups, numbered("roberta.encoder.layer"), 1e-2)
    for name, group in where(groups).items():
        dense = name.endswith(".bias") or name.startswith("roberta.encoder.layer.1.")
        assert group == (plain[name].replace("blocks", "dense") if dense else plain[name]), name
    assert where(param_groups(model, exclude="*.bias")) == where(param_groups(model, exclude=("*.bias",)))
    # Layer 1 is not layer 10, and a pattern is the whole name.
    deep = HandWritten(depth=11)
    moved = {
        name for name, group in where(param_groups(deep, exclude=["stack.1.*"])).items() if group.startswith("dense")
    }
    assert moved - set(names_in(param_groups(deep), "dense", "dense_no_decay")) == {
        name for name, _ in deep.named_parameters() if name.startswith("stack.1.")
    }
    # All excluded: the optimizer gets plain AdamW groups.
    assert {group["name"] for group in param_groups(model, exclude=["*"])} == {"dense", "dense_no_decay"}


@pytest.mark.parametrize(
    ("exclude", "words"),
    [
        (["embeding"], ["'embeding'", "no whole parameter name", "Nearest names: 'embed.weight'"]),
        (["*.bias", "stack.*.projct.weight"], ["'stack.*.projct.weight'", "'stack.*.project.weight'"]),
        (["STACK*"], ["'STACK*'", "Nearest names: "]),
        (["heads"], ["'heads'", "'heads.*.bias'"]),
        ("", ["''"]),
    ],
)
def test_exclude_that_matches_nothing(exclude, words):
    with pytest.raises(ValueError) as error:
        param_groups(HandWritten(), exclude=exclude)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("exclude", [None, 3, [3], [nn.Linear(2, 2)], b"x"])
def test_exclude_of_a_wrong_type(exclude):
    with pytest.raises(TypeError, match="exclude must be patterns"):
        param_groups(HandWritten(), exclude=exclude)


@pytest.mark.parametrize("weight_decay", [0, 0.0, 2, 0.25])
def test_weight_decay(weight_decay):
    groups = param_groups(HandWritten(), weight_decay=weight_decay)
    check_form(groups, numbered("stack"), float(weight_decay))
    assert [group["name"] for group in groups] == ORDER
    optimizer = torch.optim.AdamW(groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [weight_decay, 0, weight_decay, 0]


@pytest.mark.parametrize("weight_decay", [-1e-9, math.nan, math.inf])
def test_weight_decay_out_of_range(weight_decay):
    with pytest.raises(ValueError, match=rf"finite and at least 0, not {weight_decay}"):
        param_groups(HandWritten(), weight_decay=weight_decay)


@pytest.mark.parametrize("weight_decay", [None, "0.1", True, [0.1]])
def test_weight_decay_of_a_wrong_type(weight_decay):
    with pytest.raises(TypeError, match="weight_decay must be a float"):
        param_groups(HandWritten(), weight_decay=weight_decay)


def test_model_of_a_wrong_type():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        param_groups(HandWritten().parameters())


def test_layers():
    model = HandWritten(depth=4)
    with pytest.warns(UserWarning, match=r"50% .* 'stack\.0' \(25%\), 'stack\.3' \(25%\)"):
        groups = param_groups(model, layers=["stack.[12]"])
    groups[0].pop("notes")
    check_form(groups, ["stack.1", "stack.2"], 1e-2)
    assert where(groups)["stack.0.project.weight"] == "dense" and where(groups)["stack.2.project.weight"] == "blocks"
    assert param_groups(model, layers=[model.stack[2], model.stack[1]])[0]["blocks"] == ["stack.2", "stack.1"]
    with pytest.raises(ValueError, match=r"'stac\.\*'.*'stack\.\*'"):
        param_groups(model, layers=["stac.*"])


def test_frozen_parameters_are_left_out():
    model = xlm_roberta()
    model.roberta.embeddings.requires_grad_(False)
    model.roberta.encoder.layer[0].requires_grad_(False)
    groups = param_groups(model)
    assert groups[0].pop("notes") == [
        "blocks without a turn in schedules, since nothing in them is trained: roberta.encoder.layer.0"
    ]
    check_form(groups, numbered("roberta.encoder.layer")[1:], 1e-2)
    assert set(where(groups)) == {name for name, param in model.named_parameters() if param.requires_grad}
    assert set(groups[0]["param_blocks"]) == {"roberta.encoder.layer.1", "roberta.encoder.layer.2"}
    model.roberta.encoder.requires_grad_(False)
    assert {group["name"] for group in param_groups(model)} == {"dense", "dense_no_decay"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="XLMRobertaForSequenceClassification has requires_grad=True"):
        param_groups(model)


def test_peft_lora():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(xlm_roberta(), peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    groups = param_groups(model)
    check_form(groups, numbered("base_model.model.roberta.encoder.layer"), 1e-2)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert set(where(groups)) == trained and len(trained) == 6 + 4
    assert set(names_in(groups, "blocks", "blocks_no_decay")) == {name for name in trained if ".lora_" in name}
    assert all(".classifier.modules_to_save." in name for name in names_in(groups, "dense", "dense_no_decay"))


@pytest.mark.parametrize(
    "wrap", [torch.compile, lambda model: Holder(module=model), lambda model: Holder(_orig_mod=model)]
)
def test_wrappers_leave_no_trace(wrap):
    model = xlm_roberta()
    assert where(param_groups(wrap(model), exclude=["*.LayerNorm.*"])) == where(
        param_groups(model, exclude=["*.LayerNorm.*"])
    )


def test_one_canonical_name_for_two_parameters():
    model = HandWritten()
    model.module = Holder(embed=nn.Embedding(2, 4))
    with pytest.raises(ValueError, match=r"two parameters are called 'embed\.weight'.*module\.embed\.weight.*rename"):
        param_groups(model)


@pytest.mark.parametrize("groups_stored", [1, 2])
def test_albert_is_masked_by_its_matrices(groups_stored):
    model = albert(num_hidden_groups=groups_stored)
    words = "share weights.*Every matrix outside embeddings, head and pooler is masked"
    with pytest.warns(UserWarning, match=words) as caught:
        groups = by_name(param_groups(model, exclude=["*.full_layer_layer_norm.*", "*.ffn_output.weight"]))
    assert len(caught) == 1 and caught[0].filename == __file__
    layers = [f"albert.encoder.albert_layer_groups.{group}.albert_layers.0" for group in range(groups_stored)]
    inner = ["attention.query", "attention.key", "attention.value", "attention.dense", "ffn"]
    assert names_in(groups.values(), "matrices") == [f"{layer}.{name}.weight" for layer in layers for name in inner]
    assert "matrices_no_decay" not in groups and "blocks" not in groups["matrices"]
    assert set(where(groups.values())) == {name for name, _ in model.named_parameters()}
    optimizer = FusedGradDropAdamW(list(groups.values()), mask=GradDrop(p=0.5))
    assert optimizer.active_fraction() == [0.5, 1.0, 1.0]
    assert "Every matrix outside embeddings" in optimizer.describe()
    for policy in (LayerGradDrop(p=0.5), GradFreeze(epochs=2)):
        words = rf"drops whole transformer blocks: .*runs 3 layers on {groups_stored} .*layers="
        with pytest.raises(ValueError, match=words):
            FusedGradDropAdamW(list(groups.values()), mask=policy)
    named = param_groups(model, layers=["albert.encoder.albert_layer_groups.*"])
    check_form(named, numbered("albert.encoder.albert_layer_groups", groups_stored), 1e-2)


def test_torch_optimizer_takes_the_groups_and_nothing_is_changed(capfd):
    model = HandWritten()
    before = copy.deepcopy(model.state_dict())
    groups = param_groups(model, weight_decay=0.1, exclude=["*.experts.*"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = [[name for name, _ in group["params"]] for group in groups]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    assert [group["param_names"] for group in optimizer.param_groups] == expected
    assert [group.get("mask", "own") for group in optimizer.param_groups] == ["own", "own", None, None]
    again = param_groups(model, weight_decay=0.1, exclude=["*.experts.*"])
    assert [[name for name, _ in group["params"]] for group in again] == expected
    assert capfd.readouterr() == ("", "")


def test_random_model_loses_nothing(seed):
    """Random depth, freezing, ties and exclusions, against rules written once more from the names."""
    rng = random.Random(seed)
    model = HandWritten(depth=rng.randint(2, 12))
    depth = len(model.stack)
    tied = f"stack.{rng.randrange(depth)}"
    model.output = nn.Linear(4, 4)
    model.output.weight = model.get_submodule(tied).project.weight
    for param in model.parameters():
        param.requires_grad_(rng.random() < 0.7)
    model.embed.weight.requires_grad_(True)
    drop = f"stack.{rng.randrange(depth)}"
    weight_decay = rng.random()
    groups = param_groups(Holder(module=model), weight_decay=weight_decay, exclude=[f"{drop}.*"])
    trained = {".".join(name.split(".")[:2]) for name, param in model.named_parameters() if param.requires_grad}
    groups[0].pop("notes", None)
    check_form(groups, [block for block in numbered("stack", depth) if block in trained], weight_decay)
    expected = {}
    for name, param in model.named_parameters():
        inside = name.startswith("stack.") and not name.startswith(f"{drop}.") and name != f"{tied}.project.weight"
        slow = name.endswith("bias") or ".norm." in name
        if param.requires_grad:
            expected[name] = ("blocks" if inside else "dense") + ("_no_decay" if slow else "")
    assert where(groups) == expected


@pytest.mark.parametrize("name", MODELS)
def test_per_block_makes_a_group_of_each_block(name):
    build, blocks, _, _ = MODELS[name]
    model = build()
    names = {id(param): name for name, param in model.named_parameters()}
    groups, split = by_name(param_groups(model, 0.07)), by_name(param_groups(model, 0.07, per_block=True))
    for kind in ("", "_no_decay"):
        whole = groups.get(f"blocks{kind}", {"params": [], "param_blocks": []})
        for block in blocks:
            expected = [name for (name, _), own in zip(whole["params"], whole["param_blocks"]) if own == block]
            group = split.pop(f"{block}{kind}", {"params": [], "blocks": blocks, "block": block})
            assert [names[id(param)] for param in group["params"]] == expected
            assert group["blocks"] == blocks and group["block"] == block and "param_blocks" not in group
            assert not expected or group["weight_decay"] == whole["weight_decay"]
        dense, bare = (each.pop(f"dense{kind}", {"params": []}) for each in (groups, split))
        assert [name for name, _ in dense["params"]] == [names[id(param)] for param in bare["params"]]
        assert {**dense, "params": 0} == {**bare, "params": 0}
    assert not split
