"""Engines that hand the optimizer other tensors than the model's parameters, or only some: masks and training are those
of one process, bit for bit.
"""

import copy
import functools
import importlib.util
import itertools
import re

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from toy import bits

from graddrop_kernels import (
    FixedMask,
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    TrainRows,
    attach_mask,
    param_groups,
)
from graddrop_kernels.attached.handle import AttachedMask
from graddrop_kernels.groups.flat_buffers import FlatBuffers, FlatPiece
from graddrop_kernels.groups.names import canonical_name
from graddrop_kernels.integrations.accelerate import graddrop_optimizer
from graddrop_kernels.integrations.deepspeed import attach_deepspeed, deepspeed_pieces
from graddrop_kernels.integrations.fsdp1 import attach_fsdp1, fsdp1_pieces
from graddrop_kernels.integrations.zero_redundancy import attach_zero

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation 'graddrop-kernels[deepspeed]'",
)


class Unit(nn.Module):
    """Its output's gradient by each parameter is a random tensor of the caller's seed: the same on every rank, and 3
    times a number of few digits, so that any average over up to four ranks, or half the sum of two, is that tensor to
    the last bit.
    """

    def __init__(self, number, shapes):
        super().__init__()
        self.number, self.names = number, list(shapes)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, seed):
        generator = torch.Generator().manual_seed(1000 * seed + self.number)
        params = [getattr(self, name) for name in self.names]  # not parameters(): FSDP1 has put views in their place
        grads = (torch.randn(param.shape, generator=generator).bfloat16().float() * 3 for param in params)
        return sum((param * grad).sum() for param, grad in zip(params, grads))


class Model(nn.Module):
    """39 parameters of uneven sizes."""

    def __init__(self):
        super().__init__()
        block = {"up": (13, 11), "up_bias": (13,), "down": (11, 13), "down_bias": (11,), "norm": (11,), "norm_bias": 11}
        self.embeddings = Unit(0, {"weight": (37, 11)})
        self.layer = nn.ModuleList(Unit(1 + number, block) for number in range(6))
        self.head = Unit(7, {"weight": (3, 11), "bias": (3,)})
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.rand(param.shape, generator=generator) + 0.5)

    def forward(self, seed):
        return sum(unit(seed) for unit in (self.embeddings, *self.layer, self.head))


def wrapped_fsdp1(model, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel

    # The head and the embeddings stay in the outermost unit.
    policy = lambda module, recurse, nonwrapped_numel: recurse or (isinstance(module, Unit) and 0 < module.number < 7)
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=cpu)


def deepspeed_config(stage, **more):
    import deepspeed

    # Or it would compile an operator for all-reduces in shared memory, for a minute; gloo does them, too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # the default is 1.0
        # Stage 3 makes a flat tensor of about so many elements of a group, and steps it, before it goes on to the next.
        "zero_optimization": {"stage": stage, "sub_group_size": 60, "stage3_param_persistence_threshold": 10},
        **more,
    }


def started_deepspeed(model, optimizer, stage):
    import deepspeed

    config = deepspeed_config(stage)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


# Training.


def fixed_mask():
    generator = torch.Generator().manual_seed(3)
    named = [(name, param) for name, param in Model().named_parameters() if ".up" in name]
    return FixedMask({name: torch.rand(param.shape, generator=generator) < 0.4 for name, param in named}, scale=1.25)


POLICIES = {
    "graddrop": lambda: GradDrop(p=0.3),
    "gaussian": lambda: GaussianGradDrop(p=0.4),
    "epoch": lambda: GradDropEpoch(epochs=3, storage="recompute"),
    "epoch-bitpacked": lambda: GradDropEpoch(epochs=3, storage="bitpacked"),
    "layer": lambda: LayerGradDrop(p=0.4),
    "freeze": lambda: GradFreeze(epochs=3),
    "fixed": fixed_mask,
    "rows": lambda: TrainRows({name: [1, 2, -1] for name, _ in Model().named_parameters() if ".up" in name}),
}
STEPS, STEPS_PER_EPOCH = 7, 2  # one more epoch than the policies have


def groups_of(model, per_block=False):
    """The paper's scope, with one weight decay, as FSDP1's flat parameters have no second."""
    return [{**group, "weight_decay": 0.1} for group in param_groups(model, per_block=per_block)]


def options(policy):
    return {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "seed": 11, "mask": POLICIES[policy]()}


def whole(model):
    """The pieces of unsharded parameters."""
    return {param: [FlatPiece(canonical_name(name), 0, 0, param.numel())] for name, param in model.named_parameters()}


def plain_step(model, optimizer, seed):
    model(seed).backward()
    optimizer.step()
    optimizer.zero_grad()


def one_process(policy):
    model = Model()
    optimizer = FusedGradDropAdamW(groups_of(model), **options(policy))
    return optimizer, functools.partial(plain_step, model, optimizer), whole(model)


def ddp(policy):
    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = FusedGradDropAdamW(groups_of(model), **options(policy))
    return optimizer, functools.partial(plain_step, model, optimizer), whole(model)


def zero(policy, buckets=False):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = ZeroRedundancyOptimizer(
        groups_of(model, per_block=True), FusedGradDropAdamW, parameters_as_bucket_view=buckets, **options(policy)
    )
    attach_zero(optimizer, model)
    own = {param for group in optimizer.optim.param_groups for param in group["params"]}
    pieces = {param: each for param, each in whole(model).items() if param in own}
    return optimizer.optim, functools.partial(plain_step, model, optimizer), pieces


def fsdp1(policy, use_orig_params):
    model = wrapped_fsdp1(Model(), use_orig_params)
    optimizer = FusedGradDropAdamW(groups_of(model), **options(policy))
    attach_fsdp1(optimizer, model)
    return optimizer, functools.partial(plain_step, model, optimizer), fsdp1_pieces(model)


def deepspeed(policy, stage):
    model = Model()
    optimizer = FusedGradDropAdamW(groups_of(model, per_block=True), **options(policy))
    engine = started_deepspeed(model, optimizer, stage)
    attach_deepspeed(engine)
    return optimizer, functools.partial(deepspeed_step, engine), deepspeed_pieces(engine)


def deepspeed_step(engine, seed):
    engine.backward(engine(seed))
    engine.step()


def accelerated_step(accelerator, model, optimizer, seed):
    """Two micro-batches."""
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(seed))
            optimizer.step()
            optimizer.zero_grad()


def accelerate_with(**arguments):
    import accelerate

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(gradient_accumulation_steps=2, **arguments)


def accelerate_ddp(policy, fsdp2=None):
    import accelerate

    accelerator = accelerate_with(cpu=True, fsdp_plugin=fsdp2)
    if fsdp2:  # which Accelerate leaves out, without a word, on CPUs
        accelerator.state.distributed_type = accelerate.DistributedType.FSDP
        accelerator.state.fsdp_plugin = fsdp2
    model = Model()
    model, optimizer = accelerator.prepare(model, FusedGradDropAdamW(groups_of(model), **options(policy)))
    step = functools.partial(accelerated_step, accelerator, model, optimizer)
    return graddrop_optimizer(optimizer), step, whole(model)


def accelerate_fsdp2(policy):
    import accelerate

    return accelerate_ddp(policy, accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Unit"],
        cpu_ram_efficient_loading=False,
    ))  # fmt: skip


def accelerate_deepspeed(policy, stage):
    import accelerate

    config = deepspeed_config(stage, gradient_accumulation_steps=2)
    accelerator = accelerate_with(deepspeed_plugin=accelerate.DeepSpeedPlugin(hf_ds_config=config))
    model = Model()
    optimizer = FusedGradDropAdamW(groups_of(model, per_block=True), **options(policy))
    engine, wrapped = accelerator.prepare(model, optimizer)
    attach_deepspeed(engine)
    found = graddrop_optimizer(wrapped)  # Accelerate's wrapper, in it DeepSpeed's, in it ours
    assert found is optimizer, found
    return found, functools.partial(accelerated_step, accelerator, engine, wrapped), deepspeed_pieces(engine)


# The same for the masks of attach_mask, which cannot freeze single elements.


def attached(model, policy, per_block=False):
    optimizer = torch.optim.SGD(groups_of(model, per_block), lr=0.02, momentum=0.8, nesterov=True)
    made = POLICIES[policy]()
    masked = "gradient" if made.masked is not None and not made.needs_blocks else None
    return optimizer, attach_mask(optimizer, made, seed=11, masked=masked)


def attached_one_process(policy):
    model = Model()
    optimizer, handle = attached(model, policy)
    return handle, functools.partial(plain_step, model, optimizer), whole(model)


def attached_fsdp1(policy, use_orig_params):
    model = wrapped_fsdp1(Model(), use_orig_params)
    optimizer, handle = attached(model, policy)
    attach_fsdp1(optimizer, model)
    return handle, functools.partial(plain_step, model, optimizer), fsdp1_pieces(model)


def attached_deepspeed(policy, stage):
    model = Model()
    optimizer, handle = attached(model, policy, per_block=True)
    engine = started_deepspeed(model, optimizer, stage)
    attach_deepspeed(engine)
    return handle, functools.partial(deepspeed_step, engine), deepspeed_pieces(engine)


ATTACHED = {
    "attached fsdp1 slices": functools.partial(attached_fsdp1, use_orig_params=True),
    "attached fsdp1 flat": functools.partial(attached_fsdp1, use_orig_params=False),
    **{f"attached deepspeed {stage}": functools.partial(attached_deepspeed, stage=stage) for stage in (1, 2)},
}
ENGINES = {
    **ATTACHED,
    "ddp": ddp,
    "zero": zero,
    "zero, buckets": functools.partial(zero, buckets=True),
    "fsdp1 slices": functools.partial(fsdp1, use_orig_params=True),
    "fsdp1 flat": functools.partial(fsdp1, use_orig_params=False),
    **{f"deepspeed {stage}": functools.partial(deepspeed, stage=stage) for stage in (1, 2, 3)},
    "accelerate": accelerate_ddp,
    "accelerate fsdp2": accelerate_fsdp2,
    "accelerate deepspeed": functools.partial(accelerate_deepspeed, stage=2),
}
COPIES = {"ddp": 2, "accelerate": 2, "accelerate fsdp2": 2}  # ranks that have each element; else 1


def begin_epoch(optimizer, number):
    if number % STEPS_PER_EPOCH == 0:
        optimizer.set_epoch(number // STEPS_PER_EPOCH)


def trained(engine, policy, seed):
    """found_in() after training."""
    optimizer, step, pieces = engine(policy)
    masks = {}
    for number in range(STEPS):
        begin_epoch(optimizer, number)
        in_sight = any(group["params"] for group in optimizer.param_groups)  # not in DeepSpeed's stage 3
        if in_sight and number % 3 == 0:
            masks |= {(number, tensor): optimizer.mask(tensor) for tensor in pieces}
        step(seed + number)
    return found_in(optimizer, pieces, masks)


def found_in(optimizer, pieces, masks={}):  # noqa: B006 (nobody writes to it)
    """[(name, first element, step, {what: values})] of every piece; ``masks``: by (step, tensor)."""
    found = []
    if isinstance(optimizer, AttachedMask):
        steps, optimizer = optimizer.owner.state, optimizer.optimizer
    else:
        steps = optimizer.state
    for tensor, each in pieces.items():
        state = optimizer.state.get(tensor, {})
        whats = {"param": tensor}
        whats |= {key: _of_all_rows(value, optimizer, tensor) for key, value in state.items() if key != "step"}
        whats |= {f"mask of step {number}": mask for (number, masked), mask in masks.items() if masked is tensor}
        for name, local, start, numel in each:
            values = {what: _flat(value)[local : local + numel].clone() for what, value in whats.items()}
            found.append((name, start, float(steps.get(tensor, {}).get("step", 0)), values))
    return found


def _of_all_rows(value, optimizer, tensor):
    """A moment with zeros for the rows that TrainRows leaves out where a parameter is whole."""
    if value.shape == tensor.shape:
        return value
    return torch.zeros_like(tensor).masked_scatter(optimizer.mask(tensor), value)


def _flat(tensor):
    """The elements of a tensor, of a DTensor those of all ranks."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).flatten()


def trained_by(engine, policies, seed):
    return [trained(ENGINES[engine], policy, seed) for policy in policies]


@functools.cache
def expected_of(policy, seed, engine=one_process):
    return {name: (step, values) for name, _, step, values in trained(engine, policy, seed)}


def assert_trained_alike(by_rank, policy, seed, copies, engine=one_process):
    """``copies``: how many ranks have each element."""
    expected = expected_of(policy, seed, engine)
    seen = {name: torch.zeros(len(values["param"])) for name, (_, values) in expected.items()}
    for found in by_rank:
        for name, start, step, values in found:
            end = start + len(values["param"])
            seen[name][start:end] += 1
            assert step == expected[name][0], (policy, name)
            assert {what for what in expected[name][1] if "mask" not in what} <= values.keys()
            for what, value in values.items():
                assert torch.equal(value, expected[name][1][what][start:end]), (policy, name, what, start)
    assert all((counts == copies).all() for counts in seen.values()), policy


@pytest.mark.parametrize("engine", [
    pytest.param(engine, marks=needs_deepspeed if "deepspeed" in engine else ()) for engine in ENGINES
])  # fmt: skip
def test_training_is_that_of_one_process(engine, seed):
    policies = [policy for policy in POLICIES if engine not in ATTACHED or policy != "rows"]
    by_rank = run_ranks(2, trained_by, engine, policies, seed, timeout=180)
    for policy, *found in zip(policies, *by_rank):
        alone = attached_one_process if engine in ATTACHED else one_process
        assert_trained_alike(found, policy, seed, COPIES.get(engine, 1), alone)


def counts_of(engine, policy, seed):
    handle, step, _ = ENGINES[engine](policy)
    for number in range(3):
        handle.set_epoch(0)
        step(seed + number)
    return [(group["completed_steps"], group["param_steps"]) for group in handle.param_groups]


@pytest.mark.parametrize("engine", [name for name in ATTACHED if "fsdp1" in name])
def test_a_mask_counts_the_steps_of_what_only_other_ranks_hold(engine, seed):
    """So that a checkpoint of any rank goes on in any other. The head and many slices have elements on one rank."""
    first, second = run_ranks(2, counts_of, engine, "graddrop", seed)
    assert first == second
    assert all(completed == 3 and set(steps) == {3} for completed, steps in first)


@pytest.mark.parametrize("engine", ["zero", "fsdp1 slices", "fsdp1 flat"])
def test_one_rank_is_no_exception(engine, seed):
    """FSDP1 shards nothing then: its slices are whole parameters in their shapes."""
    [found] = run_ranks(1, trained_by, engine, ["fixed"], seed)
    assert_trained_alike(found, "fixed", seed, copies=1)


# Saving and loading, in as many processes.


def save(step, folder):
    """What load() needs besides the folder."""
    owner, optimizer = step.args[0], step.args[-1]
    if hasattr(owner, "save_checkpoint"):
        owner.save_checkpoint(folder)
        return None
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict(to=0)
        states = [optimizer.state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(states, 0)
    else:
        states = [optimizer.state_dict()]
    return copy.deepcopy((states[0], [param.detach() for param in owner.parameters()]))


def load(step, folder, saved):
    owner, optimizer = step.args[0], step.args[-1]
    if saved is None:
        owner.load_checkpoint(folder)
        return
    for param, value in zip(owner.parameters(), saved[1]):
        param.data.copy_(value)
    optimizer.load_state_dict(saved[0])


def continued(engines, policies, seed, folder):
    """What ends up with other parameters or state when it is interrupted in the middle of an epoch. Only what is in the
    pieces: the padding of a flat buffer is anything.
    """
    different = []
    for engine, policy in itertools.product(engines, policies):
        ends, saved = [], None
        for numbers in (range(STEPS), range(3, STEPS)):
            optimizer, step, pieces = ENGINES[engine](policy)
            if numbers.start:
                load(step, folder / engine / policy, saved)
            for number in numbers:
                if number == 3 and numbers.start == 0:
                    saved = save(step, folder / engine / policy)
                begin_epoch(optimizer, number)
                step(seed + number)
            ends.append([(*what, {key: bits(value) for key, value in values.items()})
                         for *what, values in found_in(optimizer, pieces)])  # fmt: skip
        different += [] if ends[0] == ends[1] else [(engine, policy)]
    return different


@pytest.mark.parametrize("engines", [
    ["zero", "fsdp1 slices", "fsdp1 flat"], pytest.param(["deepspeed 1", "deepspeed 3"], marks=needs_deepspeed),
    ["attached fsdp1 slices", "attached fsdp1 flat"], pytest.param(["attached deepspeed 2"], marks=needs_deepspeed),
])  # fmt: skip
def test_a_run_goes_on_bit_for_bit(engines, seed, tmp_path):
    policies = ["graddrop", "layer", "epoch-bitpacked", "freeze" if engines[0] in ATTACHED else "rows"]
    assert run_ranks(2, continued, engines, policies, seed, tmp_path, timeout=180) == [[], []]


def restored_twice(seed):
    """The first moments after a step from one snapshot, twice; whether it stayed as it was; what is said of a limit."""
    optimizer, step, _ = zero("graddrop")
    wrapper, found = step.args[-1], []
    step(seed)
    wrapper.consolidate_state_dict(to=0)
    saved = copy.deepcopy(wrapper.state_dict())
    as_it_was = copy.deepcopy(saved)
    for _ in range(2):
        wrapper.load_state_dict(saved)
        step(seed + 1)
        found.append([bits(state["exp_avg"]) for state in optimizer.state.values()])
    for group in wrapper.param_groups:
        group["max_grad_norm"] = 0.5
    return found, str(saved) == str(as_it_was), _error_of(lambda: step(seed))


def test_a_snapshot_through_zero_redundancy_optimizer(seed):
    """It can be restored again. What is set in the wrapper's groups reaches the step."""
    [((once, again), unchanged, said)] = run_ranks(1, restored_twice, seed)
    assert once == again and unchanged and "max_grad_norm=0.5 cannot be used with the flat buffer" in said


# Refusals.


def refusals(attach, engines):
    """What each call says that would draw a mask for a flat buffer of which nobody said what is in it."""
    import test_engines

    setattr(test_engines, attach, lambda *arguments: None)
    said = []
    for engine in engines:
        optimizer, step, _ = ENGINES[engine]("graddrop")
        said.append(_error_of(lambda: step(1)))  # noqa: B023
        for tensor in optimizer.param_groups[0]["params"][:1]:
            said.append(_error_of(lambda: optimizer.mask(tensor)))  # noqa: B023
    return said


def _error_of(call):
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("attach, engines", [
    ("attach_fsdp1", ["fsdp1 slices", "fsdp1 flat"]),
    pytest.param("attach_deepspeed", ["deepspeed 1", "deepspeed 2", "deepspeed 3"], marks=needs_deepspeed),
])  # fmt: skip
def test_a_flat_buffer_without_a_map_is_refused(attach, engines):
    for said in run_ranks(2, refusals, attach, engines):
        assert len(said) >= len(engines) + 2
        for message in said:
            assert "would depend on the sharding" in message and f"call graddrop_kernels.{attach}(" in message


def misuses():
    """What each wrong call of an attach function says."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = Model()
    whole_model, clipping = FusedGradDropAdamW(model.named_parameters()), {"max_grad_norm": 1.0}
    sharded = wrapped_fsdp1(Model(), True)
    zero = lambda cls, **more: ZeroRedundancyOptimizer(model.parameters(), optimizer_class=cls, **more)
    return [_error_of(call) for call in (
        lambda: attach_fsdp1(torch.optim.AdamW(sharded.parameters()), sharded),
        lambda: attach_fsdp1(whole_model, sharded),
        lambda: attach_fsdp1(FusedGradDropAdamW(sharded.named_parameters(), **clipping), sharded),
        lambda: attach_zero(zero(torch.optim.AdamW), model),
        lambda: attach_zero(zero(FusedGradDropAdamW), Model()),
        lambda: attach_zero(zero(FusedGradDropAdamW, **clipping), model),
        lambda: attach_zero(whole_model, model),
        lambda: attach_deepspeed(model),
        lambda: fixed_of_nothing(sharded, attach=True),
        lambda: fixed_of_nothing(sharded, attach=False),
    )]  # fmt: skip


def fixed_of_nothing(model, attach):
    optimizer = FusedGradDropAdamW(model.named_parameters(), mask=FixedMask({"nothing": torch.ones(2).bool()}))
    if attach:
        attach_fsdp1(optimizer, model)
    model(1).backward()
    optimizer.step()


def test_wrong_calls_are_refused():
    expected = (
        "attach_fsdp1.* needs a FusedGradDropAdamW, or an optimizer with attach_mask, got AdamW",
        "steps none of the model's sharded parameters",
        "max_grad_norm=1.0 would clip",
        "attach_zero.* needs a ZeroRedundancyOptimizer.*, got AdamW",
        "[0-9]+ of [0-9]+ parameters are not of this Model",
        "max_grad_norm=1.0 would clip",
        "attach_zero.* needs a ZeroRedundancyOptimizer",
        "attach_deepspeed.* needs a DeepSpeed engine",
        "FixedMask: no parameter is called 'nothing'; near names are '(head|layer|embeddings)",
        "would depend on the sharding",
    )
    for said in run_ranks(2, misuses):
        for message, pattern in zip(said, expected, strict=True):
            assert re.search(pattern, message), (pattern, message)


def stage_3():
    optimizer, _ = attached(model := Model(), "graddrop", per_block=True)
    engine = started_deepspeed(model, optimizer, 3)
    before = [{**group} for group in optimizer.param_groups]
    return _error_of(lambda: attach_deepspeed(engine)), [{**group} for group in optimizer.param_groups] == before


@needs_deepspeed
def test_masks_on_other_optimizers_are_refused_in_stage_3():
    for said, unchanged in run_ranks(2, stage_3):
        assert "ZeRO 3 steps the partitions of a group one after the other" in said and "use ZeRO 1 or 2" in said
        assert unchanged


def with_attached_zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    zero = ZeroRedundancyOptimizer((model := Model()).parameters(), torch.optim.SGD, lr=0.1)
    attach_mask(zero.optim, GradDrop(), model=model)
    return _error_of(lambda: attach_zero(zero, model)), _error_of(lambda: attach_mask(zero, GradDrop()))


def test_masks_on_other_optimizers_are_refused_in_zero_redundancy_optimizer():
    for inside, outside in run_ranks(2, with_attached_zero):
        assert "got SGD with attach_mask" in inside
        assert "use optimizer_class=FusedGradDropAdamW and attach_zero()" in outside


def test_a_flat_tensor_that_the_optimizer_was_given_is_a_parameter_like_any_other():
    bias, flat = torch.zeros(5, requires_grad=True), torch.zeros(7, requires_grad=True)
    buffers = FlatBuffers()
    assert buffers.reason(bias) is None  # nothing was noted
    buffers.note([{"params": [bias]}])
    assert buffers.reason(bias) is None and buffers.reason(nn.Parameter(flat)) is None and buffers.reason(flat)
    optimizer = FusedGradDropAdamW([("bias", bias)])
    optimizer.add_param_group({"params": [("more", torch.zeros(3, requires_grad=True))]})
    for param in (bias, optimizer.param_groups[1]["params"][0]):
        param.grad = torch.ones_like(param)
    optimizer.step()
    again = copy.deepcopy(optimizer)
    again.param_groups[0]["params"][0].grad = torch.ones(5)
    again.step()
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(7)
    with pytest.raises(TypeError, match="something has put this flat tensor in the place of the parameters"):
        optimizer.step()
    optimizer.attach_pieces({flat: [FlatPiece("weight", 0, 100, 4), FlatPiece("bias", 4, 0, 3)]})
    optimizer.step()
    assert (flat != 0).any()


# Maps.


def numbered(model):
    """A model whose elements tell what they are: 1000 * number of the parameter + place in it."""
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(1000 * number + torch.arange(param.numel()).view(param.shape))
    return model


def contents(pieces):
    """(name, first element, values) of every piece, after a look at their order; and the tensors' other elements."""
    found, others = [], 0
    for flat, each in pieces.items():
        end = 0
        for piece in each:
            assert piece.local_start >= end and piece.numel > 0, (piece, end)
            end = piece.local_start + piece.numel
            found.append((piece.name, piece.global_start, flat.detach().flatten()[piece.local_start : end].clone()))
        others += flat.numel() - sum(piece.numel for piece in each)
    return found, others


def fsdp1_contents():
    found = []
    for use_orig_params in (True, False):
        model = wrapped_fsdp1(numbered(Model()), use_orig_params)
        pieces = fsdp1_pieces(model)
        assert set(pieces) == set(model.parameters())
        found.append(contents(pieces))
    return found


def deepspeed_contents():
    found = []
    for stage in (1, 2, 3):
        model = numbered(Model())
        found.append(contents(deepspeed_pieces(started_deepspeed(model, torch.optim.AdamW(model.parameters()), stage))))
    return found


@pytest.mark.parametrize("function", [fsdp1_contents, pytest.param(deepspeed_contents, marks=needs_deepspeed)])
@pytest.mark.parametrize("world", [2, 3])
def test_a_map_says_where_every_element_is(function, world):
    for by_rank in zip(*run_ranks(world, function), strict=True):
        owned = {name: torch.full((param.numel(),), -1.0) for name, param in Model().named_parameters()}
        for found, others in by_rank:
            assert others < 100  # padding
            for name, start, values in found:
                assert (owned[name][start : start + len(values)] == -1).all()  # nobody else's
                owned[name][start : start + len(values)] = values
        for name, param in numbered(Model()).named_parameters():
            assert torch.equal(owned[name], param.flatten()), name
