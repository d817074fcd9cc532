"""Runs the commands of `python -m benchmarks.xglue`, from the root of the checkout. arguments.py lists them."""

import contextlib
import json
import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0, or 1 after a line on stderr that says what is missing or cannot be used."""
    from .arguments import parse

    options = parse(argv)
    try:
        return _COMMANDS[options.command](options)
    except ModuleNotFoundError as error:
        print(f"error: needs {error.name}: pip install 'graddrop_kernels[xglue]'", file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
    return 1


def _run(options) -> int:
    import torch

    from .arguments import seeds_of, settings_of
    from .runs.lock import claim
    from .runs.prepare import check
    from .runs.run import check_devices, run_one

    runs = [settings_of(options, method=options.method, seed=seed) for seed in seeds_of(options.seeds)]
    for settings in runs:
        check_devices(settings, options.device)
    check(runs[0], options.data)
    if options.threads:
        torch.set_num_threads(options.threads)
    first = _rank() == 0
    for settings in runs:
        path = options.results / settings.file
        with claim(path.with_suffix(".lock")) if first else contextlib.nullcontext(True) as mine:
            if not mine:
                raise ValueError(f"another process is at work on {path}")
            result = run_one(settings, options.results, progress=True, **_run_options(options))
        if first:
            scores = result["test"][str(result["best_epoch"])]
            shown = " ".join(f"{language} {100 * score['official']:.1f}" for language, score in scores.items())
            print(f"{settings.method} seed {settings.seed}, epoch {result['best_epoch']}, test: {shown}\n{path}")
    return 0


def _sweep(options) -> int:
    from .arguments import methods_of, seeds_of, settings_of
    from .runs.sweep import Plan

    methods = methods_of(options.methods)
    base = settings_of(options, method=methods[0], seed=0)
    lrs = tuple(dict.fromkeys(options.lrs or [base.lr]))
    return _do(Plan(base, methods, seeds_of(options.seeds), lrs, seeds_of(options.tuning_seeds)), options)


def _do(plan, options) -> int:
    from .runs.methods import policy_of
    from .runs.prepare import check
    from .runs.sweep import sweep

    if options.workers < 1:
        raise ValueError(f"--workers {options.workers}: must be 1 or more")
    for settings in plan.possible():
        policy_of(settings)
    check(plan.base, options.data)
    missing = sweep(plan, options.results, _run_options(options), workers=options.workers, threads=options.threads)
    if missing:
        print(f"{missing} runs are missing; the same command tries them again", file=sys.stderr)
    return 1 if missing else 0


def _study(options) -> int:
    from .report.compare import compare
    from .report.tables import report
    from .runs.study import plans

    found = plans(options.file)
    code = max([_do(plan, options) for plan in found])
    output = options.output or options.results / "report"
    report(options.results, output)
    print(output / "report.md", *compare(options.results), sep="\n")
    return code


def _compare(options) -> int:
    from .report.compare import COMMITTED, compare

    print(*compare(options.results, options.other or COMMITTED), sep="\n")
    return 0


def _report(options) -> int:
    from .report.tables import report

    report(options.results, options.output)
    print(options.output / "report.md")
    return 0


def _pack(options) -> int:
    from .runs.results import TABLE, pack

    table = options.table or options.results.with_name(options.results.name + TABLE)
    print(f"{pack(options.results, table)} runs in {table}")
    return 0


def _unpack(options) -> int:
    from .runs.results import unpack

    print(f"{unpack(options.table, options.results)} runs in {options.results}")
    return 0


def _score(options) -> int:
    from .scores.score import score_folder

    scores = score_folder(options.predictions, options.tasks, options.split, options.data, options.languages)
    print(json.dumps(scores, indent=1))
    return 0


def _run_options(options) -> dict:
    return {
        "root": options.data, "checkpoints": not options.no_checkpoints, "eval_batch_size": options.eval_batch_size,
        "device": options.device, "deterministic": options.deterministic,
        "predictions": options.predictions,
    }  # fmt: skip


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


_COMMANDS = {
    "run": _run, "sweep": _sweep, "study": _study, "report": _report, "compare": _compare, "pack": _pack,
    "unpack": _unpack, "score": _score,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
