"""The tables of the CPU's results: {benchmark: its JSON} of one machine -> Markdown."""

import statistics
from collections.abc import Callable

from .markdown import markdown, number

DTYPES = ("float32", "bfloat16")
BUSY = 0.1  # cores that other programs may use before a table warns


# Parts of step_cpu's results. A run has one dtype and thread count, a configuration is one of its layouts.


def threads_of(run: dict) -> str:
    count = run["bandwidth"]["threads"]
    return f"{count} thread{'s' if count > 1 else ''}"


def config_of(run: dict, layout: str) -> dict:
    """Returns the full-size configuration of a layout, which is measured before the small one."""
    return next(config for config in run["configs"] if config["layout"] == layout)


def names_of(configs: list[dict], *kinds: str) -> list[str]:
    """Returns the names of the rows, by kind, in the order of measuring."""
    rows = [row for kind in kinds for config in configs for row in config["rows"] if row["kind"] == kind]
    return list(dict.fromkeys(row["name"] for row in rows))


def row_of(config: dict, name: str, isa: str | None = None) -> dict:
    """Returns the row, on the best instruction set unless one is given; empty if it was not measured."""
    wanted = (isa or config["isas"][0], None)
    return next((row for row in config["rows"] if row["name"] == name and row["isa"] in wanted), {})


def _runs(results: dict) -> list[tuple[str, dict]]:
    """Returns (label, run) in the order of the columns."""
    found = [(dtype, run) for dtype in DTYPES for run in results.get(f"step_cpu_{dtype}", {}).get("runs", ())]
    return [(f"{dtype}, {threads_of(run)}", run) for dtype, run in found]


# The tables of one machine: {benchmark: its JSON} -> Markdown.


def _ratios(results: dict, layout: str) -> str:
    labels, runs = zip(*_runs(results))
    configs = [config_of(run, layout) for run in runs]
    rows = [
        [name, *(number(row_of(config, name).get("ratio")) for config in configs)]
        for name in names_of(configs, "ours", "peer", "check")
    ]
    return markdown([f"time / torch fused, {layout}", *labels], rows)


def step_detail(dtype: str, run: dict, config: dict) -> str:
    """Returns every row of one configuration, and the bandwidth measured on the same threads."""
    speeds = {name: (run["bandwidth"][name] or {}).get("gb_per_s") for name in ("copy", "triad", "adamw")}
    measured = ", ".join(f"{name} {number(speed, 0)}" for name, speed in speeds.items())
    size = f"{config['numel'] / 1e6:.1f}M parameters in {config['tensors']} tensors"
    title = f"{dtype}, {size}, {threads_of(run)}. Bandwidth ({run['bandwidth']['method']}): {measured} GB/s."
    header = ["", "ms", "p20–p80", "/ torch fused", "p20–p80", "ns/parameter", "GB/s", "of bandwidth", "steps"]
    rows = []
    for row in config["rows"]:
        rows.append([
            f"{row['name']} [{row['isa']}]" if row["isa"] else row["name"],
            number(row["seconds"] * 1e3),
            f"{number(row['seconds_p20'] * 1e3)}–{number(row['seconds_p80'] * 1e3)}",
            number(row["ratio"]),
            f"{number(row['ratio_p20'])}–{number(row['ratio_p80'])}",
            number(row["ns_per_param"], 3),
            number(row["gb_per_s"], 1),
            f"{row['gb_per_s'] / speeds['adamw']:.0%}" if speeds["adamw"] else "–",
            str(row["repetitions"]),
        ])  # fmt: skip
    return f"{title}\n\n{markdown(header, rows)}"


def _details(results: dict) -> str:
    configs = [(label.split(",")[0], run, config) for label, run in _runs(results) for config in run["configs"]]
    return "\n\n".join(step_detail(*each) for each in configs)


def _isas(results: dict) -> str:
    configs = [(label, config) for label, run in _runs(results) for config in run["configs"]]
    layers = [(label, config) for label, config in configs if config["layout"] == "layers"]
    lines = [(label, config, isa) for label, config in layers for isa in config["isas"]]
    names = names_of([config for _, config, _ in lines], "ours")
    rows = []
    for label, config, isa in lines:
        label = f"{label}, {isa}, {config['numel'] / 1e6:.3g}M"
        rows.append([label, *(number(row_of(config, name, isa).get("ratio")) for name in names)])
    return markdown(["time / torch fused, layers", *names], rows)


# The front page's short table: {title: names of measured rows}, the range over all runs of a dtype.
FACTS = {
    "GradDrop, drawn inside the step": ("GradDrop",),
    "the same mask drawn in PyTorch and multiplied in": (
        "bernoulli_ mask, multiply, torch fused", "torch.rand mask, multiply, torch fused",
    ),
}  # fmt: skip


def _facts(results: dict) -> str:
    """Returns ranges over all runs per dtype."""
    runs = {dtype: results.get(f"step_cpu_{dtype}", {}).get("runs", ()) for dtype in DTYPES}
    configs = {dtype: [config_of(run, "layers") for run in own] for dtype, own in runs.items() if own}

    def cell(names: tuple[str, ...], own: list[dict]) -> str:
        ratios = [row_of(config, name).get("ratio") for config in own for name in names]
        ratios = [ratio for ratio in ratios if ratio is not None]
        return " to ".join(dict.fromkeys(map(number, (min(ratios), max(ratios))))) if ratios else "–"

    table = [[title, *(cell(names, own) for own in configs.values())] for title, names in FACTS.items()]
    return markdown(["time of a step / torch fused without a mask", *configs], table)


def _frozen_blocks(results: dict) -> str:
    labels, runs = zip(*_runs(results))
    sweeps = [[row for row in config_of(run, "layers")["rows"] if row["kind"] == "sweep"] for run in runs]
    rows = []
    for entries in zip(*sweeps):
        times = [number(row["seconds"] / sweep[0]["seconds"]) for row, sweep in zip(entries, sweeps)]
        rows.append([entries[0]["name"], number(entries[0]["active"]), *times])
    return markdown(["time / nothing frozen", "share trained", *labels], rows)


def _bandwidth(results: dict) -> str:
    rows = []
    for row in results["bandwidth"]["rows"]:
        speeds = [row[name] for name in ("copy", "triad", "adamw")]
        cells = [f"{speed['gb_per_s']:.1f} ({speed['traffic_gb_per_s']:.1f})" if speed else "–" for speed in speeds]
        rows.append([str(row["threads"]), *cells, row["method"]])
    return markdown(["threads", "copy, GB/s (with lines fetched for stores)", "triad", "AdamW pattern", "by"], rows)


def _host_overhead(results: dict) -> str:
    rows = results["host_overhead"]["rows"]
    counts = sorted({row["tensors"] for row in rows})
    seconds = {(row["name"], row["tensors"]): row["seconds"] for row in rows}
    names = dict.fromkeys(row["name"] for row in rows)
    table = [[name, *(number(seconds[name, count] * 1e3) for count in counts)] for name in names]
    return markdown(["ms per step, by tensors of one element", *map(str, counts)], table)


def _memory(results: dict) -> str:
    rows = results["memory"]["rows"]
    kinds = list(dict.fromkeys((row["dtype"], row["moment_dtype"]) for row in rows))
    found = {(row["name"], row["dtype"], row["moment_dtype"]): row for row in rows}
    table = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [found.get((name, *kind), {}) for kind in kinds]
        cells = [f"{row['kept_per_param']:.3f} + {number(row['step_peak_per_param'])}" if row else "–" for row in own]
        bits = next(row["mask_bits"] for row in own if row)
        table.append([name, str(bits), *cells])
    labels = [f"{dtype}, moments {moments}" for dtype, moments in kinds]
    return markdown(["bytes per parameter: kept + during a step", "mask bits", *labels], table)


def _modes(results: dict) -> str:
    """Returns times over that of each table's first row."""
    tables = results["modes_cpu"]["tables"]
    counts = list(dict.fromkeys(table["threads"] for table in tables))
    parts = []
    for name in dict.fromkeys(table["table"] for table in tables):
        same = [table for table in tables if table["table"] == name]
        own = {table["threads"]: {row["name"]: row["ratio"] for row in table["rows"]} for table in same}
        rows = [[row, *(number(own[count].get(row)) for count in counts)] for row in own[counts[0]]]
        labels = [f"{count} thread{'s' if count > 1 else ''}" for count in counts]
        parts.append(markdown([f"{name}: time / the first row's", *labels], rows))
    return "\n\n".join(parts)


def _skip_backward(results: dict) -> str:
    """Returns the savings in a whole training step, in percent of the dense one."""
    tables = results["skip_backward"]["tables"]
    saved = lambda ratio: f"{100 * (1 - ratio):.1f}"
    lines = []
    for rows in zip(*(table["rows"] for table in tables)):
        flops = saved(statistics.mean(row["flops_ratio"] for row in rows))
        times = [f"{saved(row['ratio'])} ({saved(row['ratio_p80'])} to {saved(row['ratio_p20'])})" for row in rows]
        lines.append([rows[0]["name"], flops, *times])
    labels = [f"time, {table['threads']} thread{'s' if table['threads'] > 1 else ''} (p20 to p80)" for table in tables]
    return markdown(["saved of a training step, %", "FLOPs", *labels], lines)


def _sampled_blocks(results: dict) -> str:
    """Returns a line per way to train: time over that of full fine-tuning, memory, loss, whether it resumes."""
    own, table = results["sampled_blocks"], []
    for row in own["rows"]:
        if "error" in row:
            table.append([f"{row['name']}: {row['error']}", *"–" * 5])
            continue
        tail = row["losses"][-10:]
        table.append([
            row["name"],
            f"{number(row['ratio'])} ({number(row['ratio_p20'])} to {number(row['ratio_p80'])})",
            number(row["peak_bytes"] and row["peak_bytes"] / 1e6, 0),
            f"{number(row['kept_bytes'] / 1e6, 1)} ({number(row['kept_bytes'] / row['computed_bytes'])})",
            number(sum(tail) / len(tail)),
            "yes" if row["same_bits"] else "**no**",
        ])  # fmt: skip
    header = [
        f"{own['layers']} blocks, {own['steps']} steps, others every {own['every']} steps",
        "time / full fine-tuning (p20 to p80)",
        "peak memory, MB",
        "kept by the optimizer, MB (/ moments of its blocks and the rest)",
        "loss, last 10 steps",
        "resumes to the same bits",
    ]
    whose = "; ".join(f"{name} is {source}" for name, source in own["sources"].items())
    return f"{markdown(header, table)}\n\n{whose}."


def _growing_costs(results: dict) -> str:
    """Returns a table each for patterns of gradients, strides, epochs and groups."""
    own = results["growing_costs"]

    def crossed(title: str, rows: list[dict], by: str, value: Callable[[dict], str]) -> str:
        columns = list(dict.fromkeys(row[by] for row in rows))
        cells = {(row["name"], row[by]): value(row) for row in rows}
        names = dict.fromkeys(row["name"] for row in rows)
        return markdown([title, *map(str, columns)], [[name, *(cells[name, by] for by in columns)] for name in names])

    strides = [
        [row["name"], number(row["seconds"] * 1e3), number(row["over_contiguous"])] for row in own["channels_last"]
    ]
    histories = {row["name"]: row["bytes"] for row in own["epochs"] if row["bytes"] is not None}
    bytes_kept = ", ".join(f"{name} {size}" for name, size in histories.items())
    return "\n\n".join((
        crossed("time / torch fused, by gradients", own["experts"], "work", lambda row: number(row["ratio"])),
        markdown(["one convolution under channels_last", "ms", "/ contiguous"], strides),
        crossed("ms of a step, by epochs before it", own["epochs"], "epochs", lambda row: number(row["seconds"] * 1e3)),
        f"Bytes of a group's history at the end: {bytes_kept}.",
        crossed("seconds, a group per parameter", own["groups"], "work", lambda row: number(row["seconds"], 3)),
    ))  # fmt: skip


def _trained_rows(results: dict) -> str:
    """Returns times and bytes in percent of a dense step's."""
    own = results["trained_rows"]
    dense = own["rows"][0]
    lines = [
        [row["name"], number(row["seconds"] * 1e3, 3), number(100 * row["ratio"]), f"{row['moment_bytes']:,}",
         number(100 * row["moment_bytes"] / dense["moment_bytes"])]
        for row in own["rows"]
    ]  # fmt: skip
    rows, width = own["shape"]
    what = f"a weight of {rows:,} x {width}, {own['threads']} threads"
    return markdown([what, "ms", "% of torch fused", "moments, bytes", "%"], lines)


def _attached_mask(results: dict) -> str:
    """Returns the time of a pass, beside one step of torch and a mask by hand."""
    own = results["attached_mask"]
    lines = [
        [row["name"], number(row["seconds"] * 1e3), number(row["ratio"]), number(row["bernoulli_ratio"], 1)]
        for row in own["rows"]
    ]
    what = f"{own['numel']:,} gradients, {own['threads']} threads, {own['isa']}"
    return markdown([what, "ms", "/ torch fused AdamW", "times as fast as bernoulli_"], lines)


def _precision(results: dict) -> str:
    """Returns the mean and, after the sign, the standard deviation over the seeds."""
    rows = results["precision"]["rows"]
    languages, table = list(rows[0]["accuracy"]), []
    for weights in dict.fromkeys(row["weights"] for row in rows):
        own = [row for row in rows if row["weights"] == weights]
        tails = [row["losses"][-10:] for row in own]
        columns = [[row["accuracy"][language] for row in own] for language in languages]
        columns.append([sum(tail) / len(tail) for tail in tails])
        spread = lambda values: f" ± {number(statistics.stdev(values))}" if len(values) > 1 else ""
        cells = [f"{number(statistics.mean(values))}{spread(values)}" for values in columns]
        table.append([weights, str(len(own)), *cells])
    return markdown(["weights", "seeds", *(f"{name}, %" for name in languages), "loss, last 10 steps"], table)


def _policy_costs(results: dict) -> str:
    """Returns a line per policy: memory beyond plain AdamW's, and the range of its time over all runs of step_cpu."""
    configs = [config_of(run, "layers") for _, run in _runs(results)]
    if not configs:
        return "*No results yet.*"
    memory = [row for row in results.get("memory", {}).get("rows", ()) if row["dtype"] == row["moment_dtype"]]
    kept = {row["name"]: row["kept_per_param"] for row in memory if row["dtype"] == "float32"}
    saved = {}
    for table in results.get("skip_backward", {}).get("tables", ()):
        for row in table["rows"]:
            saved.setdefault(row["name"], []).append(100 * (1 - row["flops_ratio"]))
    rows = []
    for name in names_of(configs, "ours"):
        ratios = [row_of(config, name).get("ratio") for config in configs]
        ratios = [ratio for ratio in ratios if ratio is not None]
        times = " to ".join(dict.fromkeys(map(number, (min(ratios), max(ratios)))))
        more = number(kept[name] - kept["mask=None"], 3) if {name, "mask=None"} <= kept.keys() else "–"
        skipped = saved.get(f"{name}(0.2), skip_dropped()")
        rows.append([name, more, times, f"{number(statistics.mean(skipped), 1)} %" if skipped else "–"])
    header = ["policy", "bytes per parameter beyond AdamW's", "time of a step / torch fused without a mask"]
    return markdown([*header, "FLOPs of a training step saved by skip_dropped()"], rows)


def _machine(results: dict) -> str:
    facts = next(iter(results.values()))["machine"]
    processor = f"{facts['cpu']} (family {facts['family']}, model {facts['model']}), {facts['cores']} cores"
    caches = ", ".join(f"{level} {size}" for level, size in facts["caches"].items())
    rows = [
        ["processor", processor + (", virtual" if facts["virtual"] else "")],
        ["clock", f"{number(facts['mhz_now'], 0)} MHz when read, at most {number(facts['mhz_max'], 0)} MHz"],
        ["memory", f"{caches}; {facts['memory_gib']} GiB; huge pages: {facts['huge_pages']}"],
        ["instruction sets", f"{', '.join(facts['isas'])}; torch uses {facts['torch_isa']}"],
        ["software", f"{facts['system']}, Python {facts['python']}, torch {facts['torch']}, {facts['compiler']}"],
    ]
    return markdown(["", ""], rows).replace("---:", "---")


_STEP = tuple(f"step_cpu_{dtype}" for dtype in DTYPES)
TABLES = {  # name in the marker: (benchmarks, of which one suffices; the table)
    "machine": (_STEP, _machine),
    "facts": (_STEP, _facts),
    "step": (_STEP, lambda results: _ratios(results, "layers")),
    "step-one-tensor": (_STEP, lambda results: _ratios(results, "one tensor")),
    "isas": (_STEP, _isas),
    "frozen-blocks": (_STEP, _frozen_blocks),
    "policy-costs": ((*_STEP, "memory", "skip_backward"), _policy_costs),
    "bandwidth": (("bandwidth",), _bandwidth),
    "host-overhead": (("host_overhead",), _host_overhead),
    "memory": (("memory",), _memory),
    "modes": (("modes_cpu",), _modes),
    "precision": (("precision",), _precision),
    "skip-backward": (("skip_backward",), _skip_backward),
    "sampled-blocks": (("sampled_blocks",), _sampled_blocks),
    "growing-costs": (("growing_costs",), _growing_costs),
    "trained-rows": (("trained_rows",), _trained_rows),
    "attached-mask": (("attached_mask",), _attached_mask),
    "step-detail": (_STEP, _details),
}
EXTRACTS = ("facts",)  # a part of "step", left out of a page with all tables


def caption(result: dict) -> str:
    """Says where the figures come from, and what makes them doubtful."""
    facts = result["machine"]
    commit = (facts["commit"] or "unknown")[:9]
    loads = [result["load"], *(config["load"] for run in result.get("runs", ()) for config in run["configs"])]
    elsewhere = max(load["elsewhere"] or 0 for load in loads)
    doubts = {
        "a quick run, no measurement": result["quick"],
        "code changed since that commit": facts["dirty"],
        "csrc edited after it was compiled": facts["kernels_older_than_csrc"],
        f"other programs used up to {elsewhere:.1f} cores": elsewhere > BUSY,
    }
    found = ", ".join(doubt for doubt, applies in doubts.items() if applies)
    where = f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}, commit {commit}"
    return f"{where}; **{found}**" if found else where
