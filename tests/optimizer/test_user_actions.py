"""Random sequences of user actions beside torch.optim.AdamW: see support/user_actions.py."""

import collections

import pytest
from user_actions import ACTIONS, run


@pytest.mark.filterwarnings("ignore")  # of torch, about gradients in other strides
@pytest.mark.parametrize("block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10))])
def test_sequences_of_user_actions(block, seed):
    refusals = collections.Counter()
    for i in range(40):
        run(seed + 40 * block + i, refusals)
    assert refusals, "no sequence meets a refusal: the actions have become harmless"


def test_every_action_occurs():
    assert len(set(ACTIONS)) == 29
