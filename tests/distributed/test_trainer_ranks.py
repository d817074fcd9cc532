"""The Trainer of transformers in two processes, under each wrapper: the bits of one process, and of an unbroken run.

Both ranks see the same batches, so that the mean of their gradients is the gradient of one process to the last bit.
"""

import functools
import importlib.util
import itertools

import pytest
import torch
from lazy import integration
from ranks import run_ranks
from torch.distributed.fsdp import FullyShardedDataParallel
from trainer_runs import arguments, losses, sentences, trainer_of

from graddrop_kernels import GradDrop
from graddrop_kernels.groups.names import canonical_name
from graddrop_kernels.integrations.optimizer_of import unwrapped

pytestmark = pytest.mark.usefixtures("one_thread")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation 'graddrop-kernels[deepspeed]'",
)
SEQUENTIAL = {"train_sampling_strategy": "sequential", "average_tokens_across_devices": False}


def batches_for(ranks):
    """Each batch as often as there are ranks: they are dealt out in turn."""
    rows = sentences()
    return [row for start in range(0, len(rows), 4) for _ in range(ranks) for row in rows[start : start + 4]]


def one_process(folder, mask, **more):
    return trainer_of(arguments(folder, **SEQUENTIAL, **more), mask, rows=batches_for(1))


def ddp(folder, mask, skip_dropped=False, **more):
    return trainer_of(arguments(folder, **SEQUENTIAL, **more), mask, rows=batches_for(2), skip_dropped=skip_dropped)


def fsdp(folder, mask, version, state_dict_type="FULL_STATE_DICT", **more):
    from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState

    trainer = ddp(folder, mask, **more)
    state = trainer.accelerator.state
    # Accelerate leaves FSDP out, without a word, on CPUs.
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.device = PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 refuses cpu:0
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False, state_dict_type=state_dict_type, use_orig_params=True,
    )  # fmt: skip
    trainer.is_fsdp_enabled = True
    return trainer


def deepspeed(folder, mask, stage, **more):
    import deepspeed

    # Or it would compile an operator for all-reduces in shared memory, for a minute; gloo does them, too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "sub_group_size": 600, "stage3_param_persistence_threshold": 10},
    }  # fmt: skip
    return ddp(folder, mask, deepspeed=config, **more)


WRAPPERS = {
    "ddp": ddp,
    "fsdp1": functools.partial(fsdp, version=1),
    "fsdp2": functools.partial(fsdp, version=2),
    "fsdp2, skipping": functools.partial(fsdp, version=2, state_dict_type="SHARDED_STATE_DICT", skip_dropped=True),
    "deepspeed 2": functools.partial(deepspeed, stage=2),
    "deepspeed 3": functools.partial(deepspeed, stage=3),
}
MASKS = ["layer", "epoch"]


def whole_parameters(trainer):
    """{canonical name: all elements}, on every rank."""
    if any(isinstance(module, FullyShardedDataParallel) for module in trainer.model.modules()):
        with FullyShardedDataParallel.summon_full_params(trainer.model):
            return {canonical_name(name): param.detach().clone() for name, param in trainer.model.named_parameters()}
    found = {}
    for name, param in trainer.model.named_parameters():
        if hasattr(param, "ds_id"):  # DeepSpeed's stage 3
            import deepspeed

            with deepspeed.zero.GatheredParameters([param]):
                found[canonical_name(name)] = param.detach().clone()
        else:
            whole = param.full_tensor() if hasattr(param, "full_tensor") else param
            found[canonical_name(name)] = whole.detach().clone()
    return found


def trained(wrapper, mask, folder):
    """(losses, parameters) of a run, and of one that was broken in epoch 1 and resumed."""
    from accelerate.state import AcceleratorState

    ends = []
    for more, resume in (
        ({"save_strategy": "steps", "save_steps": 8}, None), ({}, str(folder / wrapper / mask / "checkpoint-8")),
    ):  # fmt: skip
        if wrapper == "fsdp1":  # whose checkpoints crash torch on CPUs
            more, resume = {}, None
        AcceleratorState._reset_state(reset_partial_state=True)
        trainer = WRAPPERS[wrapper](folder / wrapper / mask, mask, **more)
        trainer.train(resume_from_checkpoint=resume)
        assert unwrapped(trainer.optimizer).param_groups[0]["epoch"] == 1
        ends.append((losses(trainer), whole_parameters(trainer)))
    return ends


def attached_run(folder, wrapper=one_process):
    """(losses, parameters) of a run of any optimizer with a mask by the callback."""
    trainer = wrapper(folder, "layer", optim="rmsprop")
    trainer.optimizer_cls_and_kwargs = None
    trainer.callback_handler.callbacks = [
        callback for callback in trainer.callback_handler.callbacks if type(callback).__name__ != "GradDropCallback"
    ]
    trainer.add_callback(integration.GradDropCallback(mask=GradDrop(p=0.4)))
    trainer.train()
    return losses(trainer), whole_parameters(trainer)


@pytest.mark.slow
def test_a_mask_on_any_optimizer_under_fsdp1_is_that_of_one_process(tmp_path):
    expected = attached_run(tmp_path / "one")
    for found in run_ranks(2, attached_run, tmp_path / "two", WRAPPERS["fsdp1"], timeout=200):
        # FSDP1 rounds gradients otherwise; another mask is steps of lr = 3e-3, ten times that of RMSprop's first.
        assert found[0] == pytest.approx(expected[0], rel=0, abs=2e-5)
        for name, param in expected[1].items():
            assert (param - found[1][name]).abs().max() <= 2e-5, name


def trained_by(wrappers, folder):
    return [trained(wrapper, mask, folder) for wrapper in wrappers for mask in MASKS]


@pytest.mark.slow
@pytest.mark.parametrize("wrappers", [
    ["ddp", "fsdp1", "fsdp2", "fsdp2, skipping"], pytest.param(["deepspeed 2", "deepspeed 3"], marks=needs_deepspeed),
])  # fmt: skip
def test_training_is_that_of_one_process(wrappers, tmp_path):
    expected = {}
    for mask in MASKS:
        trainer = one_process(tmp_path / "one", mask)
        trainer.train()
        expected[mask] = losses(trainer), whole_parameters(trainer)
    for by_rank in run_ranks(2, trained_by, wrappers, tmp_path, timeout=400):
        for (wrapper, mask), (whole, resumed) in zip(itertools.product(wrappers, MASKS), by_rank, strict=True):
            assert whole[0] == resumed[0] and all(map(torch.equal, whole[1].values(), resumed[1].values())), wrapper
            assert whole[1].keys() == expected[mask][1].keys()
            # These round gradients otherwise (stage 3 has its own linear layer); another mask is steps of lr = 3e-3.
            most = 2e-6 if wrapper in ("fsdp1", "deepspeed 3") else 0.0
            assert whole[0] == pytest.approx(expected[mask][0], rel=0, abs=most), (wrapper, mask)
            for name, param in expected[mask][1].items():
                assert (param - whole[1][name]).abs().max() <= most, (wrapper, mask, name)
