"""shard_pieces: where a shard's elements lie, against slices of an arange cut in the order in which it really is."""

import random
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import pytest
import torch
from torch import nn

from graddrop_kernels.masks.row_block import RowBlock
from graddrop_kernels.tensors.local import is_dtensor
from graddrop_kernels.tensors.shard_layout import Piece, _grouped, pieces_of, shard_pieces

distributed = pytest.importorskip("torch.distributed.tensor", reason="this torch has no torch.distributed")
Partial, Replicate, Shard = distributed.Partial, distributed.Replicate, distributed.Shard
_StridedShard = distributed.placement_types._StridedShard
uncached = shard_pieces.__wrapped__

LAYOUTS = 50_000
SIZES = (0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 11)
PART_SIZES = (1, 2, 2, 2, 3, 3, 4, 5)


class Layout(NamedTuple):
    shape: tuple[int, ...]
    placements: tuple
    mesh_shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    local: torch.Tensor  # this rank's part of an arange of that shape


def chunk(tensor: torch.Tensor, parts: int, part: int, dim: int) -> torch.Tensor:
    """As DTensor and FSDP2 cut: torch.chunk, which may make fewer parts."""
    chunks = tensor.chunk(parts, dim)
    return chunks[part] if part < len(chunks) else tensor.narrow(dim, 0, 0)


def random_layout(rng: random.Random, replayed: bool, mesh_shape: tuple[int, ...] = ()) -> Layout:
    """Each tensor dimension cut by its mesh dimensions in a random order; FSDP2 with TP: the later dimension first.

    ``replayed``: cut in the order of the mesh dimensions, by torch itself, with split factors that no order explains.
    """
    shape = tuple(rng.choice(SIZES) for _ in range(rng.choice((0, 1, 1, 2, 2, 2, 3, 3, 4))))
    mesh_shape = mesh_shape or tuple(rng.choice(PART_SIZES) for _ in range(rng.choice((1, 2, 2, 3, 3))))
    coordinate = tuple(map(rng.randrange, mesh_shape))
    cuts = [rng.choice((None, *range(len(shape)), *range(min(len(shape), 2)))) for _ in mesh_shape]
    order = rng.sample(range(len(mesh_shape)), len(mesh_shape))
    placements = [Replicate() if dim is None else Shard(dim) for dim in cuts]
    local = torch.arange(prod(shape)).view(shape)
    if replayed:
        order = range(len(mesh_shape))
    for number, i in enumerate(order):
        dim = cuts[i]
        if dim is None:
            continue
        if replayed:
            explained = {1}
            for j in range(i + 1, len(mesh_shape)):
                explained |= {factor * mesh_shape[j] for factor in explained if cuts[j] == dim}
            factor = rng.choice((1, *({2, 3, 4, 5, 7} - explained)))
        else:
            factor = prod(mesh_shape[j] for j in order[:number] if j > i and cuts[j] == dim)
        if factor > 1:
            placements[i] = _StridedShard(dim, split_factor=factor)
        if replayed and factor > 1:
            chunks, _ = placements[i]._split_tensor(local, mesh_shape[i], with_padding=False, contiguous=False)
            local = chunks[coordinate[i]]
        else:
            local = chunk(local, mesh_shape[i], coordinate[i], dim)
    return Layout(shape, tuple(placements), mesh_shape, coordinate, local)


def elements(pieces: tuple[Piece, ...]) -> list[int]:
    """The global indices of all local elements, element for element; checks that the pieces follow each other."""
    found = []
    for piece in pieces:
        assert piece.start == len(found) and piece.numel > 0
        for start, base, count in piece.layout.runs(piece.numel):
            assert start == len(found) - piece.start
            found += range(base, base + count)
    return found


def rows_of_one_block(indices: list[int]) -> bool:
    """Whether one RowBlock can hold them."""
    inner = next((i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1), len(indices))
    distance = indices[inner] - indices[0] if inner < len(indices) else 0
    return all(index == indices[0] + i // inner * distance + i % inner for i, index in enumerate(indices))


def check(layout: Layout) -> tuple[Piece, ...]:
    shape, placements, mesh_shape, coordinate, local = layout
    pieces = uncached(shape, placements, mesh_shape, coordinate, tuple(local.shape))
    indices = local.flatten().tolist()
    assert elements(pieces) == indices, layout
    assert len(pieces) <= 1 or not rows_of_one_block(indices), layout
    return pieces


def kind(pieces: tuple[Piece, ...]) -> str:
    if len(pieces) != 1:
        return "several" if pieces else "empty"
    return "range" if pieces[0].numel <= pieces[0].layout.local_inner else "rows"


def test_random_layouts(seed):
    rng, kinds = random.Random(seed), Counter()
    for number in range(LAYOUTS):
        replayed = number % 5 == 0
        layout = random_layout(rng, replayed)
        kinds[kind(check(layout))] += 1
        if any(isinstance(placement, _StridedShard) for placement in layout.placements):
            kinds["no order" if replayed else "order"] += 1
    assert set(kinds) == {"empty", "range", "rows", "several", "order", "no order"}
    assert min(kinds.values()) > LAYOUTS // 100, kinds
    print(kinds)


def fewest_pieces(indices: list[int]) -> int:
    """By trying all ways to cut them."""
    fewest = [0] + [len(indices)] * len(indices)
    for first in range(len(indices)):
        for last in range(first + 1, len(indices) + 1):
            if not rows_of_one_block(indices[first:last]):
                break
            fewest[last] = min(fewest[last], fewest[first] + 1)
    return fewest[-1]


def test_no_layout_needs_fewer_pieces(seed):
    rng, tried = random.Random(seed), 0
    while tried < 100:
        layout = random_layout(rng, replayed=tried % 2 == 0)
        if layout.local.numel() <= 40 and len(pieces := check(layout)) > 1:
            tried += 1
            assert len(pieces) == fewest_pieces(layout.local.flatten().tolist()), layout


def test_any_runs_can_be_grouped(seed):
    rng = random.Random(seed)
    for _ in range(5_000):
        runs, end = [], 0
        for _ in range(rng.randrange(1, 9)):  # at equal distances, often
            start = max(end, 3 * len(runs)) + rng.choice((0, 0, 0, 0, 1))
            runs.append((start, rng.choice((1, 2, 2, 3))))
            end = sum(runs[-1])
        assert elements(_grouped(runs)) == [start + i for start, count in runs for i in range(count)], runs


# FSDP2 over tensor parallelism: the TP mesh dimension comes second, but has cut first.


def fsdp_tp(n: int, dp: int, tp: int, dp_rank: int, tp_rank: int) -> Layout:
    """The data as they are: FSDP2 cuts the part of the n rows that tensor parallelism left on this rank."""
    local = chunk(chunk(torch.arange(n), tp, tp_rank, 0), dp, dp_rank, 0)
    return Layout((n,), (_StridedShard(0, split_factor=tp), Shard(0)), (dp, tp), (dp_rank, tp_rank), local)


def torch_shape_and_offset(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as compute

    return compute(layout.shape, layout.mesh_shape, layout.coordinate, layout.placements)


@pytest.mark.parametrize("dp", range(2, 9))
def test_all_uneven_fsdp_over_tensor_parallel(dp):
    for tp in range(2, 9):
        placements = (_StridedShard(0, split_factor=tp), Shard(0))
        for n in range(1, 129):
            for tp_rank in range(tp):
                tp_local = chunk(torch.arange(n), tp, tp_rank, 0)
                chunks = [local.tolist() for local in tp_local.chunk(dp)]
                for dp_rank, indices in enumerate(chunks + [[]] * (dp - len(chunks))):
                    pieces = uncached((n,), placements, (dp, tp), (dp_rank, tp_rank), (len(indices),))
                    assert elements(pieces) == indices and len(pieces) <= 1, (n, dp, tp, dp_rank, tp_rank)


@pytest.mark.parametrize(
    "n, dp, tp, dp_rank, tp_rank, indices, torch_says",
    [
        (9, 4, 2, 3, 0, [], ((1,), (8,))),
        (9, 4, 2, 3, 1, [8], ((0,), (9,))),
        (27, 3, 4, 2, 2, [20], ((1,), (26,))),  # the shape is right
    ],
)
def test_where_torch_is_wrong(n, dp, tp, dp_rank, tp_rank, indices, torch_says):
    """Layouts of which torch's own compute_local_shape_and_global_offset does not know where they lie."""
    layout = fsdp_tp(n, dp, tp, dp_rank, tp_rank)
    assert layout.local.tolist() == indices == elements(check(layout))
    if torch_shape_and_offset(layout) != torch_says:
        pytest.skip("this torch answers differently; if it is right, its answer could be used")


# Real DTensors, every rank in turn: a fake process group does not communicate, and nothing here needs to.


@contextmanager
def as_rank(rank: int, world_size: int):
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        _clear_sharding_prop_cache()  # its entries hold meshes, and those the rank


def count_up(shape: tuple[int, ...], requires_grad: bool = False) -> torch.Tensor:
    return torch.arange(float(prod(shape))).view(shape).requires_grad_(requires_grad)


def check_dtensor(tensor: torch.Tensor) -> tuple[Piece, ...]:
    """A tensor distributed from count_up holds the global indices of its elements."""
    assert is_dtensor(tensor)
    pieces = pieces_of(tensor)
    assert elements(pieces) == tensor.to_local().flatten().tolist(), (tensor.shape, tensor.placements)
    assert pieces is pieces_of(tensor)  # cached
    return pieces


@pytest.mark.parametrize("n, dp, tp, dp_rank, tp_rank", [(9, 4, 2, 3, 0), (20, 3, 3, 2, 1), (25, 4, 2, 3, 1)])
def test_what_torch_cuts_itself(n, dp, tp, dp_rank, tp_rank):
    """distribute_tensor goes by the placements from left to right: the same ones, but another shape and place."""
    layout = fsdp_tp(n, dp, tp, dp_rank, tp_rank)
    with as_rank(dp_rank * tp + tp_rank, dp * tp):
        mesh = torch.distributed.init_device_mesh("cpu", (dp, tp))
        tensor = distributed.distribute_tensor(count_up((n,)), mesh, layout.placements, src_data_rank=None)
        assert tensor.to_local().shape != layout.local.shape
        check_dtensor(tensor)


@pytest.mark.parametrize("mesh_shape", [(1,), (2,), (3,), (8,), (2, 2), (3, 2), (4, 2), (2, 2, 2), (1, 3, 2)], ids=str)
def test_distributed_tensors(mesh_shape, seed):
    rng, layouts = random.Random(seed), []
    while len(layouts) < 12:
        layout = random_layout(rng, replayed=True, mesh_shape=mesh_shape)
        layouts += [layout] if prod(layout.shape) else []
    for rank in range(prod(mesh_shape)):
        with as_rank(rank, prod(mesh_shape)):
            mesh = torch.distributed.init_device_mesh("cpu", mesh_shape)
            for layout in layouts:
                whole = count_up(layout.shape, requires_grad=True)
                check_dtensor(distributed.distribute_tensor(whole, mesh, layout.placements, src_data_rank=None))


def sharded_model(mesh: torch.distributed.DeviceMesh, column_shards: bool) -> nn.Module:
    """By FSDP2, over tensor parallelism if a mesh dimension is called tp; all values are global indices."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 24), nn.LayerNorm(24), nn.Conv2d(12, 24, 3))
    for param in model.parameters():
        param.data = count_up(param.shape)
    data_dims = [name for name in mesh.mesh_dim_names if name != "tp"]
    if "tp" in mesh.mesh_dim_names:
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()}, src_data_rank=None)
    by_column = lambda param: Shard(1) if param.ndim > 1 and param.shape[1] % 12 == 0 else Shard(0)
    fully_shard(model, mesh=mesh[tuple(data_dims)], shard_placement_fn=by_column if column_shards else None)
    return model


@pytest.mark.parametrize("column_shards", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize(
    "names, mesh_shape",
    [
        ("fsdp", (1,)),
        ("fsdp", (3,)),
        ("fsdp", (6,)),
        ("replicas fsdp", (2, 2)),
        ("fsdp tp", (2, 2)),
        ("fsdp tp", (4, 2)),  # torch is wrong about its rows, see above
        ("fsdp tp", (3, 4)),
        ("replicas fsdp tp", (2, 3, 2)),
    ],
)
def test_fsdp_models(names, mesh_shape, column_shards):
    kinds, owners, world_size = Counter(), defaultdict(Counter), prod(mesh_shape)
    for rank in range(world_size):
        with as_rank(rank, world_size):
            mesh = torch.distributed.init_device_mesh("cpu", mesh_shape, mesh_dim_names=tuple(names.split()))
            for name, param in sharded_model(mesh, column_shards).named_parameters():
                pieces = check_dtensor(param)
                kinds[kind(pieces)] += 1
                owners[name, param.numel()].update(elements(pieces))
    for (name, numel), ranks in owners.items():
        assert len(ranks) == numel and len(set(ranks.values())) == 1, f"{name}: not each element has as many ranks"
    assert kinds["several"] == 0 and kinds["range"] > 0
    assert (kinds["rows"] > 0) == (world_size > 1 and (column_shards or "tp" in names))


def test_a_rank_outside_of_the_mesh_has_no_elements():
    with as_rank(3, world_size=4):
        mesh = torch.distributed.DeviceMesh("cpu", [0, 1])
        for placement in (Shard(0), Replicate()):
            tensor = distributed.distribute_tensor(count_up((4, 3)), mesh, [placement], src_data_rank=None)
            assert is_dtensor(tensor) and pieces_of(tensor) == ()


def test_some_layouts_by_hand():
    assert uncached((), (Replicate(),), (2,), (1,), ()) == (Piece(0, 1, RowBlock(0, 1, 1)),)
    assert uncached((4, 6), (Replicate(), Shard(0)), (2, 2), (0, 1), (2, 6)) == (Piece(0, 12, RowBlock(12, 12, 12)),)
    assert uncached((5, 7), (Shard(0), Shard(1)), (2, 3), (0, 1), (3, 3)) == (Piece(0, 9, RowBlock(3, 3, 7)),)
    assert uncached((5, 7), (Shard(0),), (4,), (3,), (0, 7)) == ()
    assert uncached((0, 7), (Shard(1),), (4,), (0,), (0, 2)) == ()
    assert uncached((24, 9), (Shard(0), Shard(1)), (3, 4), (0, 3), (0, 0)) == ()  # as FSDP2 has it
    ends = uncached((4, 3), (_StridedShard(1, split_factor=2),), (2,), (0,), (4, 2))  # 0, 2 3, 5 6, 8 9, 11
    assert ends == (Piece(0, 1, RowBlock(0, 1, 1)), Piece(1, 7, RowBlock(2, 2, 3)))
    conv = uncached((4, 6, 4, 1), (Shard(1), Shard(2)), (2, 2), (1, 0), (4, 3, 2, 1))
    assert conv == tuple(Piece(6 * i, 6, RowBlock(24 * i + 12, 2, 4)) for i in range(4))


def test_a_column_shard_of_a_huge_matrix_is_one_piece():
    (piece,) = uncached((2**20, 2**14), (Shard(0), Shard(1)), (2, 4), (1, 3), (2**19, 2**12))
    assert piece == Piece(0, 2**31, RowBlock(2**33 + 3 * 2**12, 2**12, 2**14))


@pytest.mark.parametrize("coordinate", [(0, 1), None])
def test_partial_is_refused(coordinate):
    with pytest.raises(ValueError, match=r"\(4, 6\).*Partial.*\(2, 2\).*owners.*redistribute"):
        shard_pieces((4, 6), (Shard(0), Partial()), (2, 2), coordinate, (2, 6))


@pytest.mark.parametrize("local_shape", [(3, 6), (2, 5), (2,), (2, 6, 1), (0, 6), ()])
def test_another_local_shape_is_refused(local_shape):
    with pytest.raises(ValueError) as error:
        shard_pieces((4, 6), (Shard(0), Replicate()), (2, 3), (1, 2), local_shape)
    for part in ("(4, 6)", "(Shard(dim=0), Replicate())", "(2, 3)", "(1, 2)", str(local_shape), "(2, 6)"):
        assert part in str(error.value)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0,), (3, 0)])
def test_plain_tensors(shape):
    tensor = nn.Parameter(torch.ones(shape))
    numel = tensor.numel()
    assert not is_dtensor(tensor)
    assert pieces_of(tensor) == ((Piece(0, numel, RowBlock.whole(numel)),) if numel else ())


def test_plain_tensors_need_no_torch_distributed():
    code = """
import sys, torch, graddrop_kernels
from graddrop_kernels.tensors.shard_layout import is_dtensor, pieces_of
assert "torch.distributed.tensor" not in sys.modules
sys.modules["torch.distributed.tensor"] = None  # an import of it fails
assert pieces_of(torch.ones(2, 3))[0].numel == 6 and not is_dtensor(torch.ones(2))
"""
    subprocess.run([sys.executable, "-c", code], check=True)
