"""`make docs`: the pictures of docs/ drawn anew, then the reference of all public names (pdoc) and the pages, as HTML.

Writes SITE/api/ and a page beside every Markdown file. A warning of pdoc is an error. Needs pdoc and matplotlib.
"""

import argparse
import importlib
import pkgutil
import re
import shutil
import warnings
from pathlib import Path

import draw
import pdoc
import torch.distributed.optim  # noqa: F401 (an annotation names its class)
from pdoc.render_helpers import to_html

from graddrop_kernels import integrations

ROOT = Path(__file__).resolve().parents[1]
_PATHS = [*ROOT.glob("[!.]*/README.md"), *ROOT.glob("docs/*.md")]
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in _PATHS))
STYLE = (
    "body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em } img { max-width: 100% }"
    "pre, code { background: #f3f3f3 } pre { padding: .7em; overflow: auto } table { border-collapse: collapse }"
    "td, th { border: 1px solid #ccc; padding: .2em .6em; vertical-align: top }"
)


def modules() -> list[str]:
    """Lists the modules of the reference: the public names, and the integrations whose packages are installed."""
    found = ["graddrop_kernels"]
    for module in pkgutil.iter_modules(integrations.__path__, f"{integrations.__name__}."):
        if module.name.endswith((".engines", ".optimizer_of")):  # shared by the integrations
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            print(f"left out: {module.name}, which needs {error.name}")
            continue
        found.append(module.name)
    return found


def make_reference(folder: Path) -> None:
    names = modules()
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc(*names, output_directory=folder)


def make_page(page: str, site: Path) -> None:
    """Converts one Markdown file to HTML, and copies what it links to and shows."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL)
    text = re.sub(r"(?<=\]\()(?!\w+:)([^)#\s]+)", lambda match: _target(match[1], page, site), text)
    up = "../" * page.count("/")
    top = f'<p><a href="{up}README.html">graddrop_kernels</a> · <a href="{up}api/index.html">reference</a></p>'
    title = re.search(r"^# (.+)", text, re.MULTILINE)[1]
    path = site / page.replace(".md", ".html")
    path.parent.mkdir(parents=True, exist_ok=True)
    body = re.sub(r"<h(\d)[^>]*>(.*?)</h\1>", _heading, to_html(text), flags=re.DOTALL)
    head = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    path.write_text(f"{head}\n{top}\n{body}", encoding="utf-8")


def _target(link: str, page: str, site: Path) -> str:
    """Returns a link's target in the site: our pages are HTML there, other files are copied."""
    source = (ROOT / page).parent.joinpath(link).resolve()
    name = source.relative_to(ROOT)
    if str(name) in PAGES:
        return link.removesuffix(".md") + ".html"
    target = site / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return link


def _heading(match: re.Match) -> str:
    """Gives the heading the anchor that GitHub gives it."""
    words = re.sub(r"<[^>]+>", "", match[2]).strip().lower()
    anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
    return f'<h{match[1]} id="{anchor}">{match[2]}</h{match[1]}>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--site", type=Path, default=ROOT / "site", help="folder to write to")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures", help="where pictures are drawn")
    options = parser.parse_args()
    draw.draw_all(options.pictures)
    make_reference(options.site / "api")
    for page in PAGES:
        make_page(page, options.site)
    print(options.site / "README.html")


if __name__ == "__main__":
    main()
