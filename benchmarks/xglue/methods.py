"""The methods of the studies by name: the paper's, and four that are beyond it, for their memory."""

from graddrop_kernels.demo.methods import METHODS as PAPERS
from graddrop_kernels.policies import CycleBlocks, RandomMask, SampleBlocks
from graddrop_kernels.policies.paper import Method

# SIB-200 is trained for 132 steps in three epochs: twelve turns of eleven steps, so that e5-small's twelve blocks have
# two turns each on average, or one each.
TURN = 11

BEYOND = {
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
METHODS = {**PAPERS, **BEYOND}
ADAPTED = ("lora",)  # what is trained is an adapter and the head
