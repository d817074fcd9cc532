"""Finds the layers of a model by what they are made of. A layer mixes the positions of a sequence (attention, an SSM)
and transforms each of them (feed-forward part). A stack is a list, sequence or dictionary of two or more layers.

One pass from the leaves up finds what each module holds. Where layers stand in stages, the layers are found. A list of
experts within a layer holds no attention, and stays a part of the layer.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..masks.names import WRAPPERS
from .names import in_decoder, is_outer

Blocks = list[tuple[str, nn.Module]]  # (canonical name, module)

# What mixes positions, by the name of its class or attribute. Attention makes a layer together with weights beside it.
# What recurs has its feed-forward part within: a layer of Mamba is a norm and a mixer.
_ATTENTION = re.compile(r"^(?!.*(?:mlp|ffn|feed_?forward)).*(?:attention|attn)", re.IGNORECASE)
_RECURRENCE = re.compile(
    "mixer|mamba|ssm|rwkv|recurrent|retention|[ms]lstm|short_?conv|focal.*modulation", re.IGNORECASE
)
_INNER = WRAPPERS - {"module"}  # what is called module may have parameters beside it
_CHECKPOINTING_LAYER = ("transformers.modeling_layers", "GradientCheckpointingLayer")


@dataclass(frozen=True)
class _Part:
    """What a module holds."""

    module: nn.Module  # without its wrappers
    blocks: Blocks = field(default_factory=list)  # the layers of its stacks, and declared ones
    single: Blocks = field(default_factory=list)  # layers that are the only one in their list, also declared ones
    has_stack: bool = False
    attends: bool = False
    recurs: bool = False
    transforms: bool = False  # has weights for each position beside any attention
    multiplies: bool = False  # has weight matrices, those of convolutions aside
    kernel: int = 0  # the size of the largest convolution

    @property
    def is_declared(self) -> bool:
        """Whether transformers says by its class that this is a layer. It says so of convolutions too."""
        # By name, not isinstance: transformers may be absent, and is slow to import.
        classes = ((cls.__module__, cls.__qualname__) for cls in type(self.module).__mro__)
        return (self.attends or self.recurs or not self.kernel) and _CHECKPOINTING_LAYER in classes

    @property
    def is_layer(self) -> bool:
        only_convolves = self.kernel > 1 and not self.multiplies  # attention of channels in a convolutional network
        mixes = self.recurs or self.attends and self.transforms and not only_convolves
        return not self.has_stack and (mixes or self.is_declared)

    def is_called(self, pattern: re.Pattern[str], attribute: str) -> bool:
        """Whether the class says so, or the name under which another module holds this one."""
        return pattern.search(f"{attribute} {type(self.module).__name__}") is not None

    # Norms before attention and dropouts after it are called so too, but have no weights. A mixer that only convolves
    # makes a convolutional network.
    def is_attention(self, attribute: str) -> bool:
        return (self.multiplies or self.kernel > 0) and self.is_called(_ATTENTION, attribute)

    def is_recurrence(self, attribute: str) -> bool:
        return self.multiplies and self.is_called(_RECURRENCE, attribute)


def find_layers(model: nn.Module) -> Blocks:
    """Return the layers of all stacks in ``model``, and single ones that transformers declares, in the order of
    registration. A layer that is listed twice comes twice.
    """
    return [(name, module) for name, module in _look(model, "", {}).blocks if name]


def _look(module: nn.Module, name: str, seen: dict[int, _Part]) -> _Part:
    module = unwrapped(module)
    if id(module) in seen:  # its blocks are listed already
        return replace(seen[id(module)], blocks=[], single=[])
    held = [
        (key, _look(child, _inner_name(name, key), seen)) for key, child in module._modules.items() if child is not None
    ]
    multiplies, kernel = _multiplies(module), max(module.kernel_size) if isinstance(module, _ConvNd) else 0
    beside = [part for key, part in held if part.attends or not part.is_attention(key)]
    part = _Part(
        module,
        blocks=[block for _, part in held for block in part.blocks],
        single=[block for _, part in held for block in part.single],
        has_stack=any(part.has_stack for _, part in held),
        attends=any(part.attends or part.is_attention(key) for key, part in held),
        recurs=any(part.recurs or part.is_recurrence(key) for key, part in held),
        transforms=multiplies or kernel == 1 or any(part.transforms for part in beside),
        multiplies=multiplies or any(part.multiplies for _, part in held),
        kernel=max([kernel, *(part.kernel for _, part in held)]),
    )
    if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
        part = _of_list(part, name, held)
    elif part.is_layer and part.is_declared:
        part = replace(part, blocks=[(name, module)])
    seen[id(module)] = part
    return part


def _of_list(part: _Part, name: str, held: list[tuple[str, _Part]]) -> _Part:
    found: Blocks = []
    for key, each in held:
        of_stage = part.has_stack and not each.has_stack and each.single  # beside stages, a stage of one layer is one
        if inner := of_stage or each.blocks:
            found += inner
        elif each.is_layer:
            found.append((_inner_name(name, key), part.module.get_submodule(key)))
    if part.has_stack or len(found) > 1:
        return replace(part, blocks=found, single=[], has_stack=True)
    return replace(part, single=found)


def find_alike(model: nn.Module) -> Blocks:
    """Return the children of the outermost lists of two or more modules of one class, for a model in which nothing
    tells what mixes positions. Lists of single weights count only where no list is of modules with parts. Lists with
    convolutions, of embedding tables and of heads do not count.

    Two lists of one parent are taken only as encoder and decoder: they may be the halves of layers.
    """
    lists: dict[nn.Module, str] = {}
    for name, module in walk(model, _is_list):
        if _is_list(module):
            lists.setdefault(module, name)  # a list under two names is one list
    inner = [stack for stack, name in lists.items() if not is_outer(f"{name}.")]
    alike = [stack for stack in inner if len(_classes(stack)) == 1 and _is_linear(stack)]
    stacks = [stack for stack in alike if _has_parts(stack)] or alike
    places = {(lists[stack].rpartition(".")[0], in_decoder(lists[stack])) for stack in stacks}
    if len(places) < len(stacks):
        return []
    # Not children(), which leaves out a module that is listed again.
    return [(_inner_name(lists[stack], key), child) for stack in stacks for key, child in stack._modules.items()]  # type: ignore[misc]


def walk(
    module: nn.Module, stop: Callable[[nn.Module], bool], name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (canonical name, module) without looking into ``stop`` modules. Those are yielded wherever they are found,
    others once.
    """
    seen = set() if seen is None else seen
    if stop(module):
        yield name, module
    elif id(module) not in seen:
        seen.add(id(module))
        yield name, module
        for key, child in module._modules.items():
            if child is not None:
                yield from walk(child, stop, _inner_name(name, key), seen)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside, of one that is compiled, checkpointed or sharded."""
    for key in _INNER.intersection(module._modules):
        if (inner := module._modules[key]) is not None:
            return unwrapped(inner)
    return module


def is_matrix(module: nn.Module, key: str, tensor: torch.Tensor) -> bool:
    """Whether ``module`` holds a matrix under ``key``, also where an engine keeps a flat part of it only."""
    if isinstance(module, (nn.Linear, _ConvNd)) and key == "weight":
        return True
    return not is_lazy(tensor) and len(getattr(tensor, "ds_shape", tensor.shape)) > 1  # DeepSpeed's name


def _inner_name(name: str, key: str) -> str:
    return name if key in WRAPPERS else f"{name}.{key}".removeprefix(".")


def _multiplies(module: nn.Module) -> bool:
    """Whether a module has a weight matrix of its own. Quantised layers that keep it in buffers are called linear."""
    if isinstance(module, (_ConvNd, nn.Embedding)):
        return False
    if not module._modules and "Linear" in type(module).__name__:
        return True
    params = [(key, param) for key, param in module._parameters.items() if param is not None]
    return any(is_matrix(module, key, param) or _is_of_fsdp1(param) for key, param in params)


def _is_of_fsdp1(param: torch.Tensor) -> bool:
    """Whether FSDP1 has flattened it, or many into it: nothing tells what shape the weights had."""
    return getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False)


def _is_list(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        return len(module) > 1 and len(_classes(module)) == 1 and _has_parts(module)
    return isinstance(module, nn.ModuleList) and len(module) > 1


def _classes(stack: nn.Module) -> set[type[nn.Module]]:
    return {type(unwrapped(child)) for child in stack.children()}


def _is_linear(stack: nn.Module) -> bool:
    """Whether the list holds weight matrices, and no convolutions."""
    modules = list(stack.modules())
    return any(map(_multiplies, modules)) and not any(isinstance(module, _ConvNd) for module in modules)


def _has_parts(stack: nn.Module) -> bool:
    return any(list(child.children()) for child in stack.children())
