"""optimizer.skip_dropped() with several processes: the training of a run under the same wrapper that skips nothing."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_skip_backward import IDS, Net, make, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

BLOCK_FLOPS = 2 * IDS[0] * IDS[1] * 6 * 6  # of the weight gradient of its Linear, a micro-batch


class Wrapped:
    """A model as its ranks train it: ``parameters`` and calls are the wrapper's, the data each rank's own."""

    def __init__(self, model, wrapper):
        self.model, self.wrapper = model, wrapper

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, ids):
        return self.wrapper((ids + 3 * dist.get_rank()) % 7)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def summary(model, optimizer):
    """Parameters, state and counters, whole."""
    names = {param: name for name, param in model.named_parameters()}
    found = {name: whole(param) for param, name in names.items()}
    for param, state in optimizer.state.items():
        found |= {f"{key} of {names[param]}": whole(value) for key, value in state.items()}
    counters = [(group["completed_steps"], group["epoch_history"]) for group in optimizer.param_groups]
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()} | {"counters": counters}


def trained(kind, skipping, seed, policy):
    """(summary, blocks whose gradients were spared, FLOPs) of one run of 9 steps."""
    net = Net()
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in net.layer:
            fully_shard(block, mesh=mesh)
        wrapper = fully_shard(net, mesh=mesh)
    else:
        view = kind == "ddp, bucket views"
        wrapper = DistributedDataParallel(net, find_unused_parameters=True, gradient_as_bucket_view=view)
    model, optimizer = make(policy, seed, net)
    skip = (lambda: optimizer.skip_dropped(None if kind == "fsdp2" else wrapper)) if skipping else None
    pair = Wrapped(model, wrapper), optimizer
    with FlopCounterMode(display=False) as counter:
        spared = run(pair, skip, seed, range(9))
    return summary(model, optimizer), spared // 4, counter.get_total_flops()  # weights and biases of Linear and norm


def train_both(kind, seed):
    warnings.simplefilter("ignore")  # that all blocks of a step may be unused
    return [[trained(kind, skipping, seed, policy) for skipping in (True, False)] for policy in ("layer", "freeze")]


@pytest.mark.parametrize("kind", ["ddp", "ddp, bucket views", "fsdp2"])
def test_the_training_is_that_of_a_run_that_skips_nothing(kind, seed):
    """Two micro-batches a step; other data on the other rank."""
    ranks = run_ranks(2, train_both, kind, seed)
    for skipped, other in (policy for rank in ranks for policy in rank):
        assert skipped[0].keys() == other[0].keys()
        assert [name for name in other[0] if skipped[0][name] != other[0][name]] == []
        assert skipped[1] > 0 == other[1]
        assert other[2] - skipped[2] == skipped[1] * 2 * BLOCK_FLOPS
    assert [policy[0][0] for policy in ranks[0]] == [policy[0][0] for policy in ranks[1]]


def refusals(seed):
    messages = []
    for wrap in (
        lambda net: None,
        DistributedDataParallel,
        lambda net: DistributedDataParallel(net, static_graph=True),
        lambda net: FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu")),
    ):
        net = Net()
        _, optimizer = make("layer", seed, net)
        wrapper = wrap(net)
        with contextlib.suppress(ZeroDivisionError):
            try:
                with optimizer.skip_dropped(wrapper):
                    messages.append("entered")
            except RuntimeError as error:
                messages.append(str(error))
        ids = torch.zeros(IDS, dtype=torch.long)
        (net if wrapper is None else wrapper)(ids)
    return messages


def test_what_cannot_work_is_refused(seed):
    words = ("pass the wrapped model", "find_unused_parameters=True", "static_graph=True", "FSDP2")
    for messages in run_ranks(2, refusals, seed):
        assert len(messages) == len(words)
        for message, word in zip(messages, words):
            assert word in message, messages
