"""attach_mask on optimizers of torch and of others: each trains as one that is fed gradients masked by hand.

The oracle is FusedGradDropAdamW with beta1 = 0 and masked="gradient": its exp_avg is the masked gradient, bit for bit.
"""

import itertools

import pytest
import torch
from cases import ISAS, assert_same_bits, ulps_apart
from toy import BLOCK_POLICIES, POLICIES, ROUNDED_ONCE, Encoder, bits, emulate_cuda

from graddrop_kernels import FusedGradDropAdamW, GradDrop, GradDropEpoch, LayerGradDrop, attach_mask, param_groups
from graddrop_kernels.attached import gradients
from graddrop_kernels.backends import cpu
from graddrop_kernels.groups.spans import spans_of
from graddrop_kernels.masks.row_block import RowBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*GradDropEpoch.*toggle=True", "ignore:two optimizers are stepped")
STEPS, PER_EPOCH = 13, 4


def _lion(params):
    return pytest.importorskip("lion_pytorch").Lion(params, lr=3e-3, betas=(0.8, 0.9), weight_decay=0.1)


def _bitsandbytes(params):
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.optim.AdamW8bit(params, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, min_8bit_size=16)


def _schedule_free(params):
    module = pytest.importorskip("schedulefree")
    optimizer = module.AdamWScheduleFree(params, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, warmup_steps=3)
    optimizer.train()
    return optimizer


def _hugging_face(params):
    module = pytest.importorskip("transformers.optimization")
    return module.Adafactor(params, lr=None, warmup_init=True, weight_decay=0.1)


_SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "sgd momentum": lambda params: torch.optim.SGD(params, **_SGD, dampening=0.3, maximize=True, foreach=False),
    "sgd nesterov": lambda params: torch.optim.SGD(params, **_SGD, nesterov=True, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, 0.02, (0.8, 0.95), 1e-3, 0.2, amsgrad=True),
    "adamw fused": lambda params: torch.optim.AdamW(params, 0.02, (0.8, 0.95), 1e-3, 0.2, fused=True, maximize=True),
    "adam foreach": lambda params: torch.optim.Adam(params, 0.02, foreach=True, weight_decay=0.1),
    "adafactor": lambda params: torch.optim.Adafactor(params, 0.02, weight_decay=0.1),
    "rmsprop": lambda params: torch.optim.RMSprop(params, 0.02, momentum=0.5, centered=True),
    "adagrad": lambda params: torch.optim.Adagrad(params, 0.1, lr_decay=0.1),
    "muon": lambda params: torch.optim.Muon([p for p in params if p.dim() == 2], 0.02, weight_decay=0.2, momentum=0.8),
    "lion": _lion,
    "8-bit adamw": _bitsandbytes,
    "schedule-free adamw": _schedule_free,
    "adafactor of transformers": _hugging_face,
}


class MaskedByHand:
    """The masked gradients of a training, from the exp_avg of a FusedGradDropAdamW over the same names."""

    def __init__(self, policy):
        model = Encoder()
        self.named = dict(model.named_parameters())
        groups = [{"params": list(self.named.items())}]
        if policy.needs_blocks:
            groups[0] |= {"blocks": [f"layer.{i}" for i in range(3)], "param_blocks": list(map(_block_of, self.named))}
        masked = None if policy.masked is None else "gradient"
        self.optimizer = FusedGradDropAdamW(
            groups, lr=0.01, betas=(0.0, 0.9), mask=policy, seed=11, masked=masked, backend=ROUNDED_ONCE
        )

    def __call__(self, grads):
        for name, param in self.named.items():
            param.grad = grads.get(name)
        self.optimizer.step()
        return {name: self.optimizer.state[self.named[name]]["exp_avg"].clone() for name in grads}


def _block_of(name):
    return ".".join(name.split(".")[:2]) if name.startswith("layer") else None


def gradients_of(model, seed, step):
    generator = torch.Generator().manual_seed(seed + step)
    return {name: torch.randn(param.shape, generator=generator) for name, param in model.named_parameters()}


def give(model, grads):
    for name, param in model.named_parameters():
        param.grad = None if grads.get(name) is None else grads[name].clone()


def assert_alike(model, other, what):
    for (name, param), (_, expected) in zip(model.named_parameters(), other.named_parameters()):
        assert_same_bits(param, expected, f"{what}: {name}")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_trains_on_masked_gradients(kind, seed, one_thread):
    policy = GradDrop(p=0.3)
    by_hand = MaskedByHand(policy)
    model, other = Encoder(), Encoder()
    optimizer, plain = (OPTIMIZERS[kind](list(each.parameters())) for each in (model, other))
    attach_mask(optimizer, policy, named_parameters=model.named_parameters(), seed=11)
    stepped = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for step in range(STEPS):
        grads = gradients_of(model, seed, step)
        masked = by_hand(grads)
        give(model, grads)
        give(other, masked)
        optimizer.step()
        plain.step()
        for name, param in model.named_parameters():
            if id(param) in stepped and "schedule-free" not in kind:  # which changes gradients itself
                assert_same_bits(param.grad, masked[name], f"the gradient of {name}, step {step}")
        assert_alike(model, other, f"step {step}")
    assert any(not torch.equal(param, start) for param, start in zip(model.parameters(), Encoder().parameters()))


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("rows", "plain", "skip-update")])
def test_every_policy_has_the_bits_of_the_fused_step(name, seed):
    """Over three epochs. A policy that freezes by default has the bits of a fused step with masked='gradient'."""
    policy = POLICIES[name](Encoder())
    by_hand = MaskedByHand(policy)
    model, other = Encoder(), Encoder()
    optimizer = torch.optim.SGD(model.parameters(), **_SGD)
    plain = torch.optim.SGD(other.parameters(), **_SGD)
    masked = None if policy.masked is None else "gradient"
    handle = attach_mask(optimizer, policy, model=model, seed=11, masked=masked)
    different = False
    for step in range(STEPS):
        if step % PER_EPOCH == 0:
            handle.set_epoch(step // PER_EPOCH)
            by_hand.optimizer.set_epoch(step // PER_EPOCH)
        for param_name, param in by_hand.named.items():
            assert torch.equal(handle.mask(param_name), by_hand.optimizer.mask(param)), (param_name, step)
        grads = gradients_of(model, seed, step)
        expected = by_hand(grads)
        give(model, grads)
        give(other, expected)
        optimizer.step()
        plain.step()
        assert_alike(model, other, f"step {step}")
        different |= any(not torch.equal(grads[each], expected[each]) for each in grads)
    assert different


@pytest.mark.parametrize("name", BLOCK_POLICIES)
def test_dropped_blocks_that_are_frozen_stay_and_keep_their_gradients(name, seed):
    """masked="frozen" of whole blocks: parameter, moments and the optimizer's step count stay as they are."""
    policy = POLICIES[name](Encoder())
    model, twin = Encoder(), Encoder()
    kwargs = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3}
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.1), **kwargs)
    handle = attach_mask(optimizer, policy, seed=11, masked="frozen")
    ours = FusedGradDropAdamW(
        param_groups(twin, weight_decay=0.1), **kwargs, mask=policy, masked="frozen", seed=11, backend=ROUNDED_ONCE
    )
    dropped = 0
    for step in range(STEPS):
        if step % PER_EPOCH == 0:
            handle.set_epoch(step // PER_EPOCH)
            ours.set_epoch(step // PER_EPOCH)
        grads = gradients_of(model, seed, step)
        give(model, grads)
        give(twin, grads)
        keep = {each: bool(handle.mask(each).all()) for each in grads}
        before = {each: bits(param) for each, param in model.named_parameters()}
        optimizer.step()
        ours.step()
        for each, param in model.named_parameters():
            assert_same_bits(param.grad, grads[each], each)  # nothing is masked in place
            assert (bits(param) == before[each]) == (not keep[each]), (each, step)
            dropped += not keep[each]
        for (each, param), other in zip(model.named_parameters(), twin.parameters()):
            assert optimizer.state[param].get("step", 0) == ours.state[other].get("step", 0), (each, step)
            assert ulps_apart(param, other).max() <= 2 * (step + 1), (each, step)
        for group in optimizer.param_groups:
            assert group["param_steps"] == [optimizer.state[param].get("step", 0) for param in group["params"]]
    assert dropped or "layer" not in name


def test_sgd_is_equations_3_and_4_of_the_paper(seed):
    """theta' = theta - alpha * g (.) m, m ~ Bernoulli(1 - p) / (1 - p), p quantised to 2^-16."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    alpha, p = 0.3, 0.37
    threshold = round(p * 65536)
    optimizer = torch.optim.SGD(model.parameters(), lr=alpha)
    handle = attach_mask(optimizer, GradDrop(p=p), model=model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    kept = total = 0
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 40, generator=generator)).square().mean().backward()
        expected = {}
        for name, theta in model.named_parameters():
            bernoulli = handle.mask(name)
            m = bernoulli * torch.tensor(65536 / (65536 - threshold))
            expected[name] = torch.add(theta.detach(), theta.grad * m, alpha=-alpha)
            kept, total = kept + int(bernoulli.sum()), total + bernoulli.numel()
        optimizer.step()
        for name, theta in model.named_parameters():
            assert_same_bits(theta, expected[name], name)
    assert abs(kept / total - (1 - p)) < 5 * (p * (1 - p) / total) ** 0.5


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_the_fused_step_but_for_the_order_of_its_operations(fused, seed):
    """torch's kernel for CPUs has another order. When each step begins with the same values, the results are 2 ulp
    apart at most: of the weight before or after the step, whichever is larger, as a step may take a weight close to 0.
    """
    kwargs = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    model, other = Encoder(), Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), **kwargs, fused=fused)
    attach_mask(optimizer, GradDrop(p=0.4), model=model, seed=11)
    ours = FusedGradDropAdamW(
        other.named_parameters(), **kwargs, mask=GradDrop(p=0.4), masked="gradient", seed=11, backend=ROUNDED_ONCE
    )
    for step in range(STEPS):
        grads = gradients_of(model, seed, step)
        give(model, grads)
        give(other, grads)
        before = [param.detach().abs() for param in other.parameters()]
        optimizer.step()
        ours.step()
        for param, expected, larger in zip(model.parameters(), other.parameters(), before):
            larger = torch.maximum(larger, expected.detach().abs())
            ulp = torch.nextafter(larger, torch.tensor(torch.inf)) - larger
            assert ((param - expected).abs() <= 2 * ulp).all()
            for name in ("exp_avg", "exp_avg_sq"):
                theirs, own = optimizer.state[param][name], ours.state[expected][name]
                assert torch.allclose(theirs, own, rtol=1e-6, atol=3e-7)  # of numbers of about 1
                theirs.copy_(own)
            param.data.copy_(expected)


def test_groups_with_masks_seeds_and_no_mask_of_their_own(seed):
    """param_groups(model): embeddings and head are dense. A group of its own policy and seed keeps them."""
    model, twin = Encoder(), Encoder()

    def groups_of(each):
        groups = param_groups(each)
        groups[0] |= {"mask": GradDrop(p=0.9), "seed": 5}
        return groups

    optimizer = torch.optim.SGD(groups_of(model), lr=0.1)
    handle = attach_mask(optimizer, GradDrop(p=0.2), seed=3)
    ours = FusedGradDropAdamW(groups_of(twin), betas=(0.0, 0.9), mask=GradDrop(p=0.2), seed=3, backend=ROUNDED_ONCE)
    for step in range(3):
        grads = gradients_of(model, seed, step)
        give(model, grads)
        give(twin, grads)
        optimizer.step()
        ours.step()
        for (name, param), other in zip(model.named_parameters(), twin.parameters()):
            assert_same_bits(param.grad, ours.state[other]["exp_avg"], name)
            assert torch.equal(param.grad, grads[name]) == (name.startswith(("embed", "head")))
    assert handle.active_fraction() == ours.active_fraction()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("policy", [GradDrop(p=0.3), GradDropEpoch(3, storage="bitpacked")], ids=["draws", "bits"])
def test_all_backends_and_dtypes(policy, dtype, seed, monkeypatch):
    """Gradients of all memory layouts: contiguous, transposed, a part of a larger one, conjugated, empty."""
    emulate_cuda(monkeypatch)
    if dtype in (torch.float32, torch.bfloat16, torch.float16):
        engines = [("cpu", isa) for isa in ISAS] + [("cuda", None), ("reference", None), ("exact", None)]
    else:
        engines = [("reference", None), ("exact", None)]
    shapes = {"a": (33, 7), "b": (0, 3), "c": (), "d": (5, 3, 64), "e": (70,)}
    results = {}
    for backend, isa in engines:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: B023
        named = [(name, torch.nn.Parameter(torch.zeros(shape, dtype=dtype))) for name, shape in shapes.items()]
        optimizer = torch.optim.SGD([param for _, param in named], lr=1.0)
        handle = attach_mask(optimizer, policy, named_parameters=named, seed=9, masked="gradient", backend=backend)
        handle.set_epoch(1)
        grads = {"a": draw(7, 33).t(), "b": draw(0, 3), "c": draw(()), "d": draw(5, 3, 65)[:, :, 1:], "e": draw(70)}
        if dtype.is_complex:
            grads["e"] = torch.complex(draw(70).real, draw(70).real).conj()
        for name, param in named:
            param.grad = grads[name].detach()
        keep = {name: handle.mask(name) for name in shapes}
        before = {name: grad.clone() for name, grad in grads.items()}
        with cpu.using_isa(isa):
            optimizer.step()
        scale = 1.0 if isinstance(policy, GradDropEpoch) else 65536 / (65536 - round(0.3 * 65536))
        for name, param in named:
            wide = before[name] if dtype in (torch.float64, torch.complex64) else before[name].float()
            number = torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            expected = torch.where(keep[name], (wide * number).to(dtype), torch.zeros((), dtype=dtype))
            assert_same_bits(
                torch.view_as_real(param.grad.resolve_conj()) if dtype.is_complex else param.grad,
                torch.view_as_real(expected) if dtype.is_complex else expected, f"{backend} {isa}: {name}",
            )  # fmt: skip
        results[backend, isa] = [bits(param.detach()) for _, param in named]
    assert len(set(map(str, results.values()))) == 1


def test_parameters_that_have_gradients_in_some_steps_count_their_own(seed):
    """An element mask's draw is the parameter's own count of steps."""
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_mask(optimizer, GradDrop(p=0.5), model=model)
    names = list(dict(model.named_parameters()))
    own = dict.fromkeys(names, 0)
    for step, skipped in enumerate(itertools.islice(itertools.cycle([[0, 3], [1], [], [2, 4, 5]]), 12)):
        grads = gradients_of(model, seed, step)
        give(model, {name: None if i in skipped else grads[name] for i, name in enumerate(names)})
        expected = {name: handle.mask(name, step=own[name]) for name in names}
        optimizer.step()
        for i, (name, param) in enumerate(model.named_parameters()):
            if i in skipped:
                assert param.grad is None
            else:
                assert torch.equal(param.grad != 0, expected[name]), (name, step)
                own[name] += 1
    assert optimizer.param_groups[0]["param_steps"] == list(own.values())


def test_skip_dropped_leaves_out_what_the_step_drops(seed):
    for policy, masked in ((LayerGradDrop(p=0.5), "gradient"), (LayerGradDrop(p=0.5), "frozen")):
        runs = []
        for skipping in (False, True):
            torch.manual_seed(seed)
            model = Encoder()
            optimizer = torch.optim.SGD(param_groups(model), lr=1e-3, momentum=0.9, weight_decay=0.1)
            handle = attach_mask(optimizer, policy, masked=masked, seed=2)
            missing = 0
            for step in range(10):
                ids = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(seed + step))
                optimizer.zero_grad()
                if skipping and step % 3:  # a step of its own in between is as good
                    with handle.skip_dropped(model):
                        model(ids).square().mean().backward()
                    missing += sum(param.grad is None for param in model.parameters())
                else:
                    model(ids).square().mean().backward()
                optimizer.step()
            runs.append([bits(param) for param in model.parameters()])
            runs.append([group["param_steps"] for group in optimizer.param_groups])
            assert all(param.isfinite().all() for param in model.parameters())
        assert missing and runs[:2] == runs[2:], masked


def test_a_parameter_in_several_pieces(seed, monkeypatch):
    """As a shard of uneven cuts lies: each span has its own row of the tables. The bits are those of the whole."""
    emulate_cuda(monkeypatch)
    results = set()
    for in_pieces, backend in itertools.product((False, True), ("cpu", "cuda", "reference", "exact")):
        if in_pieces:

            def cut(param, record):
                whole = spans_of(param, record)[0]
                ends = (0, 5, 77, param.numel())
                cuts = [(start, stop - start) for start, stop in itertools.pairwise(ends)]
                return tuple(
                    whole._replace(start=start, numel=count, layout=RowBlock(start, count, count))
                    for start, count in cuts
                )

            monkeypatch.setattr(gradients, "spans_of", cut)
        param = torch.nn.Parameter(torch.zeros(13, 11))
        optimizer = torch.optim.SGD([param], lr=1.0)
        attach_mask(optimizer, GradDrop(p=0.4), seed=9, backend=backend)
        for step in range(2):
            param.grad = torch.randn(13, 11, generator=torch.Generator().manual_seed(seed + step))
            optimizer.step()
        results.add(bits(param))
        monkeypatch.setattr(gradients, "spans_of", spans_of)
    assert len(results) == 1


def test_gradients_may_lie_otherwise_in_every_step(seed):
    """Another layout, storage or dtype than before: what was prepared is prepared anew."""
    param = torch.nn.Parameter(torch.zeros(9, 9))
    optimizer = torch.optim.SGD([param], lr=1.0)
    handle = attach_mask(optimizer, GradDrop(p=0.4), seed=9)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(9, 9, generator=generator)
    for step, grad in enumerate((drawn.clone(), drawn.clone().t().contiguous().t(), drawn.clone(), drawn.clone())):
        if step == 3:
            param.data = param.data.double()
            grad = grad.double()
        param.grad = grad
        keep = handle.mask(param)
        optimizer.step()
        expected = torch.where(keep, drawn.to(param.dtype) * (65536 / (65536 - round(0.4 * 65536))), 0.0)
        assert torch.allclose(param.grad, expected, rtol=1e-6, atol=0.0) and torch.equal(param.grad != 0, keep), step
