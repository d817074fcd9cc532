"""The methods of the studies by name: the paper's, four that save memory, masks on the update, and other optimizers."""

from graddrop_kernels.demo.methods import METHODS as STUDIED
from graddrop_kernels.policies import CycleBlocks, GradDrop, RandomMask, SampleBlocks
from graddrop_kernels.policies.paper import Method

# SIB-200 is trained for 132 steps in three epochs: twelve turns of eleven steps, so that e5-small's twelve blocks have
# two turns each on average, or one each.
TURN = 11

PAPERS = {name: method for name, method in STUDIED.items() if name != "skip-update"}
SAVING = {
    "lora": Method("LoRA, rank 8", "LoRA", lambda epochs, p: None),
    "sample-blocks": Method(
        "SampleBlocks, 2 at a time", "SampleBlocks", lambda epochs, p: SampleBlocks(2, TURN, idle_state="drop")
    ),
    "cycle-blocks": Method(
        "CycleBlocks, in random order", "CycleBlocks",
        lambda epochs, p: CycleBlocks(TURN, order="random", idle_state="drop"),
    ),
    "random-mask": Method("RandomMask, 5 %", "RandomMask", lambda epochs, p: RandomMask(0.05)),
}  # fmt: skip
# What runs/optimizer.py gives them beside their mask: arguments, or another optimizer.
UPDATES = {
    "skip-update": Method("SkipUpdate, half of the tensors", "SkipUpdate", STUDIED["skip-update"].make),
    "graddrop-update": Method('GradDrop, masked="update"', "GradDrop, update", lambda epochs, p: GradDrop(p)),
    "graddrop-cautious": Method("GradDrop, cautious decay", "GradDrop, cautious", lambda epochs, p: GradDrop(p)),
    "graddrop-sgd": Method("GradDrop on SGD with momentum", "SGD, GradDrop", lambda epochs, p: GradDrop(p)),
    "graddrop-muon": Method("GradDrop on Muon", "Muon, GradDrop", lambda epochs, p: GradDrop(p)),
}
BEYOND = {**SAVING, **UPDATES}
METHODS = {**PAPERS, **BEYOND}
ADAPTED = ("lora",)  # what is trained is an adapter and the head
