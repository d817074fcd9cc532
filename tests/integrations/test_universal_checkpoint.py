"""What of a universal checkpoint of DeepSpeed is taken and what refused, with a stand-in for its stage 3 optimizer."""

import copy
import importlib
import types

import pytest
import torch

from graddrop_kernels import FusedGradDropAdamW, GradDrop
from graddrop_kernels.integrations.deepspeed_universal import repair_stage3_loads


class Zero:
    """As DeepSpeed's stage 3: gives every group the first one's values and all partitions one step tensor."""

    def __init__(self, optimizer):
        self.optimizer, self.loads = optimizer, []

    def load_state_dict(self, checkpoint_folder=None, load_optimizer_states=True, **more):
        self.loads.append((checkpoint_folder, load_optimizer_states, more))
        if checkpoint_folder and load_optimizer_states:
            file = torch.load(f"{checkpoint_folder}/zero/optimizer_state.pt", weights_only=False)
            shared = torch.tensor(99.0)
            for group in self.optimizer.param_groups:
                group.update({name: value for name, value in file["param_groups"][0].items() if name != "params"})
                for param in group["params"]:
                    self.optimizer.state[param]["step"] = shared


def two_groups(seed):
    torch.manual_seed(seed)
    params = [torch.randn(6, requires_grad=True) for _ in range(3)]
    optimizer = FusedGradDropAdamW(
        [
            {"params": [("a", params[0]), ("b", params[1])], "lr": 0.02, "mask": GradDrop(0.3)},
            {"params": [("c", params[2])], "lr": 0.05, "weight_decay": 0.2, "mask": GradDrop(0.5)},
        ],
        betas=(0.8, 0.95), seed=11,
    )  # fmt: skip
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    zero = Zero(optimizer)
    repair_stage3_loads(zero, optimizer, [(0, params[0]), (0, params[1]), (1, params[2])])
    return optimizer, zero, params


def written(folder, optimizer, steps):
    """optimizer_state.pt of a run at these steps, by parameter."""
    saved = copy.deepcopy(optimizer.state_dict())
    for state, step in zip(saved["state"].values(), steps):
        state["step"] = torch.tensor(float(step))
    for group, count in zip(saved["param_groups"], (steps[0], steps[-1])):
        group["completed_steps"] = count
    (folder / "zero").mkdir()
    torch.save(
        {"param_groups": saved["param_groups"], "optimizer_state_dict": saved}, folder / "zero" / "optimizer_state.pt"
    )
    return saved["param_groups"]


def facts(optimizer):
    groups = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    return groups, [
        float(optimizer.state[param]["step"]) for group in optimizer.param_groups for param in group["params"]
    ]


def test_every_group_gets_its_own_values_and_every_partition_its_own_count(seed, tmp_path):
    optimizer, zero, params = two_groups(seed)
    file = written(tmp_path, optimizer, [7, 7, 5])
    zero.load_state_dict(checkpoint_folder=str(tmp_path))
    groups, steps = facts(optimizer)
    assert steps == [7, 7, 5] and [group["completed_steps"] for group in groups] == [7, 5]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.02, 0.01), (0.05, 0.2)]
    assert [group["mask"] for group in groups] == [GradDrop(0.3).to_json(), GradDrop(0.5).to_json()] and len(file) == 2
    tensors = [optimizer.state[param]["step"] for param in params]
    assert len({tensor.data_ptr() for tensor in tensors}) == 3


@pytest.mark.parametrize("given", [{"load_optimizer_states": False}, {"checkpoint_folder": None}])
def test_a_load_of_the_module_alone_leaves_the_optimizer(given, seed, tmp_path):
    optimizer, zero, _ = two_groups(seed)
    written(tmp_path, optimizer, [7, 7, 5])
    before = copy.deepcopy(facts(optimizer))
    zero.load_state_dict(**{"checkpoint_folder": str(tmp_path), "load_module": True, **given})
    assert facts(optimizer) == before and len(zero.loads) == 1
    assert zero.loads[0][2] == {"load_module": True}


def test_partitions_of_a_group_with_different_counts_are_refused(seed, tmp_path):
    optimizer, zero, _ = two_groups(seed)
    written(tmp_path, optimizer, [7, 6, 5])
    before = copy.deepcopy(facts(optimizer))
    with pytest.raises(ValueError, match=r"partitions of parameter group 0 .* \[6\.0, 7\.0\].* as many ranks"):
        zero.load_state_dict(checkpoint_folder=str(tmp_path))
    assert facts(optimizer) == before and not zero.loads


def test_another_seed_is_refused(seed, tmp_path):
    optimizer, zero, _ = two_groups(seed)
    written(tmp_path, optimizer, [7, 7, 5])
    for group in optimizer.param_groups:
        group["seed"] = 12
    with pytest.raises(ValueError, match="seed"):
        zero.load_state_dict(checkpoint_folder=str(tmp_path))
    assert not zero.loads


@pytest.mark.parametrize("steps", [0, 40])
def test_a_trainer_does_not_resume_from_a_universal_checkpoint(steps, monkeypatch):
    """Trainer has loaded it before its callbacks can attach anything."""
    optimizer = FusedGradDropAdamW([torch.zeros(3, requires_grad=True)])
    wrapper = type("Zero", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})()
    wrapper.optimizer = optimizer
    config = {"checkpoint.load_universal": True, "zero_optimization.elastic_checkpoint": False}
    args = types.SimpleNamespace(hf_deepspeed_config=types.SimpleNamespace(get_value=lambda name, other: config[name]))
    state = types.SimpleNamespace(global_step=steps)
    monkeypatch.setattr("graddrop_kernels.integrations.deepspeed.deepspeed_pieces", lambda engine: {})
    monkeypatch.setattr("graddrop_kernels.integrations.deepspeed.deepspeed_universal.repair_loads", lambda *_: None)
    monkeypatch.setattr(optimizer, "attach_pieces", lambda *_: None)
    accelerated = types.SimpleNamespace(optimizer=wrapper)
    attach = importlib.import_module("graddrop_kernels.integrations.transformers")._attach_to_deepspeed
    train = lambda: attach(accelerated, torch.nn.Linear(2, 2), args, state)
    if not steps:
        return train()
    with pytest.raises(ValueError, match="a universal checkpoint was loaded before"):
        train()
