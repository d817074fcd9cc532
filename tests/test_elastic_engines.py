"""Engines with optimizer states of their own making, saved on some ranks and loaded on others: training ends with the
bits of one process that trains in one go, on the same gradients.
"""

import copy
import itertools

import torch.distributed as dist
from ranks import run_ranks
from test_engines import ENGINES, POLICIES, STEPS, STEPS_PER_EPOCH, assert_trained_alike, begin_epoch, found_in

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
        counts = {tuple(map(group.get, ("completed_steps", "epoch", "epoch_history"))) for group in optimizer.param_groups}
        done[engine, policy] = save(owner, wrapper), found_in(optimizer, pieces), sorted(counts)
    return done


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


def test_engines_go_on_with_other_numbers_of_ranks(seed):
    saved = None
    for world, numbers in LEGS:
        by_rank = run_ranks(world, leg, list(FORMS), numbers, saved, seed, timeout=300)
        saved = {run: state for run, (state, _, _) in by_rank[0].items()}
    for engine, policy in itertools.product(FORMS, POLICIES):
        by_rank_of_run = [done[engine, policy] for done in by_rank]
        assert [counts for _, _, counts in by_rank_of_run] == [COUNTS] * world, (engine, policy)
        assert_trained_alike([found for _, found, _ in by_rank_of_run], policy, seed, 1)
