"""TrainRows in a step: the bits of a fixed mask of the same rows, in every mode, on moments of these rows alone."""

import copy
from unittest.mock import Mock

import pytest
import torch
from toy import bits, emulate_cuda, refused, through_a_file

from graddrop_kernels import FixedMask, FusedGradDropAdamW, TrainRows, available_backends
from graddrop_kernels.backends.batch import TensorBatch
from graddrop_kernels.policies import Rows

ROWS = {"embedding": [3, 4, 17, -1], "bias": slice(40, None), "experts": [1], "conv": torch.arange(8) % 3 == 0}
SHAPES = {"embedding": (50, 6), "bias": (50,), "experts": (4, 5, 3), "conv": (8, 3, 2, 2), "dense": (7, 2)}
MODES = {
    "float32": (torch.float32, {}),
    "amsgrad": (torch.float32, {"amsgrad": True, "maximize": True}),
    "bfloat16 moments": (torch.float32, {"moment_dtype": torch.bfloat16}),
    "bfloat16": (torch.bfloat16, {}),
    "float32 moments": (torch.bfloat16, {"moment_dtype": torch.float32}),
    "masters": (torch.bfloat16, {"master_weights": True}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
    "stochastic moments": (torch.float32, {"moment_dtype": torch.bfloat16, "stochastic_moments": True}),
    "clipped": (torch.float32, {"max_grad_norm": 0.5}),
    "clipped masters": (torch.bfloat16, {"max_grad_norm": 0.5, "master_weights": True}),
    "clipped after the mask": (torch.float32, {"max_grad_norm": 0.5, "norm_after_mask": True}),
}
BACKENDS = [name for name in ("cpu", "exact", "reference") if name in available_backends()] + ["cuda"]
HYPERS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "seed": 11}


def parameters(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    found["conv"] = found["conv"].contiguous(memory_format=torch.channels_last)
    return {name: torch.nn.Parameter(value) for name, value in found.items()}


def kept(name):
    rows = torch.zeros(SHAPES[name][0], dtype=torch.bool)
    rows[ROWS[name] if not isinstance(ROWS[name], list) else torch.tensor(ROWS[name])] = True
    return rows


def fixed(rest="dense"):
    """The same masks, a bit per element."""
    rows = {name: kept(name).view(-1, *[1] * (len(SHAPES[name]) - 1)).expand(SHAPES[name]).clone() for name in ROWS}
    return FixedMask(rows | ({} if rest == "dense" else {"dense": torch.zeros(SHAPES["dense"], dtype=torch.bool)}))


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(params, optimizer, steps, seed):
    for step in steps:
        give_gradients(params, seed + step)
        optimizer.step()


def values(params):
    return {name: bits(param) for name, param in params.items()}


@pytest.mark.filterwarnings("ignore:two optimizers are stepped in turn")
@pytest.mark.parametrize("rest", ["dense", "frozen"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_has_the_bits_of_a_fixed_mask_of_the_same_rows(backend, mode, rest, seed, monkeypatch):
    if backend == "cuda":
        emulate_cuda(monkeypatch)
    dtype, options = MODES[mode]
    before, pairs = parameters(seed, dtype), []
    for mask in (TrainRows(ROWS, rest), fixed(rest)):
        params = copy.deepcopy(before)
        optimizer = FusedGradDropAdamW(params.items(), mask=mask, backend=backend, **HYPERS, **options)
        train(params, optimizer, range(5), seed)
        pairs.append((params, optimizer))
    (params, ours), (_, theirs) = pairs
    assert values(params) == values(pairs[1][0])
    assert (ours.grad_norm is None) == ("max_grad_norm" not in options)
    if ours.grad_norm is not None:  # the squares are added up in another order
        assert ours.grad_norm.item() == pytest.approx(theirs.grad_norm.item(), rel=1e-6)
    for name, param in params.items():
        state, other = ours.state[param], theirs.state[pairs[1][0][name]]
        trained = kept(name) if name in ROWS else torch.full(SHAPES[name][:1], rest == "dense")
        assert torch.equal(param[~trained], before[name][~trained])
        assert name not in ROWS or not torch.equal(param[trained], before[name][trained])
        assert ours.mask(name).shape == param.shape and torch.equal(ours.mask(name), theirs.mask(name))
        for key in state.keys() - {"step"}:
            assert bits(state[key].contiguous()) == bits(other[key][trained].contiguous()), (name, key)
        assert state["step"] == 5
    assert ours.active_fraction() == pytest.approx(theirs.active_fraction())


def test_moments_and_masters_are_those_of_the_trained_rows(seed):
    params = parameters(seed, torch.bfloat16)
    optimizer = FusedGradDropAdamW(params.items(), mask=TrainRows(ROWS, "frozen"), master_weights=True, **HYPERS)
    told = optimizer.memory()["peak"]
    train(params, optimizer, range(1), seed)
    elements = 4 * 6 + 10 + 15 + 3 * 12  # of the rows
    assert told["masters"] == 4 * elements and told["moments"] == 8 * elements + 4 * len(params)
    assert {kind: optimizer.memory()["now"][kind] for kind in ("masters", "moments")} == {
        kind: told[kind] for kind in ("masters", "moments")
    }
    assert optimizer.state[params["embedding"]]["exp_avg"].shape == (4, 6)
    assert optimizer.state[params["dense"]]["exp_avg"].shape == (0, 2)


def test_rows_alone_are_stepped_as_a_parameter_of_these_rows_would_be(seed):
    """The bits of plain AdamW on the rows, with decay and momentum; the others do not move in 200 steps."""
    params, rows = {"embedding": parameters(seed)["embedding"]}, kept("embedding")
    before = params["embedding"].detach().clone()
    alone = {"embedding": torch.nn.Parameter(before[rows])}
    ours = FusedGradDropAdamW(params.items(), mask=TrainRows({"embedding": ROWS["embedding"]}), **HYPERS)
    plain = FusedGradDropAdamW(alone.items(), mask=None, **HYPERS)
    for step in range(200):
        give_gradients(params, seed + step)
        alone["embedding"].grad = params["embedding"].grad[rows]
        ours.step()
        plain.step()
    assert bits(params["embedding"].detach()[rows]) == bits(alone["embedding"])
    assert bits(params["embedding"].detach()[~rows]) == bits(before[~rows])


def test_a_gradient_that_is_not_finite_in_other_rows_changes_nothing(seed):
    params = parameters(seed)
    optimizer = FusedGradDropAdamW(params.items(), mask=TrainRows(ROWS), **HYPERS)
    train(params, optimizer, range(2), seed)
    give_gradients(params, seed)
    params["embedding"].grad[~kept("embedding")] = float("nan")
    optimizer.step()
    assert all(param.isfinite().all() for param in params.values())


def test_many_runs_of_rows_are_stepped_too(seed):
    """Every other row: thousands of spans."""
    weight = torch.nn.Parameter(torch.randn(5000, 3, generator=torch.Generator().manual_seed(seed)))
    before = weight.detach().clone()
    optimizer = FusedGradDropAdamW([("weight", weight)], mask=TrainRows({"weight": slice(0, None, 2)}), **HYPERS)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(weight[1::2], before[1::2]) and (weight[::2] < before[::2] - 0.03).all()
    assert optimizer.state[weight]["step"] == 3


def test_scattered_rows_of_other_strides_are_one_batch(seed, monkeypatch):
    """The hulls of their memory overlap. A batch for each would copy the whole tensor as often as there are rows."""
    weight = torch.nn.Parameter(torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)).t())
    before, called, step_with = weight.detach().clone(), [], TensorBatch.step_with
    monkeypatch.setattr(TensorBatch, "step_with", lambda *given: (called.append(1), step_with(*given)))
    optimizer = FusedGradDropAdamW([("weight", weight)], mask=TrainRows({"weight": slice(0, None, 2)}), **HYPERS)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert len(called) == 1 and torch.equal((weight != before).all(1), torch.arange(50) % 2 == 0)


def test_the_text_of_the_rows_is_made_once(seed, monkeypatch):
    """It is long if the rows are many, and was made and read once per parameter, in the backward pass for each pair."""
    params = parameters(seed)
    mask, calls = TrainRows(ROWS, "frozen"), Mock(wraps=Rows.parse)
    monkeypatch.setattr(TrainRows, "_values", None)
    optimizer = FusedGradDropAdamW(params.items(), mask=mask, **HYPERS)
    train(params, optimizer, range(2), seed)
    saved = optimizer.state_dict()
    monkeypatch.setattr(Rows, "parse", calls)
    optimizer.load_state_dict(saved)
    assert not calls.called
    optimizer.step_in_backward()
    optimizer.zero_grad()
    sum(param.sum() for param in params.values()).backward()
    optimizer.step()
    assert optimizer.state[params["bias"]]["step"] == 3


def test_a_step_count_that_is_set_holds_for_all_rows(seed):
    """In place, as a load past load_state_dict() does. Only the first of the rows counts in the parameter's own."""
    weight = torch.nn.Parameter(torch.ones(9, 3))
    optimizer = FusedGradDropAdamW([("weight", weight)], mask=TrainRows({"weight": [0, 4, 8]}), **HYPERS)
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.state[weight]["step"].fill_(50)
    assert torch.equal(weight[0], weight[4]) and torch.equal(weight[0], weight[8]) and (weight[0] < 1).all()


def test_a_parameter_that_comes_without_the_rows_is_refused(seed):
    """In the place of another, after the optimizer was made, as resize_token_embeddings() would have it."""
    params = parameters(seed)
    optimizer = FusedGradDropAdamW(params.items(), mask=TrainRows(ROWS), **HYPERS)
    smaller = torch.nn.Parameter(torch.ones(2, 6))
    smaller.grad = torch.ones_like(smaller)
    optimizer.param_groups[0]["params"][0] = smaller
    said = r"'embedding' of shape \(2, 6\) is given rows 3:5, but there are 2 rows"
    with refused(ValueError, said, params=[smaller]):
        optimizer.step()


def test_complex_rows(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(6, 3, generator=generator, dtype=torch.complex64))
    before = weight.detach().clone()
    optimizer = FusedGradDropAdamW([("weight", weight)], mask=TrainRows({"weight": [1, 4]}), **HYPERS)
    alone = torch.nn.Parameter(before[[1, 4]])
    plain = FusedGradDropAdamW([("weight", alone)], mask=None, **HYPERS)
    for _ in range(3):
        weight.grad = torch.randn(6, 3, generator=generator, dtype=torch.complex64)
        alone.grad = weight.grad[[1, 4]]
        optimizer.step()
        plain.step()
    assert torch.equal(weight[[1, 4]], alone) and torch.equal(weight[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


# Checkpoints.


def made(seed, mask, **options):
    params = parameters(seed)
    return params, FusedGradDropAdamW(params.items(), mask=mask, **HYPERS, **options)


def moved_on(pairs, seed):
    for params, optimizer in pairs:
        train(params, optimizer, range(3, 6), seed)
    (one, ours), (other, theirs) = pairs
    return values(one) == values(other) and all(
        bits(ours.state[one[name]][key]) == bits(theirs.state[other[name]][key])
        for name in SHAPES
        for key in ("exp_avg", "exp_avg_sq", "step")
    )


@pytest.mark.filterwarnings("ignore:two optimizers are stepped in turn")
def test_a_run_goes_on_from_its_checkpoint(seed):
    pairs = [made(seed, TrainRows(ROWS)), made(seed, TrainRows(ROWS))]
    train(*pairs[0], range(3), seed)
    for name, param in pairs[1][0].items():
        param.data.copy_(pairs[0][0][name].data)
    pairs[1][1].load_state_dict(through_a_file(pairs[0][1].state_dict()))
    assert pairs[1][1].state[pairs[1][0]["embedding"]]["exp_avg"].shape == (4, 6)
    assert moved_on(pairs, seed)


@pytest.mark.filterwarnings("ignore:two optimizers are stepped in turn")
def test_a_checkpoint_of_all_rows_is_taken_and_given(seed):
    """As one of a sharded run under the same mask, or of a dense run with strict=False."""
    whole = made(seed, fixed())
    train(*whole, range(3), seed)
    saved = whole[1].state_dict()
    params, optimizer = copy.deepcopy(whole[0]), None
    optimizer = FusedGradDropAdamW(params.items(), mask=TrainRows(ROWS), **HYPERS)
    with refused(ValueError, "its masks would differ", optimizer=optimizer):
        optimizer.load_state_dict(saved)
    optimizer.load_state_dict(saved, strict=False)
    state = optimizer.state[params["embedding"]]
    assert bits(state["exp_avg"]) == bits(whole[1].state[whole[0]["embedding"]]["exp_avg"][kept("embedding")])
    back = FusedGradDropAdamW(copy.deepcopy(whole[0]).items(), mask=fixed(), **HYPERS)
    back.load_state_dict(optimizer.state_dict(), strict=False)
    assert state_bits_of(back) == state_bits_of(whole[1])  # the other rows' moments were 0
    train(params, optimizer, range(3, 6), seed)
    train(*whole, range(3, 6), seed)
    assert values(params) == values(whole[0])


def state_bits_of(optimizer):
    params = optimizer.param_groups[0]["params"]
    return [{key: bits(value) for key, value in optimizer.state[param].items()} for param in params]


def test_masters_of_rows_that_were_frozen_are_the_weights(seed):
    params = {"embedding": torch.nn.Parameter(parameters(seed)["embedding"].detach().bfloat16())}
    optimizer = FusedGradDropAdamW(params.items(), mask=TrainRows({"embedding": [5, 6]}), master_weights=True, **HYPERS)
    train(params, optimizer, range(2), seed)
    dense = FusedGradDropAdamW(params.items(), mask=None, master_weights=True, **HYPERS)
    dense.load_state_dict(optimizer.state_dict(), strict=False)
    master = dense.state[params["embedding"]]["master_param"]
    assert torch.equal(master[:5], params["embedding"][:5].float())
    assert torch.equal(master[5:7], optimizer.state[params["embedding"]]["master_param"])


@pytest.mark.parametrize("rows", [[5, 6], [6, 9]])
def test_moments_and_masters_of_other_rows_of_the_same_number_are_not_taken(rows, seed):
    params = {"embedding": torch.nn.Parameter(parameters(seed)["embedding"].detach().bfloat16())}
    options = {**HYPERS, "amsgrad": True, "master_weights": True}
    old = FusedGradDropAdamW(params.items(), mask=TrainRows({"embedding": [6, 7]}), **options)
    train(params, old, range(2), seed)
    new = FusedGradDropAdamW(params.items(), mask=TrainRows({"embedding": rows}), **options)
    new.load_state_dict(old.state_dict(), strict=False)
    weight, at = params["embedding"], rows.index(6)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param"):
        value = new.state[weight][key]
        others = weight[rows[1 - at]].float() if key == "master_param" else torch.zeros(6)
        assert torch.equal(value[at], old.state[weight][key][0]) and torch.equal(value[1 - at], others), key


def test_rows_of_another_parameter_are_refused(seed):
    saved = made(seed, TrainRows({"embedding": [1, 2, 3]}))
    train(*saved, range(1), seed)
    other = made(seed, TrainRows({"embedding": slice(40, None)}))
    with refused(ValueError, "construct it with the same one", optimizer=other[1]):
        other[1].load_state_dict(saved[1].state_dict())
    smaller = {**parameters(seed), "embedding": torch.nn.Parameter(torch.ones(3, 6))}
    optimizer = FusedGradDropAdamW(smaller.items(), mask=None, **HYPERS)
    state = saved[1].state_dict()
    state["param_groups"][0]["mask"] = TrainRows({"embedding": [40, 41]}).to_json()
    with refused(ValueError, "exp_avg in the state dict has shape", optimizer=optimizer):
        FusedGradDropAdamW(parameters(seed).items(), mask=None, **HYPERS).load_state_dict(state, strict=False)


def test_the_refusal_of_many_other_rows_is_short_and_shows_where_they_differ():
    weight = torch.nn.Parameter(torch.ones(9000, 2))
    masks = [TrainRows({"weight": [*range(0, 8000, 2), last]}) for last in (8500, 8501)]
    one, other = (FusedGradDropAdamW([("weight", weight)], mask=mask) for mask in masks)
    with pytest.raises(ValueError, match=r"mask=\.\.\..{,70},8500\".*mask=\.\.\..{,70},8501\"") as error:
        other.load_state_dict(one.state_dict())
    assert len(str(error.value)) < 600


@pytest.mark.filterwarnings("ignore:two optimizers are stepped in turn")
def test_the_mask_of_a_group_cannot_change_under_its_state(seed):
    params, optimizer = made(seed, TrainRows(ROWS))
    train(params, optimizer, range(1), seed)
    optimizer.param_groups[0]["mask"] = TrainRows({"embedding": [1]}).to_json()
    give_gradients(params, seed)
    with refused(ValueError, "exp_avg of 'embedding' has shape", "or its mask", optimizer=optimizer):
        optimizer.step()
