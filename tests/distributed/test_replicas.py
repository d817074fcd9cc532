"""Replicas that train on other data each, averaged over ranks: after 50 steps on real sentences they are still the same
bits. Masks drawn by each rank's own generator would part them at the first step.
"""

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist
from torch import nn

from graddrop_kernels import (
    FusedGradDropAdamW,
    GaussianGradDrop,
    GradDrop,
    GradDropEpoch,
    GradFreeze,
    LayerGradDrop,
    param_groups,
)
from graddrop_kernels.demo import sib200

STEPS, BATCH, LENGTH = 50, 4, 48
POLICIES = {
    "graddrop": lambda: GradDrop(0.3),
    "gaussian": lambda: GaussianGradDrop(0.3),
    "layer": lambda: LayerGradDrop(0.5),
    "epoch": lambda: GradDropEpoch(3, storage="bitpacked"),
    "toggle": lambda: GradDropEpoch(3, toggle=True),
    "freeze": lambda: GradFreeze(3),
}


def encoder():
    """A two-layer BERT over bytes, the same on every rank."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=257, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=LENGTH, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.0, num_labels=7,
        )
    )  # fmt: skip


def batches(own):
    """The rank's own sentences and topics, as bytes."""
    split = sib200.load("en", "train")
    for step in range(STEPS):
        picked = [(BATCH * (step * dist.get_world_size() + own) + i) % len(split.texts) for i in range(BATCH)]
        ids = torch.full((BATCH, LENGTH), 256)
        for row, i in zip(ids, picked):
            text = torch.tensor(list(split.texts[i].encode()[:LENGTH]))
            row[: len(text)] = text
        yield ids, torch.tensor([split.labels[i] for i in picked])


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def hsdp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(wrap, policies):
    """{policy: (losses, {name: the rank's elements of parameters and state})}"""
    found = {}
    for policy in policies:
        model = wrap(encoder())
        torch.manual_seed(dist.get_rank())  # dropout differs too
        optimizer = FusedGradDropAdamW(param_groups(model, weight_decay=0.1), lr=3e-3, mask=POLICIES[policy]())
        losses = []
        for step, (ids, labels) in enumerate(batches(dist.get_rank())):
            optimizer.set_epoch(3 * step // STEPS)
            loss = model(input_ids=ids, attention_mask=(ids != 256).long(), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        local = lambda tensor: tensor.to_local() if hasattr(tensor, "to_local") else tensor
        own = {}
        for name, param in model.named_parameters():
            tensors = {"": param.detach(), **optimizer.state[param]}
            own |= {f"{key} {name}": local(tensor) for key, tensor in tensors.items()}
        found[policy] = losses, own
    return found


@pytest.mark.parametrize("wrap, world, replicas", [(ddp, 2, [(0, 1)]), (hsdp, 4, [(0, 2), (1, 3)])])
def test_replicas_are_bit_identical_after_50_steps_on_real_text(wrap, world, replicas):
    policies = list(POLICIES) if wrap is ddp else list(POLICIES)[:3]
    by_rank = run_ranks(world, train, wrap, policies, timeout=240)
    for policy in policies:
        for a, b in replicas:
            first, second = by_rank[a][policy][1], by_rank[b][policy][1]
            assert first.keys() == second.keys()
            differing = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
            assert not differing, f"{policy}: replicas {a} and {b} differ in {differing}"
            assert by_rank[a][policy][0] != by_rank[b][policy][0], "they have had the same sentences"
