"""The tables of the GPU's results: {benchmark: its JSON} of one machine -> Markdown."""

from .goals import MODES, judge, label, measured
from .markdown import markdown, number

STEPS = {"XLM-R-large": "step_gpu_xlmr_large", "XLM-R-base": "step_gpu_xlmr_base",
         "Llama-3.2-1B": "step_gpu_llama_1b", "one tensor": "step_gpu_one_tensor"}  # fmt: skip
SLOW_PEERS = "step_gpu_xlmr_large_slow_peers"


def _by_mode(results: dict, benchmark: str) -> dict[str, dict]:
    """Returns {mode: configuration} of those that were measured, in the order of MODES."""
    found = {config["mode"]: config for config in results[benchmark]["configs"]}
    return {mode: found[mode] for mode in MODES if mode in found}


def _labels(configs: dict[str, dict]) -> list[str]:
    """Returns labels: ours first, then the peers, in the order of measuring."""
    rows = [row for config in configs.values() for row in config["rows"]]
    return list(dict.fromkeys(label(row) for kind in ("ours", "peer", "check") for row in rows if row["kind"] == kind))


def _grid(configs: dict[str, dict], head: str, cell) -> str:
    """Returns a row per variant, a column per mode. Variants without any figure are left out (see the table of
    peers).
    """
    rows = []
    for name in _labels(configs):
        found = [next((row for row in config["rows"] if label(row) == name), {}) for config in configs.values()]
        if any("seconds" in row for row in found):
            pairs = zip(found, configs.values())
            rows.append([name, *(cell(row, config) if "seconds" in row else "–" for row, config in pairs)])
    return markdown([head, *configs], rows)


def _step(work: str):
    def table(results: dict) -> str:
        configs = _by_mode(results, STEPS[work])
        if not configs:
            return "*Nothing measured.*"
        first = next(iter(configs.values()))
        copies = ", ".join(f"{config['copy']['gb_per_s']:.0f}" for config in configs.values())
        text = f"{work}: {first['numel'] / 1e6:.1f}M parameters in {first['tensors']} tensors. Copy: {copies} GB/s."
        cell = lambda row, _: f"{row['ratio']:.3f} ({row['of_copy']:.0%})"
        return f"{text}\n\n{_grid(configs, 'time / torch fused (share of copy bandwidth)', cell)}"

    return table


def _detail(results: dict) -> str:
    parts = []
    header = ["", "ms", "quartiles", "/ torch fused", "quartiles", "/ mask=None", "B/parameter", "GB/s", "of copy",
              "host us", "host ahead", "rounds"]  # fmt: skip
    for benchmark in (*STEPS.values(), SLOW_PEERS):
        for mode, config in _by_mode(results, benchmark).items() if benchmark in results else ():
            rows = []
            for row in measured(config["rows"]):
                ms = [number(row[key] * 1e3, 3) for key in ("seconds", "seconds_q1", "seconds_q3")]
                ratio = [number(row[key], 3) for key in ("ratio", "ratio_q1", "ratio_q3")]
                rows.append([
                    label(row), ms[0], f"{ms[1]}–{ms[2]}", ratio[0], f"{ratio[1]}–{ratio[2]}",
                    number(row["over_unmasked"], 3), number(row["bytes_per_param"]), number(row["gb_per_s"], 0),
                    f"{row['of_copy']:.0%}", number(row["host_seconds"] * 1e6, 0), f"{row['ahead']:.0%}",
                    str(row["rounds"]),
                ])  # fmt: skip
            title = f"{config['work']}, {mode}, {config['numel'] / 1e6:.1f}M parameters in {config['tensors']} tensors"
            parts.append(f"{title}\n\n{markdown(header, rows)}")
    return "\n\n".join(parts)


def _memory(results: dict) -> str:
    configs = _by_mode(results, STEPS["XLM-R-large"])
    cell = lambda row, config: f"{row['kept_bytes'] / config['numel']:.3f} + {row['peak_bytes'] / config['numel']:.3f}"
    return _grid(configs, "bytes per parameter: kept beside shared moments + during a step", cell)


def _first_steps(results: dict) -> str:
    configs = _by_mode(results, STEPS["XLM-R-large"])
    ms = {
        (mode, label(row)): row["seconds"] * 1e3
        for mode, config in configs.items()
        for row in measured(config["first_steps"])
    }
    rows = []
    for name in dict.fromkeys(name for _, name in ms):
        rows.append([name, *(number(ms.get((mode, name)), 3) for mode in configs)])
    return markdown(["ms of the first step, moments of zeros", *configs], rows)


def _frozen(results: dict) -> str:
    rows = measured(results["sweeps_gpu"]["frozen"])
    kinds = list(dict.fromkeys((row["backend"], row["mode"]) for row in rows))
    found = {(row["name"], row["backend"], row["mode"]): row for row in rows}
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [found.get((name, *kind)) for kind in kinds]
        share = next(filter(None, own))["active"]
        table.append([name, number(share), *(number(row and row["ratio"], 3) for row in own)])
    labels = [f"{backend}, {mode}" for backend, mode in kinds]
    return markdown(["time / nothing frozen", "share trained", *labels], table)


def _sweep(rows: list[dict], key: str, head: str) -> str:
    """Returns a row per variant and mode, a column per value of ``key``: microseconds."""
    values = sorted({row[key] for row in rows})
    found = {(label(row), row["mode"], row[key]): row["seconds"] * 1e6 for row in rows}
    table = []
    for name, mode in dict.fromkeys((label(row), row["mode"]) for row in rows):
        table.append([f"{name}, {mode}", *(number(found.get((name, mode, value)), 1) for value in values)])
    return markdown([head, *(f"{value:g}" for value in values)], table)


def _sizes(results: dict) -> str:
    return _sweep(measured(results["sweeps_gpu"]["sizes"]), "numel", "us per step, one tensor of this many elements")


def _counts(results: dict) -> str:
    rows = measured(results["sweeps_gpu"]["counts"])
    tables = []
    for total in dict.fromkeys(row["total"] for row in rows):
        of_total = [row for row in rows if row["total"] == total]
        tables.append(_sweep(of_total, "tensors", f"us per step, {total / 1e6:g}M elements in tensors"))
    return "\n\n".join(tables)


def _host(results: dict) -> str:
    rows = measured(results["host_gpu"]["host"])
    found = {(label(row), row["moving"]): row for row in rows}
    cells = lambda row: f"{row['seconds'] * 1e6:.0f} ({row['seconds_q1'] * 1e6:.0f}–{row['seconds_q3'] * 1e6:.0f})"
    names = dict.fromkeys(label(row) for row in rows)
    count = rows[0]["tensors"] if rows else 0
    table = [[name, cells(found[name, False]), cells(found[name, True])] for name in names]
    return markdown([f"us of step() on the host, {count} tensors", "addresses fixed", "addresses moving"], table)


def _launches(results: dict) -> str:
    table = []
    for row in measured(results["host_gpu"]["launches"]):
        figures = [str(row[key]) for key in ("launches", "copies", "synchronizations")]
        table.append([label(row), *figures, row["refused"] or "none"])
    header = ["one step", "kernel launches", "copies, fills", "synchronisations", "torch objects to a synchronisation"]
    return markdown(header, table)


def _graphs(results: dict) -> str:
    says = {True: "every bit equal", False: "differs", None: "not captured"}
    rows = [[label(row), says[row["identical"]], row.get("error", "")] for row in results["host_gpu"]["graphs"]]
    return markdown(["captured in a CUDA graph, replayed beside eager steps", "result", ""], rows)


def _modes(results: dict) -> str:
    """Returns a table for each of common/modes.py and each work, in units of its first row."""
    parts = []
    header = ["", "ms", "/ first row", "quartiles", "B/parameter", "GB/s", "of copy", "rounds"]
    for config in results["modes_gpu"]["configs"]:
        rows = [
            [label(row), number(row["seconds"] * 1e3, 3), number(row["ratio"], 3),
             f"{number(row['ratio_q1'], 3)}–{number(row['ratio_q3'], 3)}", number(row["bytes_per_param"], 0),
             number(row["gb_per_s"], 0), f"{row['of_copy']:.0%}", str(row["rounds"])]
            for row in measured(config["rows"])
        ]  # fmt: skip
        size = f"{config['numel'] / 1e6:.1f}M parameters in {config['tensors']} tensors"
        title = f"{config['table'].capitalize()}, {config['mode']}, {config['work']}: {size}. "
        parts.append(f"{title}Copy: {config['copy']['gb_per_s']:.0f} GB/s.\n\n{markdown(header, rows)}")
        missing = "; ".join(f"{label(row)} ({row['error']})" for row in config["rows"] if "error" in row)
        if missing:
            parts.append(f"Not measured: {missing}.")
    return "\n\n".join(parts) or "*Nothing measured.*"


def _peers(results: dict) -> str:
    peers = next(result["peers"] for name, result in results.items() if name.startswith("step_gpu"))
    rows = [[peer["name"], peer["version"] or "–", peer["unavailable"] or "measured", peer["note"]] for peer in peers]
    return markdown(["peer", "version", "here", "what it does otherwise"], rows).replace("---:", "---")


def _slow_peers(results: dict) -> str:
    return _grid(_by_mode(results, SLOW_PEERS), "time / torch fused", lambda row, _: number(row["ratio"], 3))


def _run(results: dict) -> str:
    stages = results["gpu_run"]["stages"]
    rows = [[each["stage"], each["status"], number(each["seconds"], 0), each.get("why", "")] for each in stages]
    return markdown(["stage", "outcome", "s", ""], rows).replace("---:", "---")


def _machine(results: dict) -> str:
    facts = next(iter(results.values()))["machine"]
    gpu = facts["gpu"] or {}
    told = {
        "GPU": f"{gpu.get('name')}, compute capability {gpu.get('capability')}, "
        f"{gpu.get('multiprocessors')} multiprocessors",
        "memory": f"{number(gpu.get('memory_gib'), 0)} GiB, L2 {number(gpu.get('l2_mib'), 0)} MiB",
        "clocks": f"SM at most {number(gpu.get('sm_mhz_max'), 0)} MHz, "
        f"memory {number(gpu.get('memory_mhz_max'), 0)} MHz, power limit {number(gpu.get('power_limit_w'), 0)} W",
        "software": f"driver {gpu.get('driver')}, CUDA {gpu.get('cuda_runtime')}, torch {facts['torch']}, "
        f"Triton {gpu.get('triton')}, nvcc {gpu.get('nvcc')}, Python {facts['python']}",
        "host": f"{facts['cpu']}, {facts['cores']} cores",
    }
    return markdown(["", ""], [[key, value] for key, value in told.items()]).replace("---:", "---")


def _goals(results: dict) -> str:
    shown = {True: "yes", False: "no", None: "not measured"}
    rows = [[goal.text, goal.bound, number(value, 3), shown[reached]] for goal, value, reached in judge(results)]
    return markdown(["best of our backends", "goal", "measured", "reached"], rows)


_SOME_STEP = (*STEPS.values(), SLOW_PEERS)
_LARGE = (STEPS["XLM-R-large"],)
TABLES = {  # name in the marker: (benchmarks, of which one suffices; the table), as in cpu_tables
    "gpu-machine": ((*_SOME_STEP, "sweeps_gpu", "host_gpu", "modes_gpu", "gpu_run"), _machine),
    "gpu-goals": ((*_LARGE, "host_gpu"), _goals),
    "gpu-step": (_LARGE, _step("XLM-R-large")),
    "gpu-step-base": ((STEPS["XLM-R-base"],), _step("XLM-R-base")),
    "gpu-step-llama": ((STEPS["Llama-3.2-1B"],), _step("Llama-3.2-1B")),
    "gpu-step-one-tensor": ((STEPS["one tensor"],), _step("one tensor")),
    "gpu-memory": (_LARGE, _memory),
    "gpu-first-step": (_LARGE, _first_steps),
    "gpu-frozen": (("sweeps_gpu",), _frozen),
    "gpu-sizes": (("sweeps_gpu",), _sizes),
    "gpu-counts": (("sweeps_gpu",), _counts),
    "gpu-host": (("host_gpu",), _host),
    "gpu-launches": (("host_gpu",), _launches),
    "gpu-graphs": (("host_gpu",), _graphs),
    "gpu-modes": (("modes_gpu",), _modes),
    "gpu-slow-peers": ((SLOW_PEERS,), _slow_peers),
    "gpu-peers": (_SOME_STEP, _peers),
    "gpu-detail": (_SOME_STEP, _detail),
    "gpu-run": (("gpu_run",), _run),
}  # fmt: skip


def caption(result: dict) -> str:
    """Says where the figures come from, and what makes them doubtful."""
    facts = result["machine"]
    gpu = facts["gpu"] or {"name": "no GPU", "driver": None, "cuda_runtime": None, "triton": None}
    doubts = {
        "a rehearsal on CPU tensors, no measurement": result["rehearsal"],
        "code changed since that commit": facts["dirty"],
        "csrc edited after it was compiled": facts["cuda_kernels_older_than_csrc"],
    }
    found = ", ".join(doubt for doubt, applies in doubts.items() if applies)
    versions = f"CUDA {gpu['cuda_runtime']}, torch {facts['torch']}, Triton {gpu['triton']}"
    where = f"{gpu['name']}, driver {gpu['driver']}, {versions}, commit {(facts['commit'] or 'unknown')[:9]}"
    return f"{where}; **{found}**" if found else where
