"""Launches, copies and questions go to the device of their tensors, whichever is current: torch.cuda is faked, as it
takes a machine with two GPUs to see it.
"""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from graddrop_kernels import FusedGradDropAdamW, GradDrop
from graddrop_kernels.backends import capture, cuda
from graddrop_kernels.backends.upload import Upload

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


class Cuda:
    """Two devices, each with a current stream, of which one may be capturing. The first device is current."""

    def __init__(self, monkeypatch):
        self.current, self.capturing = 0, None
        monkeypatch.setattr(torch.cuda, "device", self.device)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.current == self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)

    @contextmanager
    def device(self, device):
        before, self.current = self.current, torch.device(device).index
        yield
        self.current = before

    def current_stream(self, device=None):
        index = self.current if device is None else torch.device(device).index
        return mock.Mock(cuda_stream=1000 + index)


@pytest.fixture
def faked(monkeypatch) -> Cuda:
    return Cuda(monkeypatch)


@pytest.mark.parametrize("device", [FIRST, SECOND], ids=str)
def test_each_device_is_asked_whether_it_captures(device, faked):
    for faked.capturing in (None, 0, 1):
        assert capture.capturing(device) == (device.index == faked.capturing)
    assert not capture.capturing(torch.device("cpu")) and faked.current == 0


@pytest.mark.parametrize("device", [FIRST, SECOND], ids=str)
def test_a_launch_is_on_the_current_stream_of_its_device(device, faked, monkeypatch):
    launched = []

    def launch(*arguments):
        launched.append((faked.current, arguments))
        return 0

    monkeypatch.setattr(cuda, "_load", lambda: (mock.Mock(graddrop_cuda_prologue=launch), None))
    cuda._call("prologue", device, 7)
    assert launched == [(device.index, (7, 1000 + device.index))]


@pytest.mark.parametrize("device", [FIRST, SECOND], ids=str)
def test_a_pinned_buffer_is_free_when_its_device_has_read_it(device, faked, monkeypatch):
    """Not when the current device has reached the same place."""
    events = []

    class Event:
        def __init__(self):
            self.stream, self.done = None, True
            events.append(self)

        def query(self):
            return self.done

        def record(self, stream=None):
            self.stream, self.done = stream or torch.cuda.current_stream(), False

    upload = Upload(48, torch.device("cpu"))
    upload._array, target = None, mock.MagicMock(device=device)
    target.numel.return_value, target.is_cuda = 48, False
    upload.device = target
    monkeypatch.setattr(torch.cuda, "Event", Event)
    upload.write(16, b"12345678")
    upload.write(16, b"12345678")
    assert [event.stream.cuda_stream for event in events] == [1000 + device.index] * 2, "the first was still being read"
    events[0].done = True
    upload.write(16, b"12345678")
    assert len(events) == 2
    target.__getitem__.assert_called_with(slice(16, 24))


def test_a_batch_holds_one_device(seed):
    """So that its launches and its norm are on that device."""
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(5)) for _ in range(4)]
    optimizer = FusedGradDropAdamW(params, mask=GradDrop(0.3), backend="reference")
    for param in params:
        param.grad = torch.randn(5)
    optimizer.step()
    members = optimizer._stepper.prepared.members
    rows = [row for member in members.values() for row in member.rows]
    for row, device in zip(rows, (FIRST, SECOND, FIRST, SECOND)):
        row.facts = (device, *row.facts[1:])
    wholes = optimizer._stepper.prepared._sort(list(members.values()))
    assert [(whole.facts[0], whole.members) for whole in wholes] == [(FIRST, [0, 2]), (SECOND, [1, 3])]
