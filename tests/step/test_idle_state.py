"""idle_state="drop": moments exist for the blocks that have their turn only, and start at zero with it."""

import copy

import pytest
import torch
from toy import Encoder, bits, random_grads

from graddrop_kernels import CycleBlocks, FusedGradDropAdamW, SampleBlocks, param_groups
from graddrop_kernels.backends import capture
from graddrop_kernels.step import stepper

HYPERS = {"lr": 0.01, "betas": (0.8, 0.95)}
POLICIES = [SampleBlocks(2, 3, idle_state="drop"), CycleBlocks(2, "random", idle_state="drop")]
every_policy = pytest.mark.parametrize("mask", POLICIES, ids=repr)
MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


def make(mask, seed, **options):
    model = Encoder(blocks=5, dtype=options.pop("dtype", torch.float32))
    return model, FusedGradDropAdamW(param_groups(model, weight_decay=0.3), mask=mask, seed=seed, **HYPERS, **options)


def block_of(name):
    return ".".join(name.split(".")[:2]) if name.startswith("layer.") else None


def active_blocks(optimizer):
    masking = optimizer.masking
    return {block for block in masking.blocks(0) if masking.plan(0, block).kind == "keep"}


def assert_state(model, optimizer, active, names):
    """Moments of what is active and what is outside of the blocks; the rest keeps a count of 0, and its master."""
    for name, param in model.named_parameters():
        state = optimizer.state[param]
        if block_of(name) in (None, *active):
            assert MOMENTS & state.keys() == names and state["step"] > 0, name
        else:
            assert not MOMENTS & state.keys() and state["step"] == 0, name


@every_policy
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"dtype": torch.bfloat16, "master_weights": True}], ids=str)
def test_an_active_block_is_a_fresh_adamw_and_the_others_have_no_moments(mask, options, seed):
    """Each turn of a block beside a FusedGradDropAdamW without a mask, made for it when the turn began."""
    model, optimizer = make(mask, seed, **options)
    rng, fresh, before = torch.Generator().manual_seed(seed), None, set()
    names = MOMENTS if options.get("amsgrad") else MOMENTS - {"max_exp_avg_sq"}
    plain = {key: value for key, value in options.items() if key != "dtype"}
    for step in range(14):
        active = active_blocks(optimizer)
        twins = {name: param for name, param in model.named_parameters() if block_of(name) in active}
        if step % mask.every == 0:  # blocks that go on being active go on with their moments
            new = {name: param for name, param in twins.items() if block_of(name) not in before}
            fresh = {name: each for name, each in (fresh or {}).items() if name in twins}
            for name, param in new.items():
                twin = torch.nn.Parameter(param.detach().clone())
                decay = next(g['weight_decay'] for g in optimizer.param_groups if any(p is param for p in g['params']))
                own = FusedGradDropAdamW([(name, twin)], mask=None, weight_decay=decay, **HYPERS, **plain)
                if "master_param" in optimizer.state.get(param, {}):
                    own.state[twin]["master_param"] = optimizer.state[param]["master_param"].clone()
                fresh[name] = twin, own
        idle = {name: bits(param) for name, param in model.named_parameters() if block_of(name) not in (None, *active)}
        random_grads(model.parameters(), rng)
        for name, (twin, own) in fresh.items():
            twin.grad = twins[name].grad.clone()
            own.step()
        optimizer.step()
        assert_state(model, optimizer, active, names)
        for name, (twin, _) in fresh.items():
            assert bits(twin) == bits(twins[name]), (step, name)
        assert all(bits(model.get_parameter(name)) == value for name, value in idle.items())
        before = active


@every_policy
def test_freed_memory_is_freed(mask, seed):
    """No tensor of moments of an idle block is alive after the step, whoever else has looked at it."""
    import gc
    import weakref

    model, optimizer = make(mask, seed)
    rng, alive = torch.Generator().manual_seed(seed), {}
    for _ in range(9):
        active = active_blocks(optimizer)
        random_grads(model.parameters(), rng)
        optimizer.step()
        for name, param in model.named_parameters():
            state = optimizer.state[param]
            alive[name] = [*alive.get(name, []), *(weakref.ref(state[key]) for key in MOMENTS & state.keys())]
        gc.collect()
        for name, refs in alive.items():
            if block_of(name) not in (None, *active):
                assert not any(ref() is not None for ref in refs), name


@every_policy
def test_a_resume_in_the_middle_of_a_turn_has_the_same_bits(mask, seed):
    model, optimizer = make(mask, seed)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(5):  # no multiple of either's turn
        random_grads(model.parameters(), rng)
        optimizer.step()
    twin, resumed = make(mask, seed)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    assert all(bits(copied.state[one].get("exp_avg")) == bits(optimizer.state[two].get("exp_avg"))
               for one, two in zip(copied.state, optimizer.state))  # fmt: skip
    for step in range(6):
        for each in (model, twin):
            random_grads(each.parameters(), torch.Generator().manual_seed(seed + step))
        optimizer.step()
        resumed.step()
    for (name, one), two in zip(model.named_parameters(), twin.parameters()):
        assert bits(one) == bits(two), name
        assert {key: bits(value) for key, value in optimizer.state[one].items()} == {
            key: bits(value) for key, value in resumed.state[two].items()
        }, name


@every_policy
def test_skip_dropped_trains_the_same_and_makes_no_gradients_of_idle_blocks(mask, seed):
    (model, optimizer), (twin, plain) = make(mask, seed), make(mask, seed)
    ids = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(seed))
    for step in range(8):
        active = active_blocks(optimizer)
        with optimizer.skip_dropped():
            model(ids).square().sum().backward()
        twin(ids).square().sum().backward()
        made = {block_of(name) for name, param in model.named_parameters() if param.grad is not None}
        assert made - {None} == active, (step, made)
        for each in (optimizer, plain):
            each.step()
            each.zero_grad()
        for (name, one), two in zip(model.named_parameters(), twin.parameters()):
            assert bits(one) == bits(two), (step, name)
        assert optimizer.param_groups[0]["completed_steps"] == step + 1


def test_in_the_backward_pass_the_training_is_the_same(seed):
    mask = POLICIES[0]
    (model, optimizer), (twin, plain) = make(mask, seed), make(mask, seed)
    optimizer.step_in_backward()
    ids = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(seed))
    for step in range(7):
        active = active_blocks(plain)
        for each, its in ((model, optimizer), (twin, plain)):
            each(ids).square().sum().backward()
            if each is model:  # not even between the passes
                idle = [param for name, param in model.named_parameters() if block_of(name) not in (None, *active)]
                assert not any(MOMENTS & optimizer.state.get(param, {}).keys() for param in idle)
            its.step()
            its.zero_grad()
        assert_state(model, optimizer, active, MOMENTS - {"max_exp_avg_sq"})
        for (name, one), two in zip(model.named_parameters(), twin.parameters()):
            assert bits(one) == bits(two), (step, name)


def test_a_compiled_step_is_the_eager_one(seed):
    mask = POLICIES[1]
    (model, optimizer), (twin, plain) = make(mask, seed), make(mask, seed)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(5):
        for each in (model, twin):
            random_grads(each.parameters(), torch.Generator().manual_seed(seed + step))
        active = active_blocks(plain)
        compiled()
        plain.step()
        assert_state(model, optimizer, active, MOMENTS - {"max_exp_avg_sq"})
        for (name, one), two in zip(model.named_parameters(), twin.parameters()):
            assert bits(one) == bits(two), (step, name)


def test_a_capture_is_refused(seed, monkeypatch):
    model, optimizer = make(POLICIES[0], seed)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    optimizer.step()
    before = {param: dict(state) for param, state in optimizer.state.items()}
    monkeypatch.setattr(capture, "capturing", lambda device: True)
    monkeypatch.setattr(stepper, "check_capture", lambda *_, **__: None)  # which refuses the backends of a CPU
    with pytest.raises(RuntimeError, match="idle_state='drop' frees and makes moments"):
        optimizer.step()
    assert all(state.keys() == before[param].keys() for param, state in optimizer.state.items())


def test_an_error_of_the_step_frees_nothing(seed):
    model, optimizer = make(CycleBlocks(1, idle_state="drop"), seed)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    optimizer.step()
    before = {name: set(optimizer.state[param]) for name, param in model.named_parameters()}
    model.head.weight.grad = torch.ones(3, 6).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert {name: set(optimizer.state[param]) for name, param in model.named_parameters()} == before
    assert optimizer.param_groups[0]["completed_steps"] == 1


def test_a_norm_of_all_gradients_is_refused_with_the_remedy(seed):
    model, optimizer = make(POLICIES[0], seed, max_grad_norm=1.0)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    with pytest.raises(ValueError, match="norm_after_mask=True"):
        optimizer.step()
    assert not optimizer.state
    optimizer.norm_after_mask = True
    optimizer.step()
    kept = [param for name, param in model.named_parameters() if MOMENTS & optimizer.state[param].keys()]
    norm = torch.cat([param.grad.flatten() for param in kept]).norm()
    assert torch.allclose(optimizer.grad_norm, norm)


def test_what_cannot_drop_its_state_is_refused(seed):
    for option in ("stochastic_rounding", "stochastic_moments"):
        model, optimizer = make(POLICIES[0], seed, dtype=torch.bfloat16, **{option: True})
        random_grads(model.parameters(), torch.Generator().manual_seed(seed))
        with pytest.raises(ValueError, match=f"{option}=True draws, so every turn would have the same noise"):
            optimizer.step()
        assert not optimizer.state
    with pytest.raises(ValueError, match="idle_state='drop' of SampleBlocks needs masked='frozen'"):
        make(POLICIES[0], seed, masked="gradient")
    optimizer = FusedGradDropAdamW(param_groups(Encoder(), per_block=True), mask=POLICIES[1])
    flat = torch.ones(10)
    optimizer.param_groups[0].update(params=[flat], param_names=["flat"])  # as an engine does
    optimizer.attach_pieces({flat: [("layer.0.linear.weight", 0, 0, 10)]})
    flat.grad = torch.ones(10)
    with pytest.raises(ValueError, match="cannot free the moments of blocks within a flat buffer"):
        optimizer.step()


def test_a_master_of_another_shape_is_refused_by_the_load(seed):
    model, optimizer = make(POLICIES[1], seed, dtype=torch.bfloat16, master_weights=True)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    for _ in range(3):
        optimizer.step()
    file = optimizer.state_dict()
    dropped = next(state for state in file["state"].values() if "master_param" in state and "exp_avg" not in state)
    dropped["master_param"] = torch.ones(3)
    with pytest.raises(ValueError, match="master_param in the state dict has shape"):
        make(POLICIES[1], seed, dtype=torch.bfloat16, master_weights=True)[1].load_state_dict(file)


def test_a_step_without_gradients_counts_nothing(seed):
    model, optimizer = make(POLICIES[0], seed)
    random_grads(model.parameters(), torch.Generator().manual_seed(seed))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.param_groups[0]["completed_steps"] == 1


@pytest.mark.parametrize(
    "make_policy", [lambda: SampleBlocks(1, 1, idle_state="free"), lambda: CycleBlocks(1, idle_state=0)]
)
def test_refused_values(make_policy):
    with pytest.raises(ValueError, match=r"\(idle_state=\) must be 'keep' or 'drop'"):
        make_policy()
