"""CUDA graphs emulated on CPU tensors, for the cuda backend's own emulation. As in a capture on a GPU, nothing that is
launched or copied runs: what a kernel or an operator of torch would write keeps its value, and new tensors hold
garbage, until a replay does all of it in order.
"""

import ctypes

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from toy import emulate_cuda

from graddrop_kernels.backends import capture, cuda
from graddrop_kernels.backends.upload import Upload

_GARBAGE = 0x7E  # as float32 8e37, as an int more than there are elements
# Not float(): an lr may lie on the host.
_READS = ("item", "tolist", "equal", "__int__", "__bool__", "nonzero")
_SPECS = {"masked_adamw": cuda.LaunchSpec, "sum_of_squares": cuda.LaunchSpec, "prologue": None}


class Graph:
    """What was launched and copied in the last capture, in order."""

    def __init__(self):
        self.recorded, self.capturing = [], False

    def capture(self, step):
        """Calls ``step`` under the capture and returns what was recorded. Only that need be kept for a replay."""
        self.recorded, self.capturing = [], True
        try:
            with _Recorder(self.recorded):
                step()
        finally:
            self.capturing = False
        return self.recorded

    @torch.no_grad()
    def replay(self, recorded=None):
        for action in self.recorded if recorded is None else recorded:
            action()


class _Recorder(TorchFunctionMode):
    """Not of TorchDispatchMode, under which torch's guards call every tensor another one."""

    def __init__(self, recorded):
        super().__init__()
        self.recorded = recorded

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.__name__
        if name == "__get__":  # of an attribute, such as grad
            return function(*args, **kwargs)
        if name in _READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        in_place = name.endswith("_") and not name.endswith("__") or name == "__setitem__"
        before = [(tensor, tensor.clone()) for tensor in _tensors(args[0])] if in_place else []
        made = function(*args, **kwargs)
        for tensor, value in before:
            tensor.copy_(value)
        new = _new(made, args, kwargs)
        for tensor in new:
            ctypes.memset(tensor.data_ptr(), _GARBAGE, tensor.numel() * tensor.element_size())
        if in_place or new and not name.startswith(("empty", "new_empty")):
            self.recorded.append(lambda: _again(function, args, kwargs, new))
        return made


def _again(function, args, kwargs, results):
    for result, tensor in zip(results, _new(function(*args, **kwargs), args, kwargs), strict=True):
        result.copy_(tensor)


def _new(made, args, kwargs):
    """The tensors that an operator has made in memory of their own."""
    given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
    return [tensor for tensor in _tensors(made) if tensor.untyped_storage().data_ptr() not in given]


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def emulate_graphs(monkeypatch) -> Graph:
    """Lets the cuda backend step CPU tensors, inside of the returned graph's capture and outside."""
    graph, call, write = Graph(), cuda._call, Upload.write

    def recording_call(name, device, *arguments):
        if not graph.capturing:
            return call(name, device, *arguments)
        spec = _SPECS[name]
        if spec is None:
            graph.recorded.append(lambda: call(name, device, *arguments))
        else:  # the first argument is the address of what lives for the call
            copied = spec.from_buffer_copy(ctypes.string_at(arguments[0], ctypes.sizeof(spec)))
            graph.recorded.append(lambda: call(name, device, ctypes.addressof(copied), *arguments[1:]))

    def ordinary_write(upload, begin, *pieces):
        assert not graph.capturing, "a copy of this step's numbers would be copied again at every replay"
        write(upload, begin, *pieces)

    emulate_cuda(monkeypatch)
    monkeypatch.setattr(cuda, "_call", recording_call)
    monkeypatch.setattr(Upload, "write", ordinary_write)
    monkeypatch.setattr(capture, "capturing", lambda device: graph.capturing)
    return graph
