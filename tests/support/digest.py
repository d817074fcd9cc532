"""Shows that a refactoring of the optimizer changed no bit: one hash per small training, through the public API only.

    python tests/support/digest.py --write before.json     # at the old code
    python tests/support/digest.py --compare before.json   # at the new code: lists what differs, then exits with 1

A case is ``backend/policy/dtypes/mode``. Its hash covers the parameters, the optimizer's state (step, moments,
masters), the groups' counters, the norms, the active fractions, the masks and the warnings. Where the optimizer refuses
a case, the error's text stands for the hash. Compare on the machine, and with the torch, that wrote the file.
``--triton`` adds three cases in Triton's interpreter.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import json
import os
import pickle
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from graddrop_kernels import ExponentialAnneal, FusedGradDropAdamW, LinearAnneal, available_backends, param_groups
from graddrop_kernels.policies import FixedMask, GaussianGradDrop, GradDrop, GradDropEpoch, GradFreeze, LayerGradDrop

EPOCHS = (0, 0, 1, 1, 4)  # per step; the last is past the end of every policy below
WITHOUT = ((1, "head.bias"), (2, "layers.1.weight"))  # (step, parameter) without a gradient
SCALE = 3.0  # of the loss under a GradScaler; no power of two, so that unscaling rounds
HYPERS = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.13, "seed": 2**63 + 5}

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
KINDS = {  # name: (dtype of the parameters, the optimizer's arguments)
    "float32": (F32, {}),
    "bfloat16": (BF16, {}),
    "bfloat16-masters": (BF16, {"master_weights": True}),
    "bfloat16-stochastic": (BF16, {"stochastic_rounding": True}),
    "bfloat16-float32": (BF16, {"moment_dtype": F32}),
    "float16-masters": (F16, {"master_weights": True}),
    "float64": (F64, {}),
    "complex64": (torch.complex64, {}),
}
ALL_MODES = tuple(KINDS)[:4]  # the kinds that go through every mode; the others train plainly

NORM, MASKED_NORM = {"max_grad_norm": 0.7}, {"max_grad_norm": 0.7, "norm_after_mask": True}
MODES = {  # name: the optimizer's arguments; what else a mode does is in train()
    "plain": {}, "norm": NORM, "norm-masked": MASKED_NORM, "scaler": {}, "scaler-fused": {"fused": True},
    "scaler-fused-norm": {"fused": True, **NORM}, "skip": {}, "skip-norm": NORM, "skip-norm-masked": MASKED_NORM,
    "in-backward": {}, "in-backward-norm": NORM, "resume": {}, "resume-adamw": {}, "pickle": {}, "deepcopy": {},
    "amsgrad-maximize": {"amsgrad": True, "maximize": True}, "tensor-lr": {"lr": torch.tensor(0.02)}, "closure": {},
    "named": {}, "unnamed": {}, "mixed": {}, "added": {}, "flat": {}, "checkpoint": {},
    "compiled": {},
}  # fmt: skip

FROZEN, GRADIENT, GLOBAL = {"masked": "frozen"}, {"masked": "gradient"}, {"bias_correction": "global"}
POLICIES = {  # name: (policy of a model and layers=, the optimizer's arguments)
    "none": (lambda model, layers: None, {}),
    "graddrop": (lambda model, layers: GradDrop(p=0.2), {}),
    "graddrop-epoch": (lambda model, layers: GradDrop(p=0.37, every="epoch"), {}),
    "graddrop-anneal": (lambda model, layers: GradDrop(p=LinearAnneal(epochs=3)), {}),
    "graddrop-frozen": (lambda model, layers: GradDrop(p=ExponentialAnneal(0.6, 0.5)), FROZEN),
    "graddrop-epoch-frozen": (lambda model, layers: GradDrop(p=0.5, every="epoch"), FROZEN),
    "graddrop-frozen-global": (lambda model, layers: GradDrop(p=0.3), FROZEN | GLOBAL),
    "graddrop-callable": (lambda model, layers: GradDrop(p=falling), {}),
    "gaussian": (lambda model, layers: GaussianGradDrop(p=0.3), {}),
    "layer": (lambda model, layers: LayerGradDrop(p=0.5, layers=layers), {}),
    "layer-epoch": (lambda model, layers: LayerGradDrop(p=0.5, every="epoch", layers=layers), FROZEN),
    "layer-anneal": (lambda model, layers: LayerGradDrop(p=LinearAnneal(3, 0.8, "zero"), layers=layers), {}),
    "layer-frozen-global": (lambda model, layers: LayerGradDrop(p=0.5, layers=layers), FROZEN | GLOBAL),
    "buckets": (lambda model, layers: GradDropEpoch(epochs=3), {}),
    "buckets-bitpacked": (lambda model, layers: GradDropEpoch(epochs=3, storage="bitpacked"), {}),
    "buckets-toggle": (lambda model, layers: GradDropEpoch(epochs=3, toggle=True), {}),
    "buckets-toggle-bitpacked": (lambda model, layers: GradDropEpoch(epochs=20, toggle=True, storage="bitpacked"), {}),
    "buckets-gradient": (lambda model, layers: GradDropEpoch(epochs=12), GRADIENT),
    "buckets-global": (lambda model, layers: GradDropEpoch(epochs=20), GLOBAL),
    "freeze": (lambda model, layers: GradFreeze(epochs=3, layers=layers), {}),
    "freeze-bottom-up": (lambda model, layers: GradFreeze(4, "bottom_up", 1, layers=layers), GRADIENT),
    "freeze-global": (lambda model, layers: GradFreeze(epochs=3, layers=layers), GLOBAL),
    "fixed": (lambda model, layers: fixed_mask(model), {}),
    "fixed-gradient": (lambda model, layers: fixed_mask(model), GRADIENT),
}  # fmt: skip
ONCE = ("compiled", "skip-norm", "in-backward-norm")  # modes that are slow, or always refused
SAMPLE = ("graddrop", "layer", "buckets-toggle", "freeze")  # the policies of slow cases


def falling(epoch: int) -> float:
    """A schedule as a user may write one."""
    return 0.6 / (epoch + 1)


def fixed_mask(model: nn.Module) -> FixedMask:
    """Makes masks of the blocks' weights. The other parameters are dense."""
    drawn = torch.Generator().manual_seed(4)
    shapes = {name: param.shape for name, param in model.named_parameters() if name.startswith("layers")}
    masks = {name: torch.rand(shape, generator=drawn) < 0.4 for name, shape in shapes.items() if len(shape) == 2}
    return FixedMask(masks, scale=1.7)


class Block(nn.Module):
    """Parameters of odd sizes and of none."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.empty(37, 19)), nn.Parameter(torch.empty(()))
        self.norm = nn.LayerNorm(7)

    forward = None  # gradients are given


class Model(nn.Module):
    """Three blocks, an embedding and a head."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 9), nn.Linear(7, 5)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        drawn = torch.Generator().manual_seed(1)
        for name, param in list(self.named_parameters()):
            module, _, last = name.rpartition(".")
            value = torch.randn(param.shape, generator=drawn, dtype=dtype if dtype.is_complex else F32)
            self.get_submodule(module).register_parameter(last, nn.Parameter(value.to(dtype)))


def gradients(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """Returns the fixed gradients of one step, by name, before they are scaled."""
    drawn = torch.Generator().manual_seed(100 + step)
    named = {name: torch.randn(param.shape, generator=drawn, dtype=torch.promote_types(param.dtype, F32))
             .to(param.dtype) for name, param in model.named_parameters()}  # fmt: skip
    return {name: grad for name, grad in named.items() if (step, name) not in WITHOUT}


def like(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """Shards the tensor as the parameter is."""
    if not hasattr(param, "placements"):
        return tensor.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a plain copy of a tensor that may be a DTensor."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def feed(hasher, value) -> None:
    """Adds a value, with all that is in it, to a hash."""
    if isinstance(value, torch.Tensor):
        value = whole(value).contiguous()
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hasher.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            hasher.update(f"{key}:".encode())
            feed(hasher, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            hasher.update(b",")
            feed(hasher, item)
    else:
        hasher.update(repr(value).encode())


def digest_of(function, *arguments) -> str:
    """Returns 16 hex digits of the function's result and warnings; the text of what it raises."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            value = function(*arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    hasher = hashlib.sha256()
    feed(hasher, {"value": value, "warnings": [str(warning.message) for warning in warned]})
    return hasher.hexdigest()[:16]


def groups_of(model: nn.Module, mode: str) -> list:
    """Makes the optimizer's ``params``."""
    if mode in ("named", "unnamed"):
        return list(model.named_parameters() if mode == "named" else model.parameters())
    groups = param_groups(model, weight_decay=0.13, per_block=mode == "flat")
    if mode == "mixed":
        groups[-1] |= {"mask": GradDrop(p=0.4), "seed": 7, "masked": "frozen", "bias_correction": "global"}
        groups[-2] |= {"mask": GaussianGradDrop(p=0.1), "masked": None, "lr": 1e-3, "betas": (0.5, 0.6)}
    return groups


def flatten(model: nn.Module, optimizer: FusedGradDropAdamW) -> dict[str, nn.Parameter]:
    """Makes one flat buffer per group, as engines do, with padding before each piece. Returns them by name."""
    names = {param: name for name, param in model.named_parameters()}
    pieces, buffers = {}, {}
    for group in optimizer.param_groups:
        own, values = [], []
        for param in group["params"]:
            start = sum(map(len, values)) + 3
            values += [param.new_zeros(3), param.detach().reshape(-1)[1:]]  # the first element is elsewhere
            own.append((names[param], start, 1, max(param.numel() - 1, 0)))
        buffer = nn.Parameter(torch.cat(values))
        group["params"], pieces[buffer], buffers[group["name"]] = [buffer], own, buffer
    optimizer.attach_pieces(pieces, shapes={name: param.shape for param, name in names.items()})
    return buffers


def train(backend: str, policy: str, kind: str, mode: str, layout=lambda whole: whole) -> dict:
    """Makes five steps of one case. Returns all their results."""
    dtype, options = KINDS[kind]
    model = layout(Model(dtype))
    make_policy, masking = POLICIES[policy]
    layers = ("layers.*",) if mode in ("named", "unnamed") else None  # else the groups name the blocks

    def optimizer_of(model):
        arguments = HYPERS | options | masking | MODES[mode] | {"mask": make_policy(model, layers), "backend": backend}
        groups = groups_of(model, mode)
        return FusedGradDropAdamW(groups[:-1] if mode == "added" else groups, **arguments)

    optimizer = optimizer_of(model)
    buffers = flatten(model, optimizer) if mode == "flat" else {}
    handle = optimizer.step_in_backward() if mode.startswith("in-backward") else None
    scaler = torch.amp.GradScaler("cpu", SCALE, growth_interval=2) if mode.startswith("scaler") else None
    if mode == "checkpoint":  # asks a fresh optimizer for its state, which counts no step
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        get_optimizer_state_dict(model, optimizer)
    norms, fractions = [], []
    for step, epoch in enumerate(EPOCHS):
        if step in (0, 2, 4):
            optimizer.set_epoch(epoch)
            fractions.append(optimizer.active_fraction())
        if step == 2:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * 0.7
        if step == 2 and mode == "added":
            optimizer.add_param_group(groups_of(model, mode)[-1] | {"mask": GradDrop(p=0.4), "seed": 3})
        if step == 3 and mode.startswith("resume"):
            saved, file = optimizer.state_dict(), io.BytesIO()
            if mode == "resume-adamw":  # through torch's own class, which knows nothing of masks
                torchs = torch.optim.AdamW(groups_of(model, mode))
                torchs.load_state_dict(saved)
                saved = torchs.state_dict()
            torch.save(saved, file)
            optimizer = optimizer_of(model)
            optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        if step == 3 and mode == "pickle":
            model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
        if step == 3 and mode == "deepcopy":
            model, optimizer = copy.deepcopy((model, optimizer))
        one_step(model, optimizer, step, mode, scaler, buffers)
        norms.append(None if optimizer.grad_norm is None else whole(optimizer.grad_norm))
    if handle is not None:
        handle.remove()
    named = dict(model.named_parameters())
    saved = optimizer.state_dict()
    result = {
        "parameters": buffers or named,
        "gradients": [param.grad for param in named.values()],  # unscaled in place under a fused GradScaler
        "state": saved["state"],
        "groups": [{key: group.get(key) for key in GROUP_KEYS} for group in saved["param_groups"]],
        "norms": norms,
        "fractions": [*fractions, optimizer.active_fraction()],
    }
    if kind == "float32" and backend != "cpu":  # one code draws the masks for all of them
        result["masks"] = [optimizer.mask(param, step) for param in (buffers or named).values() for step in (None, 1)]
        result["masks by name"] = {name: optimizer.mask(name) for name in named if mode != "unnamed"}
    return result


GROUP_KEYS = (
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "fused", "mask", "seed", "masked", "bias_correction",
    "moment_dtype", "master_weights", "stochastic_rounding", "epoch", "epoch_was_set", "completed_steps",
    "epoch_history", "name", "params", "param_names", "blocks", "param_blocks", "block",
)  # fmt: skip


def one_step(model, optimizer, step: int, mode: str, scaler, buffers) -> None:
    """Makes gradients and a step as the mode demands. Under a scaler, step 1 has an infinite gradient."""
    named, grads = dict(model.named_parameters()), gradients(model, step)
    optimizer.zero_grad()
    if scaler is not None:
        grads = {name: grad * scaler.get_scale() for name, grad in grads.items()}
        grads["embedding.weight"][3, 2] += float("inf") if step == 1 else 0.0
        scaler.scale(torch.ones(()))  # a scaler starts at its first loss
    if mode.startswith(("skip", "in-backward")):
        with optimizer.skip_dropped(model) if mode.startswith("skip") else contextlib.nullcontext():
            sum((named[name] * grad).sum().float() for name, grad in grads.items()).backward()
    elif buffers:
        for buffer in buffers.values():
            buffer.grad = torch.linspace(-1, 1 + step, buffer.numel(), dtype=F64).to(buffer.dtype)
    else:
        for name, grad in grads.items():
            named[name].grad = like(grad, named[name])
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
    elif mode == "closure":
        assert optimizer.step(lambda: torch.tensor(5.0)) == 5.0
    elif mode == "compiled":
        torch.compiler.reset()
        torch.compile(optimizer.step, backend="eager")()
    else:
        optimizer.step()


def described(policy: str, backend: str = "reference") -> list:
    """Returns what a policy says of each epoch: describe(), active_fraction() and masks, one of them of a later
    step.
    """
    model = Model(F32)
    optimizer = FusedGradDropAdamW(param_groups(model), mask=POLICIES[policy][0](model, None), backend=backend,
                                   **HYPERS | POLICIES[policy][1])  # fmt: skip
    said = []
    for epoch in (0, 1, 2, 3, 25):
        optimizer.set_epoch(epoch)
        masks = [optimizer.mask(param, step) for param in model.parameters() for step in (None, 6)]
        said.append([optimizer.describe(), repr(optimizer), optimizer.active_fraction(), masks])
    return said


def differentiated(policy: str) -> list:
    """Makes two recorded steps. Returns the derivatives with respect to their inputs."""
    model, lr = Model(F32), torch.tensor(0.03, requires_grad=True)
    inputs = [*model.parameters(), lr]
    named = [(name, param.clone()) for name, param in model.named_parameters()]
    arguments = HYPERS | POLICIES[policy][1] | {"mask": POLICIES[policy][0](model, ("layers.*",)), "lr": lr}
    optimizer = FusedGradDropAdamW(named, differentiable=True, **arguments)
    for step in range(2):
        optimizer.set_epoch(step)
        grads = {name: grad.requires_grad_() for name, grad in gradients(model, step).items()}
        inputs += grads.values()
        for name, param in named:
            param.grad = grads.get(name)
        optimizer.step()
    loss = sum(param.square().sum() for _, param in named)
    return [loss, torch.autograd.grad(loss, inputs, materialize_grads=True, allow_unused=True)]


def group_keys() -> list:
    """Returns the names of all that a state dict holds."""
    saved = FusedGradDropAdamW(param_groups(Model(F32))).state_dict()
    return [sorted(saved), [sorted(group) for group in saved["param_groups"]]]


def one_process() -> dict[str, tuple]:
    """Returns {case: (function, its arguments)} of all cases that need one process."""
    cases = {f"describe/{policy}": (described, policy) for policy in POLICIES} | {"group keys": (group_keys,)}
    cases |= {f"differentiable/{policy}": (differentiated, policy) for policy in POLICIES}
    rows = itertools.product(enumerate(POLICIES), enumerate(KINDS), enumerate(MODES))
    for (i, policy), (j, kind), (k, mode) in rows:
        if mode != "plain" and kind not in ALL_MODES:
            continue
        if mode in ONCE and (kind != "float32" or policy not in SAMPLE):
            continue
        cases[f"cpu/{policy}/{kind}/{mode}"] = train, "cpu", policy, kind, mode
        if mode == "plain" or (i + j + k) % len(ALL_MODES) == 0:  # slow, so one kind each
            cases[f"reference/{policy}/{kind}/{mode}"] = train, "reference", policy, kind, mode
        if (mode, kind) == ("norm", "float32"):
            cases[f"exact/{policy}/{kind}/{mode}"] = train, "exact", policy, kind, mode
    return cases


def fully_sharded(model: nn.Module) -> nn.Module:
    """Shards by FSDP2, block by block. It takes no parameter without dimensions."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        layer.scale = nn.Parameter(layer.scale.detach()[None])
        fully_shard(layer)
    return fully_shard(model)


def by_columns(model: nn.Module) -> nn.Module:
    """Shards matrices by columns and vectors by rows, and replicates the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for name, param in list(model.named_parameters()):
        placement = Shard(param.dim() - 1) if param.dim() else Replicate()
        module, _, last = name.rpartition(".")
        sharded = nn.Parameter(distribute_tensor(param.detach(), mesh, [placement]))
        model.get_submodule(module).register_parameter(last, sharded)
    return model


def ranks_work(rank: int, world: int, folder: str) -> None:
    """Runs the cases of DTensors in one of ``world`` ranks of a gloo group; in a world of one, those of Triton."""
    torch.set_num_threads(1)
    if world == 1:
        cases = {f"triton/{policy}/float32/norm": (train, "triton", policy, "float32", "norm") for policy in SAMPLE[:3]}
    else:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        cases = {
            f"{layout.__name__}/{backend}/{policy}/{kind}/{mode}": (train, backend, policy, kind, mode, layout)
            for layout in (fully_sharded, by_columns)
            for policy in ("none", *SAMPLE, "gaussian", "fixed")
            for backend, kind, mode in (
                ("cpu", "float32", "norm-masked"),
                ("cpu", "bfloat16-stochastic", "plain"),
                ("cpu", "bfloat16-masters", "resume"),
                ("reference", "float32", "norm-masked"),
            )
        }
    found = {name: digest_of(*case) for name, case in cases.items()}
    if rank == 0:
        Path(folder, "found").write_text(json.dumps(found))
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def in_ranks(world: int) -> dict[str, str]:
    """Returns the digests of ranks_work()."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(ranks_work, (world, folder), nprocs=world)
        return json.loads(Path(folder, "found").read_text())


def all_digests(triton: bool) -> dict[str, str]:
    """Returns {case: digest}. Prints its progress."""
    torch.set_num_threads(1)
    start, found, cases = time.perf_counter(), {}, one_process()
    for done, (name, case) in enumerate(cases.items()):
        found[name] = digest_of(*case)
        if done % 500 == 0:
            print(f"{time.perf_counter() - start:5.0f} s: {done} of {len(cases)} cases in one process", flush=True)
    found |= in_ranks(2)
    if triton:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a new process imports triton
        found |= in_ranks(1)
    refused = sum(" " in digest for digest in found.values())
    print(f"{time.perf_counter() - start:5.0f} s: {len(found)} cases, {refused} of them refused", flush=True)
    return found


def main() -> int:
    """Returns 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE", help="write the digests of the present code")
    action.add_argument("--compare", type=Path, metavar="FILE", help="print each case whose digest is another now")
    parser.add_argument("--triton", action="store_true", help="three more cases, in Triton's interpreter")
    chosen = parser.parse_args()
    if "cpu" not in available_backends():
        parser.error("the cpu backend is not compiled: its cases would say nothing")
    found = all_digests(chosen.triton)
    if chosen.write:
        chosen.write.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    before = json.loads(chosen.compare.read_text())
    asked = {name for name in before if chosen.triton or not name.startswith("triton/")}
    different = sorted(name for name in asked | found.keys() if before.get(name) != found.get(name))
    for name in different:
        print(f"{name}: {before.get(name, 'not there')} before, {found.get(name, 'not there')} now")
    print(f"{len(different)} of {len(found)} cases differ" if different else f"no bit differs in {len(found)} cases")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
