"""Engines with optimizer states of their own making, saved on some ranks and loaded on others: training ends with the
bits of one process that trains in one go, on the same gradients.
"""

import copy
import itertools
import re

import pytest
import torch.distributed as dist
from ranks import run_ranks
from test_engines import (
    ENGINES,
    STEPS,
    STEPS_PER_EPOCH,
    Model,
    _error_of,
    assert_trained_alike,
    attach_deepspeed,
    begin_epoch,
    deepspeed_config,
    deepspeed_pieces,
    deepspeed_step,
    found_in,
    groups_of,
    needs_deepspeed,
    options,
)

from graddrop_kernels import FusedGradDropAdamW

POLICIES = ("graddrop", "epoch-bitpacked", "layer", "freeze", "rows")  # each with counts or spans of another kind
LEGS = ((2, range(2)), (4, range(2, 3)), (1, range(3, 5)), (3, range(5, STEPS)))  # (ranks, numbers of the steps)
COUNTS = [(STEPS, (STEPS - 1) // STEPS_PER_EPOCH, "0:0,1:2,2:4,3:6")]  # of every group at the end


def leg(engines, numbers, saved, seed):
    """A part of the training of every engine and policy.

    Returns {(engine, policy): (what to go on from, what is in the pieces, counts)}.
    """
    done = {}
    for index, (engine, policy) in enumerate(itertools.product(engines, POLICIES)):
        save, load = FORMS[engine][index % len(FORMS[engine])]
        optimizer, step, pieces = ENGINES[engine](policy)
        owner, wrapper = step.args[0], step.args[-1]
        if saved is not None:
            if index % 3:  # an optimizer that has something to forget
                step(seed)
            load(owner, wrapper, copy.deepcopy(saved[engine, policy]))
        for number in numbers:
            begin_epoch(optimizer, number)
            step(seed + number)
        done[engine, policy] = save(owner, wrapper), found_in(optimizer, pieces), counts_of(optimizer)
    return done


def counts_of(optimizer):
    """Where the groups are in the training; one entry if they are all at one place."""
    keys = ("completed_steps", "epoch", "epoch_history")
    return sorted({tuple(group[key] for key in keys) for group in optimizer.param_groups})


def zero_of_another_seed():
    _, step, _ = ENGINES["zero"]("graddrop")
    model, zero = step.args[0], step.args[-1]
    saved = [save_zero(model, zero)]
    dist.broadcast_object_list(saved, 0)
    for group in saved[0][1]["param_groups"]:
        group["seed"] = 12
    return _error_of(lambda: zero.load_state_dict(saved[0][1]))


def save_zero(model, zero):
    zero.consolidate_state_dict(to=0)
    return model.module.state_dict(), zero.state_dict() if dist.get_rank() == 0 else None


def load_zero(model, zero, saved):
    model.module.load_state_dict(saved[0])
    zero.load_state_dict(saved[1])


def full_states(model):
    from torch.distributed.fsdp import FullOptimStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    # With the default, offload_to_cpu=True, torch leaves the moments of a model on the CPU in one buffer: all become
    # exp_avg_sq, also those of torch's own AdamW.
    config = FullOptimStateDictConfig(offload_to_cpu=False)
    FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT, optim_state_dict_config=config)
    return FSDP


def save_fsdp1(model, optimizer):
    fsdp = full_states(model)
    return model.state_dict(), fsdp.optim_state_dict(model, optimizer)


def load_fsdp1(model, optimizer, saved):
    fsdp = full_states(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(fsdp.optim_state_dict_to_load(model, optimizer, saved[1]))


def save_dcp(model, optimizer):
    from torch.distributed.checkpoint import state_dict as of

    return of.get_state_dict(model, optimizer, options=of.StateDictOptions(full_state_dict=True))


def load_dcp(model, optimizer, saved):
    from torch.distributed.checkpoint import state_dict as of

    options = of.StateDictOptions(full_state_dict=True)
    of.set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)


FORMS = {  # of saving and loading, in turn for the policies
    "zero": [(save_zero, load_zero)],
    "fsdp1 slices": [(save_fsdp1, load_fsdp1), (save_dcp, load_dcp)],
    "fsdp1 flat": [(save_fsdp1, load_fsdp1), (save_dcp, load_dcp)],
}


@pytest.mark.slow
def test_engines_go_on_with_other_numbers_of_ranks(seed):
    saved = None
    for world, numbers in LEGS:
        by_rank = run_ranks(world, leg, list(FORMS), numbers, saved, seed, timeout=300)
        saved = {run: state for run, (state, _, _) in by_rank[0].items()}
    for engine, policy in itertools.product(FORMS, POLICIES):
        by_rank_of_run = [done[engine, policy] for done in by_rank]
        assert [counts for _, _, counts in by_rank_of_run] == [COUNTS] * world, (engine, policy)
        assert_trained_alike([found for _, found, _ in by_rank_of_run], policy, seed, 1)


# DeepSpeed, by universal checkpoints.

UNIVERSAL = [(1, "layer"), (1, "epoch-bitpacked"), (2, "graddrop"), (3, "freeze"), (3, "layer"), (3, "epoch-bitpacked")]
UNIVERSAL_LEGS = ((2, range(3)), (3, range(3, 5)), (1, range(5, STEPS)))


def started(stage, policy, universal, more=(), merged=True):
    """A DeepSpeed engine; ``merged``: no group is so small that a process has nothing of it."""
    import deepspeed

    model = Model()
    *groups, dense, rest = groups_of(model, per_block=True)
    groups += [{**dense, "params": dense["params"] + rest["params"]}] if merged else [dense, rest]
    for index, group in enumerate(groups):
        group["number"] = index  # as a group may have its own learning rate
    optimizer = FusedGradDropAdamW(groups, **{**options(policy), **dict(more)})
    config = deepspeed_config(stage, **({"checkpoint": {"load_universal": True}} if universal else {}))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def universal_leg(folder, number, numbers, seed):
    """As leg(), from one universal checkpoint to the next."""
    done = {}
    for stage, policy in UNIVERSAL:
        engine = started(stage, policy, universal=number > 0)
        attach_deepspeed(engine)
        if number:
            engine.load_checkpoint(f"{folder}/{stage} {policy}", tag=f"universal {number - 1}")
        for each in numbers:
            begin_epoch(engine.basic_optimizer, each)
            deepspeed_step(engine, seed + each)
        save_universal(engine, f"{folder}/{stage} {policy}", number)
        optimizer = engine.basic_optimizer
        numbers_of_groups = [group["number"] for group in optimizer.param_groups]
        done[stage, policy] = found_in(optimizer, deepspeed_pieces(engine)), counts_of(optimizer), numbers_of_groups
    return done, universal_refusals(folder) if number == 1 else None


def save_universal(engine, folder, number):
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main

    engine.save_checkpoint(folder, tag=f"ranks {number}")
    if dist.get_rank() == 0:  # as python -m deepspeed.checkpoint.ds_to_universal
        main(Namespace(
            input_folder=f"{folder}/ranks {number}", output_folder=f"{folder}/universal {number}",
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
        ))  # fmt: skip
    dist.barrier()


def universal_refusals(folder):
    """What is said of what would go on wrongly, on three ranks."""
    said = []
    for stage, more, merged in ((1, {"amsgrad": True}, True), (3, {"seed": 12}, True), (1, {}, False)):
        engine = started(stage, "layer", True, more, merged)
        attach_deepspeed(engine)
        said.append(_error_of(lambda: engine.load_checkpoint(f"{folder}/{stage} layer", tag="universal 0")))  # noqa: B023
    engine = started(3, "layer", True)
    engine.load_checkpoint(f"{folder}/3 layer", tag="universal 0")
    said.append(_error_of(lambda: attach_deepspeed(engine)))
    engine = started(1, "layer", False)
    engine._config.zero_config.elastic_checkpoint = True
    said.append(_error_of(lambda: attach_deepspeed(engine)))
    return said


REFUSED = (
    "amsgrad=True: DeepSpeed's universal checkpoints have no max_exp_avg_sq",
    "saved with seed=11 .* this optimizer has seed=12",
    "parameter group 13 has 3 elements, none in the last process",
    "call it between deepspeed.initialize\\(\\) and engine.load_checkpoint",
    "elastic_checkpoint=True: DeepSpeed cannot load",
)


@needs_deepspeed
def test_deepspeed_goes_on_with_other_numbers_of_ranks(seed, tmp_path):
    for number, (world, numbers) in enumerate(UNIVERSAL_LEGS):
        by_rank, refused = zip(*run_ranks(world, universal_leg, str(tmp_path), number, numbers, seed, timeout=300))
        for said in filter(None, refused):
            for message, pattern in zip(said, REFUSED, strict=True):
                assert re.search(pattern, message), (pattern, message)
    for stage, policy in UNIVERSAL:
        for _, counts, numbers_of_groups in (done[stage, policy] for done in by_rank):
            assert counts == COUNTS and numbers_of_groups == list(range(len(numbers_of_groups))), (stage, policy)
        assert_trained_alike([done[stage, policy][0] for done in by_rank], policy, seed, 1)


def test_zero_refuses_the_state_of_another_run():
    for said in run_ranks(2, zero_of_another_seed):
        assert re.search("saved with seed=12 .* this optimizer has seed=11", said)
