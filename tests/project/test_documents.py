"""README.md and docs/: examples run, commands exist, links lead somewhere, explained errors are those of the source."""

import ast
import contextlib
import importlib
import inspect
import io
import re
import subprocess
import sys
from fnmatch import fnmatchcase

import page_names
import pytest
import torch
from error_texts import INSERTED, raised_texts, string_texts
from lazy import integration
from pages import PAGES, ROOT, anchors_of, blocks_of, commands_of, links_of, text_of
from shell_commands import check_command

import graddrop_kernels

# {name: what makes it}
TAKEN_FOR_GRANTED = dict(
    inspect.getmembers(page_names, lambda each: inspect.isfunction(each) and each.__module__ == page_names.__name__)
)
every_page = pytest.mark.parametrize("page", PAGES)
KINDS = ("python", "sh", "text", "c", "")  # of blocks: the last three are read, not run


# Examples.


def make_name(name: str, names: dict) -> None:
    """Puts one of TAKEN_FOR_GRANTED, and what it needs, into the page's names, unless it is there."""
    if name in names:
        return
    needed = inspect.signature(TAKEN_FOR_GRANTED[name]).parameters
    for other in needed:
        make_name(other, names)
    names[name] = TAKEN_FOR_GRANTED[name](**{other: names[other] for other in needed})


def run_block(block, names: dict) -> str:
    """Runs an example in its page's names; those it takes for granted are made. Returns what it printed."""
    nodes = ast.walk(ast.parse(block.code))
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for name in sorted(read & TAKEN_FOR_GRANTED.keys()):
        make_name(name, names)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.code, str(block), "exec"), names)
    return printed.getvalue()


def check_elsewhere(block) -> None:
    """An example that another test stands for: that test exists, and what the example imports of ours does too."""
    path, function = block.runner
    tree = ast.parse((ROOT / path).read_text())
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in tests, f"{path} lacks {function}"
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("graddrop_kernels"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), f"{block}: {ast.unparse(node)}"


def any_backend(text: str) -> str:
    return re.sub(r"^(backend .*: )\S+$", r"\1any", text, flags=re.MULTILINE)


def check_examples(blocks, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names, printed = {}, ""
    for block in blocks:
        assert block.kind in KINDS, block
        if block.kind == "python" and block.runner:
            check_elsewhere(block)
        elif block.kind == "python":
            printed = run_block(block, names)
        elif block.kind == "text":  # what the example before it prints
            assert any_backend(block.code) == any_backend(printed), block


@every_page
def test_examples_run_and_print_what_is_shown(page, tmp_path, monkeypatch, seed):
    torch.manual_seed(seed)
    check_examples(blocks_of(page), tmp_path, monkeypatch)


BROKEN = {
    "a wrong call": "```python\nFusedGradDropAdamW(model)\n```\n",
    "a wrong name": "```python\nfrom graddrop_kernels import GradDropp\n```\n",
    "another output": "```python\nprint(1)\n```\n\n```text\n2\n```\n",
    "no such test": "<!-- runs: tests/project/test_documents.py::test_of_nothing -->\n```python\nx = 1\n```\n",
    "a wrong import beside a test": "<!-- runs: tests/project/test_documents.py::test_links_lead_somewhere -->\n"
    "```python\nfrom graddrop_kernels import GradDropp\n```\n",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_example_is_found(text, tmp_path, monkeypatch):
    with pytest.raises((NameError, ImportError, AssertionError)):
        check_examples(blocks_of("a page", text), tmp_path, monkeypatch)


def test_examples_are_there():
    """The pattern that finds blocks has not gone blind."""
    assert sum(block.kind == "python" for page in PAGES for block in blocks_of(page)) >= 15
    assert all(text_of(page).count("\n```") % 2 == 0 for page in PAGES)


# Commands.


@every_page
def test_commands_can_be_run(page):
    for command in commands_of(page):
        check_command(command)


@pytest.mark.parametrize(
    "command",
    [
        "make tea", "make demo ARGS='--tea'", "python -m benchmarks.tea", "python -m benchmarks.gpu --tea",
        "python -m graddrop_kernels tea", "python -m graddrop_kernels verify --tea", "pip install '.[tea]'", "tea",
    ],
)  # fmt: skip
def test_a_broken_command_is_found(command, capsys):
    with pytest.raises((AssertionError, KeyError, SystemExit)):
        check_command(command)


# Links.


@every_page
def test_links_lead_somewhere(page):
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors_of(str(target.resolve().relative_to(ROOT))), f"{page}: {link}"


def test_every_page_is_linked_from_the_readme():
    linked = {link.partition("#")[0] for link in links_of("README.md")}
    assert {page for page in PAGES if page != "README.md"} <= linked


def test_the_sources_include_what_csrc_says():
    rows = re.findall(r"^\| (`.+`) \|.*\| (.+) \|$", text_of("csrc/README.md"), re.MULTILINE)
    table = [(re.findall(r"`([^`]+)`", files), re.findall(r"`([^`]+)`", may)) for files, may in rows]
    sources = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".h", ".cpp", ".cu")]
    for path in sources:
        name = str(path.relative_to(ROOT / "csrc"))
        (allowed,) = [may for files, may in table if any(fnmatchcase(name, pattern) for pattern in files)]
        for header in re.findall(r'#include "(.+)"', path.read_text()):
            included = str((path.parent / header).resolve().relative_to(ROOT / "csrc"))
            assert any(fnmatchcase(included, pattern) for pattern in allowed), f"{name} includes {included}"
    assert len(sources) > 20


def test_every_benchmark_has_its_command():
    scripts = [path for path in (ROOT / "benchmarks").glob("*/*.py") if 'if __name__ == "__main__"' in path.read_text()]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for path in scripts]
    assert len(modules) > 10
    commands = [word for command in commands_of("benchmarks/README.md") for word in command.split()]
    own = [name for name in modules if not name.startswith("benchmarks.xglue")]  # which has a page of its own
    assert [name for name in own if name not in commands] == []


def test_the_gpu_runs_budget_is_what_is_said():
    (budget,) = re.findall(r"^BUDGET = (\d+)", (ROOT / "benchmarks/gpu/__main__.py").read_text(), re.MULTILINE)
    assert f"stops by itself after {budget} s" in text_of("docs/performance.md")


# The front page.


def test_the_readme_can_be_read_in_one_sitting():
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100
    first_screen = text_of("README.md").split("## Install")[0]
    assert "on a GPU nothing has been measured yet" in first_screen


def trained(optimizer, model, batches) -> None:
    for batch in batches:
        page_names.loss_of(model)(batch[0]).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_frozen_means_frozen(seed):
    """What the front page says first: neither momentum nor weight decay; that of a sharding is in distributed/."""
    torch.manual_seed(seed)
    model, batches = page_names.model(), page_names.batches()
    groups = graddrop_kernels.param_groups(model, weight_decay=0.5)
    optimizer = graddrop_kernels.FusedGradDropAdamW(groups, lr=0.1, mask=None)
    trained(optimizer, model, batches)  # so that there is momentum
    for policy in (graddrop_kernels.GradFreeze(epochs=4), graddrop_kernels.GradDrop(p=0.5)):
        for group in optimizer.param_groups:
            group |= {"mask": policy.to_json() if "blocks" in group else None, "masked": "frozen"}
        optimizer.set_epoch(1)
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        keep = {name: optimizer.mask(name) for name in before}
        trained(optimizer, model, batches[:1])
        moved = {name: param != before[name] for name, param in model.named_parameters()}
        assert not any((moved[name] & ~keep[name]).any() for name in before)
        assert all(moved[name][keep[name]].any() for name in before if keep[name].any())
        assert 0 < sum(int(mask.sum()) for mask in keep.values()) < sum(mask.numel() for mask in keep.values())


def test_masks_take_no_memory():
    held = []
    for make in (torch.optim.AdamW, graddrop_kernels.FusedGradDropAdamW):
        model = page_names.model()
        optimizer = make(model.parameters(), fused=True)
        trained(optimizer, model, page_names.batches())
        tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
        held.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    assert held[0] == held[1]


# Pictures and `make docs`.


def shown(path) -> str:
    """What a picture of docs/draw.py says that it shows."""
    return re.search(r"<dc:description>(.*?)</dc:description>", path.read_text(), re.DOTALL)[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """What `make docs` writes, in a folder of its own; a warning of pdoc would be an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "docs/make_site.py", "--site", folder, "--pictures", folder / "pictures"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder


def test_pictures_show_what_the_package_does_now(site):
    new = sorted((site / "pictures").iterdir())
    assert [path.name for path in new] == sorted(path.name for path in (ROOT / "docs/pictures").iterdir())
    for path in new:
        assert shown(path) == shown(ROOT / "docs/pictures" / path.name), f"{path.name}: run make docs"


def test_the_site_is_whole(site):
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert {page.replace(".md", ".html") for page in PAGES} <= {str(path.relative_to(site)) for path in pages}
    for page in map(site.joinpath, (page.replace(".md", ".html") for page in PAGES)):
        for link in re.findall(r'(?:href|src)="(?!\w+:)([^"]+)"', pages[page]):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or f'id="{anchor}"' in pages[target], f"{page}: {link}"


@pytest.mark.parametrize("name", graddrop_kernels.__all__)
def test_every_public_name_is_in_the_reference(site, name):
    assert f'id="{name}"' in (site / "api/graddrop_kernels.html").read_text()


# Docstrings.


def documented() -> dict[str, object]:
    """The public classes, functions and methods that are ours, by name."""
    found = {name: getattr(graddrop_kernels, name) for name in graddrop_kernels.__all__}
    methods = vars(graddrop_kernels.FusedGradDropAdamW)
    inherited = vars(torch.optim.AdamW).keys() | vars(torch.optim.Optimizer).keys()
    own = {name: each for name, each in methods.items() if name[0] != "_" and name not in inherited}
    return found | {name: each for name, each in own.items() if callable(each)}


def own_source(public) -> str:
    """Of a class what runs when one is made."""
    if inspect.isclass(public):
        public = vars(public).get("__post_init__") or public.__init__
    return inspect.getsource(inspect.unwrap(public)) if hasattr(public, "__code__") else ""


INTEGRATION = ("trainer_optimizer", "GradDropCallback")


@pytest.mark.parametrize("name", [*documented(), *INTEGRATION])
def test_docstrings_say_what_goes_in_and_what_is_raised(name):
    public = getattr(integration, name) if name in INTEGRATION else documented()[name]
    sections = re.findall(r"^ *(Args|Returns|Raises|Example):$", public.__doc__, re.MULTILINE)
    arguments = set(inspect.signature(public).parameters) - {"self"}
    assert not arguments or "Args" in sections or len(public.__doc__) < 120, "no section Args"
    assert "raise " not in own_source(public) or "Raises" in sections, "no section Raises"
    assert "Raises, " not in public.__doc__, "pdoc does not know this heading"


# docs/troubleshooting.md.


def keys() -> list[str]:
    """The message of every row of the tables; single or double backticks around it."""
    rows = re.findall(r"^\| (?:`` (.+?) ``|`([^`]+)`) \|", text_of("docs/troubleshooting.md"), re.MULTILINE)
    return [double or single for double, single in rows]


def test_every_error_that_is_explained_can_occur():
    texts, found = string_texts(), keys()
    assert len(found) > 100 and len(set(found)) == len(found)
    for key in found:
        assert len(key.replace(INSERTED, "").strip()) >= 10, f"{key!r} is too short to tell one message from another"
        assert any(key in text for text in texts), f"no message of the source has {key!r}"


def test_every_error_is_explained():
    unexplained = {where: text for where, text in raised_texts() if not any(key in text for key in keys())}
    assert not unexplained, "docs/troubleshooting.md has no row for these"
