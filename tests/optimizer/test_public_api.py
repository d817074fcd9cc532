"""What users see: the public names, a silent and light import, docstrings, the example, life without the library."""

import ast
import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from toy import build, every_policy, state_bits, train

import graddrop_kernels
from graddrop_kernels import FusedGradDropAdamW, available_backends, backends
from graddrop_kernels.backends import cpu

PUBLIC = {
    "ExponentialAnneal", "FixedMask", "FusedGradDropAdamW", "GaussianGradDrop", "GradDrop", "GradDropEpoch",
    "GradFreeze", "LayerGradDrop", "LinearAnneal", "attach_deepspeed", "attach_fsdp1", "attach_zero",
    "available_backends", "describe", "find_blocks", "param_groups",
    "plot_mask", "plot_schedule", "CycleBlocks", "RandomMask", "SampleBlocks", "SkipUpdate", "top_change",
    "top_gradient", "top_magnitude", "memory", "TrainRows", "new_token_rows",
    "attach_mask",
}  # fmt: skip
every_public_name = pytest.mark.parametrize("name", sorted(PUBLIC))


def test_the_public_names_are_these():
    assert set(graddrop_kernels.__all__) == PUBLIC and len(graddrop_kernels.__all__) == len(PUBLIC)
    assert graddrop_kernels.__all__ == sorted(graddrop_kernels.__all__)
    assert all(hasattr(graddrop_kernels, name) for name in PUBLIC)
    public_here = {
        name
        for name, value in vars(graddrop_kernels).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public_here == PUBLIC


def python(code):
    return subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, timeout=120)


def test_the_import_is_silent_and_brings_nothing_but_torch_and_numpy():
    result = python("import graddrop_kernels")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    result = python(
        "import sys, torch, numpy; before = set(sys.modules); import graddrop_kernels; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "graddrop_kernels\n"


def test_the_import_starts_no_compiler_and_loads_no_library():
    """The compiled library is opened when it is asked for first, so that a broken one cannot break the import."""
    code = "import graddrop_kernels; from graddrop_kernels.backends import cpu; print(cpu._load.cache_info().currsize)"
    result = python(code)
    assert result.returncode == 0 and result.stdout == "0\n", result


# Docstrings.


def test_every_module_begins_with_a_docstring():
    package = Path(graddrop_kernels.__file__).parent
    modules = sorted(package.rglob("*.py"))
    assert len(modules) > 20
    for path in modules:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), path
        assert text.startswith('"""'), path


@every_public_name
def test_public_docstrings(name):
    public = getattr(graddrop_kernels, name)
    assert public.__doc__ and len(public.__doc__) > 40
    assert not public.__doc__.startswith(f"{name}("), "the one that dataclass makes"
    for method_name, method in inspect.getmembers(public, inspect.isfunction) if inspect.isclass(public) else ():
        ours = method.__module__.startswith("graddrop_kernels") and not method_name.startswith("_")
        if ours and method_name in vars(public) and not any(hasattr(base, method_name) for base in public.__mro__[1:]):
            assert method.__doc__, f"{name}.{method_name}"


@every_public_name
def test_every_argument_is_in_the_docstring(name):
    public = getattr(graddrop_kernels, name)
    for argument in inspect.signature(public).parameters:
        assert re.search(rf"\b{argument}\b", public.__doc__), argument


@pytest.mark.parametrize(
    "method", ["step", "set_epoch", "mask", "active_fraction", "describe", "add_param_group", "load_state_dict"]
)
def test_the_optimizers_methods_have_docstrings_of_their_own(method):
    assert vars(FusedGradDropAdamW)[method].__doc__
    assert getattr(FusedGradDropAdamW, method).__doc__ != getattr(torch.optim.AdamW, method, FusedGradDropAdamW).__doc__


@every_public_name
def test_examples_run(name):
    public = getattr(graddrop_kernels, name)
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(public, name, globs={}) if test.examples]
    assert tests or name != "FusedGradDropAdamW"
    for test in tests:
        result = doctest.DocTestRunner().run(test)
        assert result.attempted and not result.failed, test.name


# Without the compiled library.


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_LIBRARY", tmp_path / "_cpu.so")
    monkeypatch.delenv("GRADDROP_BACKEND", raising=False)
    cpu._load.cache_clear()
    yield
    cpu._load.cache_clear()


def test_without_the_library_the_reference_runs(no_library):
    assert available_backends() == ("reference", "exact")
    assert backends.select("auto", torch.device("cpu"), torch.float32, torch.float32).name == "reference"
    weight = nn.Parameter(torch.ones(4))
    optimizer = FusedGradDropAdamW([weight])
    weight.grad = torch.ones(4)
    optimizer.step()
    assert (weight != 1).any() or not optimizer.mask(weight, step=0).any()


@every_policy
def test_without_the_library_the_masks_are_the_same(policy, no_library, seed):
    model, optimizer = build(policy)
    train(optimizer, model.parameters(), range(6), seed)
    twin, reference = build(policy, backend="reference")
    cpu._load.cache_clear()  # there again, if it was built
    train(reference, twin.parameters(), range(6), seed)
    assert state_bits(model, optimizer) == state_bits(twin, reference)
    for name, _ in model.named_parameters():
        assert torch.equal(optimizer.mask(name, step=3), reference.mask(name, step=3))
