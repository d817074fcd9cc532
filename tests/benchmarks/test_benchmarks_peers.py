"""What the GPU's benchmarks step and compare: shapes of real models, peers, policies, counted launches, replays."""

import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from cases import require
from torch.autograd import DeviceType

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.common import cases, peers, shapes  # noqa: E402
from benchmarks.common.tensors import MODES, make_tensors  # noqa: E402
from benchmarks.common.timers import RehearsalTimer  # noqa: E402
from benchmarks.gpu import host as host_gpu  # noqa: E402

CPU = torch.device("cpu")

# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work, total, count", [
    ("xlmr_base", 278_043_648, 199), ("xlmr_large", 559_890_432, 391), ("llama_1b", 1_235_814_400, 146),
])  # fmt: skip
def test_shapes_are_those_that_transformers_builds(work, total, count):
    transformers = pytest.importorskip("transformers")
    xlmr = {"vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1}
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    llama = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = {
            "xlmr_base": lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**xlmr)),
            "xlmr_large": lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**xlmr, **large)),
            "llama_1b": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama, **heads)),
        }[work]()
    ours = shapes.WORK[work].tensors()
    built = {(name, tuple(param.shape)) for name, param in model.named_parameters()}
    assert {(name, shape) for name, _, shape in ours} == built
    assert (sum(math.prod(shape) for *_, shape in ours), len(ours)) == (total, count)
    for name, block, _ in ours:
        in_block = re.match(r"(?:encoder\.layer|model\.layers)\.\d+(?=\.)", name)
        assert block == (in_block and in_block[0])


@pytest.mark.parametrize("numel, tensors", [(100_000, 1), (1_000_000_007, 4000), (10, 3)])
def test_flat_shapes_add_up(numel, tensors):
    made = shapes.flat(numel, tensors)
    sizes = [math.prod(shape) for *_, shape in made]
    assert len(made) == len({name for name, *_ in made}) == tensors and sum(sizes) == numel
    assert max(sizes) - min(sizes) < tensors and all(block is None for _, block, _ in made)


def test_the_rehearsals_shapes_have_the_same_structure():
    for work in shapes.WORK.values():
        small, full = work.small(), work.tensors()
        assert {re.sub(r"\d+", "#", name) for name, *_ in small} == {re.sub(r"\d+", "#", name) for name, *_ in full}
        assert [len(shape) for *_, shape in small] == [len(shape) for *_, shape in full][: len(small)] or len(small) > 1


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tensors(seed):
    torch.manual_seed(seed)
    return make_tensors(shapes.xlm_roberta(2, 64, 50, 8), "float32", CPU)


def test_missing_broken_and_absent_peers_say_so(monkeypatch):
    by_name = {peer.name: peer for peer in peers.PEERS}
    assert len(by_name) == len(peers.PEERS) and peers.BASELINE.name == "torch fused"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if not installed, whether or not it is
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))  # there, but without optim
    monkeypatch.delitem(sys.modules, "torchao.optim", raising=False)  # where another test has imported it
    assert peers.unavailable(by_name["torch fused"]) is None
    assert peers.unavailable(by_name["Liger"]) == "has no AdamW"
    assert peers.unavailable(peers.Peer("x", "no_such_package.sub", None, None.__init__, (), "")) == "not installed"
    assert "No module named 'torchao.optim'" in peers.unavailable(by_name["torchao AdamW8bit"])
    rows = {row["name"]: row for row in peers.table()}
    assert rows.keys() == by_name.keys() and rows["torch fused"]["version"] == torch.__version__
    assert rows["bitsandbytes AdamW, 8 bits"]["unavailable"] == "not installed"


def test_a_package_that_fails_to_import_is_told_from_a_missing_one(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("raise OSError('libcudart.so.11: cannot open shared object file')")
    (tmp_path / "needy_peer.py").write_text("import a_module_it_needs")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = [peers.Peer("x", module, None, lambda *_: None, (), "") for module in ("broken_peer", "needy_peer")]
    reasons = list(map(peers.unavailable, made))
    assert reasons[0] == "does not import: OSError: libcudart.so.11: cannot open shared object file"
    assert reasons[1] == "does not import: No module named 'a_module_it_needs'"


def test_other_packages_get_the_parameters_the_hypers_and_their_options(monkeypatch, tensors):
    expected = {
        "apex FusedAdam": {"adam_w_mode": True},
        "DeepSpeed FusedAdam": {"adam_w_mode": True},
        "TransformerEngine FusedAdam": {"adam_w_mode": True},
        "bitsandbytes AdamW, 32 bits": {"optim_bits": 32},
        "bitsandbytes AdamW, 8 bits": {"optim_bits": 8},
        "torchao AdamW8bit": {},
        "torchao AdamW4bit": {},
        "optimi AdamW": {"triton": True, "kahan_sum": False},
    }
    seen = {}

    class Recorder:
        def __init__(self, params, **options):
            seen.update(params=params, options=options)

        def step(self):
            return "stepped"

    stub = types.SimpleNamespace(FusedAdam=Recorder, AdamW=Recorder, AdamW8bit=Recorder, AdamW4bit=Recorder)
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: stub)
    others = [peer for peer in peers.PEERS if peer.module and peer.make]
    assert {peer.name for peer in others} == expected.keys()
    for peer in others:
        step, after = peer.make(tensors, cases.HYPERS)
        assert step() == "stepped" and after() is None
        assert all(one is other for one, other in zip(seen["params"], tensors.params))
        assert seen["options"] == cases.HYPERS | expected[peer.name]


@pytest.mark.parametrize("name", ["eager mask + torch fused", "foreach mask + torch fused"])
def test_masking_peers_mask_and_restore(name, tensors):
    peer = next(peer for peer in peers.PEERS if peer.name == name)
    before = torch.cat([param.grad.flatten() for param in tensors.params])
    step, after = peer.make(tensors, cases.HYPERS)
    step()
    masked = torch.cat([param.grad.flatten() for param in tensors.params])
    kept = masked != 0
    assert abs(kept.double().mean().item() - 0.8) < 6 * math.sqrt(0.2 * 0.8 / kept.numel()) and peer.masks
    torch.testing.assert_close(masked[kept], before[kept] / 0.8)
    after()
    assert torch.equal(torch.cat([param.grad.flatten() for param in tensors.params]), before)


@pytest.mark.parametrize("mode", MODES)
def test_torchs_steps_share_warm_moments_in_their_own_dtype(mode, seed):
    torch.manual_seed(seed)
    tensors = make_tensors(shapes.flat(1000, 3), mode, CPU)
    dtype, moment_dtype = MODES[mode]
    assert all(tensor.count_nonzero() > 300 for pair in tensors.moments for tensor in pair)
    pairs = [peers.torch_adamw(tensors, cases.HYPERS, **kind).state for kind in ({"fused": True}, {"foreach": True})]
    for param, moments in zip(tensors.params, tensors.moments):
        one, two = (state[param] for state in pairs)
        assert one["exp_avg"] is two["exp_avg"] and one["step"] is not two["step"] and one["step"] == 1000
        assert one["exp_avg"].dtype == dtype and (one["exp_avg"] is moments[0]) == (dtype == moment_dtype)
    twin = tensors.twin()
    assert all(torch.equal(a, b) and a is not b for a, b in zip(tensors.params, twin.params))
    assert all(torch.equal(a.grad, b.grad) and a.grad is not b.grad for a, b in zip(tensors.params, twin.params))


def test_policies_of_blocks_leave_the_rest_dense(tensors):
    require("cpu")
    optimizer = cases.make_optimizer(cases.CASE["GradFreeze, half frozen"], tensors, "cpu")
    optimizer.set_epoch(0)
    inside = sum(p.numel() for p, block in zip(tensors.params, tensors.blocks) if block)
    assert [len(group["params"]) for group in optimizer.param_groups] == [32, 7]
    assert cases.active_share(optimizer) == pytest.approx(1 - inside / 2 / tensors.numel)
    assert len(cases.make_optimizer(cases.CASE["GradDrop"], tensors, "cpu").param_groups) == 1


# --- host_gpu ---------------------------------------------------------------------------------------------------------


def test_driver_calls_are_told_apart():
    calls = {
        "launch": ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "hipLaunchKernel",
                   "hipModuleLaunchKernel", "cudaLaunchCooperativeKernel",
                   "cuLaunchCooperativeKernel", "hipExtModuleLaunchKernel"],
        "copy": ["cudaMemcpyAsync", "cudaMemsetAsync", "cuMemcpyHtoDAsync_v2", "hipMemcpyWithStream"],
        "synchronize": ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize",
                        "cuStreamSynchronize"],
        None: ["cudaStreamIsCapturing", "cudaEventRecord", "cudaOccupancyMaxActiveBlocksPerMultiprocessor",
               "aten::mul_", "Optimizer.step#AdamW.step", "cudaMalloc"],
    }  # fmt: skip
    kinds = {"launch": host_gpu._LAUNCH, "copy": host_gpu._COPY, "synchronize": host_gpu._SYNCHRONIZE}
    for wanted, names in calls.items():
        for name in names:
            found = [kind for kind, pattern in kinds.items() if pattern.match(name)]
            assert found == ([wanted] if wanted else []), name


def test_calls_outside_the_step_are_not_counted(monkeypatch):
    def event(name: str, start: float, end: float):
        span = types.SimpleNamespace(start=start, end=end)
        return types.SimpleNamespace(name=name, time_range=span, device_type=DeviceType.CPU)

    class Profile:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            inside = [event("cudaLaunchKernel", 11, 12), event("cuLaunchKernelEx", 13, 14)]
            inside += [event("cudaMemcpyAsync", 15, 16)]
            outside = [event("cudaLaunchKernel", 1, 2), event("cudaDeviceSynchronize", 21, 30)]
            on_gpu = event("one step", 12, 30)
            on_gpu.device_type = DeviceType.CUDA
            return [on_gpu, event("one step", 10, 20), *inside, *outside]

    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile())
    counted = host_gpu.count_launches(lambda: None, RehearsalTimer())
    assert counted == {"launches": 2, "copies": 1, "synchronizations": 0}


def test_a_replay_that_differs_is_found():
    require("cpu")

    class Forgetful(RehearsalTimer):
        def capture(self, step):
            return lambda: None

    assert host_gpu.replay_matches("GradDrop", "cpu", RehearsalTimer())["identical"] is True
    row = host_gpu.replay_matches("GradDrop", "cpu", Forgetful())
    assert row["identical"] is False and "step of encoder.layer.0.weight0" in row["differing"]
    row = host_gpu.replay_matches("GradDrop", "of-nowhere", RehearsalTimer())
    assert row["identical"] is None and row["error"].startswith("ValueError: backend='of-nowhere' is unknown")
