"""DeviceTables: the tables that the kernels on a device read in one step. The host does not wait for their copies."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from . import capture
from .batch import Hyper, TensorBatch
from .launches import Kind, Launch, in_eights, kind_of
from .tensor_table import hyper_table, tensor_table
from .upload import Upload

CHUNK = 4096  # elements per program or block of the update
ALIGNMENT = 16  # bytes of the widest access
_HYPER_BYTES, _STEP_ROW_BYTES = 136, 64
_KEPT_LAUNCHES = 8  # sets of launches remembered: LayerGradDrop with masked="frozen" has another set in every step
_FIXED_STREAMS = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "copy")  # gradients may lie elsewhere every time


class DeviceTables:
    """The tables of csrc/tensor_table.h for one batch, in its device's memory.

    ``rows`` (int64 [tensors, 14]) and ``hypers`` (int64 [hyper rows, 17]) are views of one tensor, in which the ages
    follow. The prologue kernel writes ``step_rows`` and ``by_age``. ``launches`` are the launches of this step.

    Once a CUDA graph has captured them they are the graph's: nothing of them is replaced, and only
    ``refresh_captured`` writes them. Whoever captures a step keeps them as long as the graph may be replayed. The next
    step outside of it makes tables of its own, so that neither disturbs the other.
    """

    def __init__(self, batch: TensorBatch, chunk: int = CHUNK):
        self.chunk = chunk
        self.device = batch.device
        self.host = tensor_table(batch)
        self.num_rows = len(self.host)
        self.hyper_rows = np.array(batch.hyper_rows)
        base, inner, outer, numel = (self.host[name] for name in ("base", "local_inner", "global_inner", "numel"))
        self.one_run, self.in_eights = numel <= inner, in_eights(base, inner, outer, numel)
        self.amsgrad = self.host["max_exp_avg_sq"] != 0
        self.has_copies = bool(self.host["copy"].any())
        self.addresses: list[int] = []
        self.hyper_image = b""
        self.age_room = 0
        self.upload: Any = None  # an Upload, once there is room
        self.step_rows = torch.zeros(self.num_rows, _STEP_ROW_BYTES // 4, dtype=torch.int32, device=self.device)
        self.by_age = torch.zeros(1, dtype=torch.float32, device=self.device)
        self.age_stride = 0
        self.sums = torch.zeros(1, dtype=torch.float64, device=self.device)
        self.arrived = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._together = self._together_but_grads()
        self._launches: dict[tuple[Any, ...], tuple[Launch, ...]] = {}
        self.captured_kinds: tuple[Any, ...] | None = None  # once a graph has captured them
        self._left_by_norm: int | None = None  # version of the batch whose norm has built these tables

    @classmethod
    def of(cls, batch: TensorBatch, for_norm: bool = False, chunk: int = CHUNK) -> "DeviceTables":
        """The batch's tables, up to date. They are made if it has none, or if a CUDA graph has those that it has.

        ``for_norm``: the call is for the norm of a step, and the update of the same step reuses the tables.

        Raises:
            RuntimeError: a CUDA graph is being captured, and something would have to be made. Nothing is.
        """
        tables: DeviceTables | None = batch.table
        if tables is not None:
            left_by_norm, tables._left_by_norm = tables._left_by_norm, None
            if not for_norm and left_by_norm == batch.version:
                return tables
        if tables is None or tables.is_captured:
            if capture.capturing(batch.device):
                raise RuntimeError(capture.UNPREPARED)
            tables = cls(batch, chunk)
        tables.refresh(batch)
        tables._left_by_norm = batch.version if for_norm else None
        batch.table = tables
        return tables

    @property
    def is_captured(self) -> bool:
        return self.captured_kinds is not None

    def refresh(self, batch: TensorBatch) -> None:
        """Brings the tables up to date with the batch's gradients and hyper-parameters. Copies only what has changed.
        """
        addresses = batch.grad_addresses()
        if capture.capturing(self.device):
            return self._capture(addresses, batch)
        self._make_room(batch.hypers)
        hyper_image = self._hyper_image(batch.hypers)
        if addresses != self.addresses or batch.staged:  # copies lie elsewhere in every step
            self.addresses = []  # until it is done
            self._point_to_grads(addresses, batch)
            self.upload.write(0, self.host, hyper_image)
            self.addresses = addresses
        elif hyper_image != self.hyper_image:
            self.hyper_image = b""
            self.upload.write(self.host.nbytes, hyper_image)
        self.hyper_image = hyper_image
        self.launches = self._launches_of([kind_of(hyper) for hyper in batch.hypers])

    def can_replay(self, hypers: list[Hyper]) -> bool:
        """Whether the launches that were captured can carry out a step with these hyper-parameters."""
        kinds, _ = self._signature([kind_of(hyper) for hyper in hypers])
        return kinds == self.captured_kinds and not self._lacks_room(hypers)

    def refresh_captured(self, hypers: list[Hyper]) -> None:
        """Brings the hyper-parameters up to date for the next replay of the captured step, which can carry them out."""
        hyper_image = self._hyper_image(hypers)
        if hyper_image != self.hyper_image:
            self.hyper_image = b""
            self.upload.write(self.host.nbytes, hyper_image)
            self.hyper_image = hyper_image

    def _capture(self, addresses: list[int], batch: TensorBatch) -> None:
        """Records the copy of the gradients' addresses. All else that the step needs must be on the device already."""
        if self.upload is None or self._lacks_room(batch.hypers):
            raise RuntimeError(capture.UNPREPARED)
        self._point_to_grads(addresses, batch)
        self.addresses = []  # the device still has those of the step before
        signature = self._signature([kind_of(hyper) for hyper in batch.hypers])
        if signature not in self._launches:
            raise RuntimeError(capture.UNPREPARED)
        self.upload.write_captured(self.host)
        self.launches, (self.captured_kinds, _) = self._launches[signature], signature

    def _point_to_grads(self, addresses: list[int], batch: TensorBatch) -> None:
        if batch.staged:  # all else may lie elsewhere, too
            self._together = self._together_but_grads()
        grads = np.array(addresses, np.uint64)
        self.host["grad"] = grads
        # Whether each row's tensors and layout allow whole vectors and whole Philox calls.
        self.aligned = ((self._together | grads) & (ALIGNMENT - 1) == 0) & self.in_eights
        self._aligned_bytes = self.aligned.tobytes()

    def _together_but_grads(self) -> Any:
        """The bits that are set in the address of any of a row's tensors. Of its gradient's they change."""
        return np.bitwise_or.reduce([self.host[name] for name in _FIXED_STREAMS])

    def _hyper_image(self, hypers: list[Hyper]) -> bytes:
        table = hyper_table(hypers, self.device)
        self._point_to_device_ages(table)
        return bytes(table) + b"".join(bytes(array) for array in table.age_arrays)

    def launches_of_norm(self, masked: bool) -> tuple[Launch, ...]:
        """Launches over all rows, or with ``masked`` over those of this step, whose gradients are masked."""
        if not masked:
            return self._launches_of([Kind("keep")] * len(self.hypers))
        return tuple(replace(each, kind="keep", planes=-1) if each.update else each for each in self.launches)

    def launches_of_masks(self, hypers: list[Hyper]) -> tuple[Launch, ...]:
        """Launches over the rows whose gradients a mask changes. Those of kind "keep" hold dropped blocks only."""
        kinds = (Kind("off") if hyper.plan.kind == "off" else kind_of(hyper) for hyper in hypers)
        return self._launches_of([None if kind == Kind("keep") else kind for kind in kinds])

    @contextmanager
    def places(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Scratch space for a norm: one float64 slot per program (``count`` or more) for its partial sum, and an int32
        counter of finished programs, which is 0 between norms, also after one that an exception has ended.
        """
        if self.sums.numel() < count:
            self._check_not_captured()
            self.sums = torch.zeros(count, dtype=torch.float64, device=self.device)
        try:
            yield self.sums, self.arrived
        except BaseException:
            self.arrived.zero_()
            raise

    def _check_not_captured(self) -> None:
        """Raises RuntimeError if nothing can be made any more, since a graph holds what there is."""
        if self.is_captured:
            raise RuntimeError(capture.UNPREPARED)

    def _lacks_room(self, hypers: list[Hyper]) -> bool:
        buckets, room = _age_sizes(hypers)
        return room > self.age_room or buckets > self.age_stride

    def _make_room(self, hypers: list[Hyper]) -> None:
        """Makes the tables as large as these hyper-parameters need. Ages grow with the epochs, up to one per bucket."""
        buckets, room = _age_sizes(hypers)
        if self.upload is None or room > self.age_room:
            size = self.host.nbytes + len(hypers) * _HYPER_BYTES + room
            self.upload = Upload(size, self.device)
            self.age_room = room
            ends = self.host.nbytes, self.host.nbytes + len(hypers) * _HYPER_BYTES
            self.rows = self.upload.device[: ends[0]].view(torch.int64).view(self.num_rows, -1)
            self.hypers = self.upload.device[ends[0] : ends[1]].view(torch.int64).view(len(hypers), -1)
            self.addresses = []
        if buckets > self.age_stride:
            self.by_age = torch.zeros(self.num_rows, buckets, 4, dtype=torch.float32, device=self.device)
            self.age_stride = buckets

    def _point_to_device_ages(self, hypers: Any) -> None:
        address = self.upload.device.data_ptr() + self.host.nbytes + len(hypers) * _HYPER_BYTES
        for row in hypers:
            row.ages = address
            address += 8 * row.num_ages

    def _launches_of(self, kinds: list[Any]) -> tuple[Launch, ...]:
        """The launches for the Kind of each hyper row, which is None if its plan touches nothing."""
        signature = self._signature(kinds)
        if signature not in self._launches:
            self._check_not_captured()
            while len(self._launches) >= _KEPT_LAUNCHES:
                del self._launches[next(iter(self._launches))]
            self._launches[signature] = self._make_launches(kinds)
        return self._launches[signature]

    def _signature(self, kinds: list[Any]) -> tuple[Any, ...]:
        """The values that the launches depend on. If nothing is drawn, dropped blocks share the launch of blocks that
        keep everything.
        """
        if not any(kind is not None and kind.is_drawn for kind in kinds):
            kinds = [kind._replace(name="keep") if kind and kind.name == "off" else kind for kind in kinds]
        return tuple(kinds), self._aligned_bytes

    def _make_launches(self, kinds: list[Any]) -> tuple[Launch, ...]:
        """Makes one launch per mask kind, layout, alignment and use of amsgrad, for any number of tensors."""
        drawn = {kind.cautious: kind for kind in reversed(kinds) if kind is not None and kind.is_drawn}
        members: dict[tuple[str, int, bool, bool, bool, bool, bool], list[tuple[int, Kind]]] = {}
        columns = (self.hyper_rows, self.host["numel"], self.aligned, self.one_run, self.amsgrad)
        rows = zip(*(column.tolist() for column in columns))
        for row, (hyper_row, numel, aligned, one_run, amsgrad) in enumerate(rows):
            kind = kinds[hyper_row]
            if kind is None or numel == 0:
                continue
            if kind.name == "keep":  # the prologue gives such a row a mask that keeps everything
                kind = drawn.get(kind.cautious, kind)
            name = "keep" if kind.name == "off" else kind.name
            key = (name, kind.planes, aligned, not one_run, amsgrad, kind.update, kind.cautious)
            members.setdefault(key, []).append((row, kind))
        return tuple(
            Launch(*key, frozen=any(kind.frozen for _, kind in found), ages=any(kind.ages for _, kind in found),
                   chunks=self._chunks([row for row, _ in found]))
            for key, found in members.items()
        )  # fmt: skip

    def _chunks(self, positions: list[int]) -> torch.Tensor:
        tensors = np.array(positions, np.int64)
        counts = -(-self.host["numel"][tensors] // self.chunk)
        ends = np.cumsum(counts)
        within = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        chunks = torch.from_numpy(np.repeat(tensors << 40, counts) | within)
        if self.device.type == "cpu":
            return chunks
        return chunks.pin_memory().to(self.device, non_blocking=True)


def _age_sizes(hypers: list[Hyper]) -> tuple[int, int]:
    """(most buckets that have ages, bytes of all ages)."""
    buckets = [hyper.plan.buckets for hyper in hypers if hyper.plan.ages]
    return max(buckets, default=0), 8 * sum(buckets)
