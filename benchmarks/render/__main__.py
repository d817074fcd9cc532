"""Results -> Markdown tables between markers, so that no figure is typed by hand.

<!-- benchmark: step -->                             the table of every machine that has results
<!-- benchmark: step amd-epyc-f25-m17-2-cores -->    of one machine
<!-- /benchmark -->

Without names of files: README.md, benchmarks/README.md, docs/*.md and results/*.md, and results/<machine>/tables.md,
which is made anew with every table that the machine has results for. `--check` writes nothing and exits with 1 when a
file is not up to date. `--archive run.tar.gz` makes the files, the figures and the tables of a run on a GPU.
"""

import argparse
import re
import sys
import tarfile
from pathlib import Path

from ..common.machine import ROOT
from ..common.results import RESULTS, gpu_folder, load, write_assembled
from ..common.rows import ROWS, assembled
from . import beyond_tables, cpu_tables, gpu_tables, static_tables, xglue_tables

TABLES = {**cpu_tables.TABLES, **gpu_tables.TABLES}
STATIC = {**static_tables.TABLES, **beyond_tables.TABLES, xglue_tables.NAME: xglue_tables.section}
OPEN, CLOSE = r"<!-- benchmark: (\S+)(?: (\S+))? -->\n", r"<!-- /benchmark -->"


def section(name: str, machine: str | None, found: dict) -> str:
    """Returns the text between the markers. Raises SystemExit for an unknown table or machine."""
    if name not in TABLES:
        raise SystemExit(f"unknown table {name!r}; known are {', '.join((*TABLES, *STATIC))}")
    if machine is not None and machine not in found:
        raise SystemExit(f"no results of machine {machine!r}; there are {', '.join(found) or 'none'}")
    benchmarks, table = TABLES[name]
    caption = gpu_tables.caption if name in gpu_tables.TABLES else cpu_tables.caption
    parts = []
    for results in [found[machine]] if machine else found.values():
        used = {benchmark: results[benchmark] for benchmark in benchmarks if benchmark in results}
        if used:
            captions = "; ".join(dict.fromkeys(map(caption, used.values())))
            parts.append(f"*{captions}*\n\n{table(used)}\n")
    return "\n" + ("\n".join(parts) or "*No results yet.*\n") + "\n"


def render(text: str, found: dict) -> str:
    """Makes every marked section of the text anew. Raises SystemExit for a marker without its end."""
    if len(re.findall(OPEN, text)) != len(re.findall(CLOSE, text)):
        raise SystemExit("every <!-- benchmark: ... --> needs its <!-- /benchmark -->")
    marked = re.compile(f"({OPEN}).*?({CLOSE})", re.DOTALL)

    def made(match: re.Match) -> str:
        return STATIC[match[2]](RESULTS) if match[2] in STATIC else section(match[2], match[3], found)

    return marked.sub(lambda match: match[1] + made(match) + match[4], text)


def page(machine: str, results: dict) -> str:
    """Makes the page of one machine, to be rendered: every table that it has results for."""
    tables = {name: needs for name, (needs, _) in TABLES.items() if name not in cpu_tables.EXTRACTS}
    names = [name for name, needs in tables.items() if not results.keys().isdisjoint(needs)]
    parts = [f"## {name}\n\n<!-- benchmark: {name} {machine} -->\n<!-- /benchmark -->\n" for name in names]
    return f"# Results on {machine}\n\n" + "\n".join(parts)


def unpack(archive: Path, results: Path, rehearsal: bool) -> str:
    """Writes the files of a run on a GPU into ``results`` and draws their figures. Returns the machine's name."""
    from . import figures  # needs matplotlib

    with tarfile.open(archive) as packed:
        lines = packed.extractfile(ROWS).read().decode(errors="replace").splitlines()
    first = next(iter(assembled(lines).values()), {})
    if "machine" not in first:
        raise SystemExit(f"{archive} does not say of which machine it is: nothing was measured")
    if first["rehearsal"] and not (rehearsal and results != RESULTS):
        raise SystemExit(f"{archive} is of a rehearsal, not of a GPU; to look at it: --rehearsal --results FOLDER")
    folder = gpu_folder(first["machine"], results)
    written = write_assembled(lines, folder)
    for path in (*written, *figures.draw(load(results, rehearsal)[folder.name], folder)):
        print(path)
    return folder.name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with one folder a machine")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--machine", help="its results/<machine>/tables.md only")
    parser.add_argument("--rehearsal", action="store_true", help="take rehearsals too; the tables say so")
    parser.add_argument("--archive", type=Path, help="of `benchmarks.gpu`: its files and figures first, then its page")
    options = parser.parse_args(arguments)
    if options.archive:
        options.machine = unpack(options.archive, options.results, options.rehearsal)
    found = load(options.results, options.rehearsal)
    if options.machine not in (None, *found):
        raise SystemExit(f"no results of machine {options.machine!r}; there are {', '.join(found) or 'none'}")
    files = options.files
    if not files and not options.machine:
        folders = {"": "README.md", "benchmarks": "README.md", "docs": "*.md", "benchmarks/results": "*.md"}
        files = [path for folder, name in folders.items() for path in sorted((ROOT / folder).glob(name))]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    for machine in [options.machine] if options.machine else () if options.files else found:
        texts[options.results / machine / "tables.md"] = page(machine, found[machine])
    stale = 0
    for path, text in texts.items():
        rendered = render(text, found)
        if not path.exists() or rendered != path.read_text(encoding="utf-8"):
            stale += 1
            print(f"{path}: {'not up to date; run python -m benchmarks.render' if options.check else 'updated'}")
            if not options.check:
                path.write_text(rendered, encoding="utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
