"""Checks that a command of the documents can be run as it stands, without the time that it takes. Cheap commands are
run; of the others everything up to the work is.
"""

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

from pages import ROOT

from graddrop_kernels.demo import arguments
from graddrop_kernels.tools import cli


class _Parsed(BaseException):
    """The arguments were understood, and the work would follow. Not an Exception, which a script might catch."""


def check_command(command: str) -> None:
    """Raises AssertionError, or SystemExit with argparse's message, for a command that would fail at once."""
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # environment variables
        words.pop(0)
    program = Path(words[0]).name
    if program.startswith("python") and words[1] == "-m":
        check = {"graddrop_kernels": _graddrop_kernels, "graddrop_kernels.demo": arguments.parse, "pytest": _pytest}
        if words[2].partition(".")[0] == "benchmarks":
            _module(words[2], words[3:])
        else:
            check[words[2]](words[3:])
    elif program.startswith("python"):
        _script(words[1], words[2:])
    else:
        {"make": _make, "pip": _pip, "pytest": _pytest}[program](words[1:])


def _graddrop_kernels(words: list[str]) -> None:
    if words == ["info"]:
        assert cli.main(words) == 0
    else:
        _up_to_the_work(lambda: cli.main(words))


def _script(script: str, words: list[str]) -> None:
    path = ROOT / script
    assert path.exists(), f"there is no {script}"
    folders = [str(path.parent), *sys.path]
    with mock.patch.object(sys, "argv", [script, *words]), mock.patch.object(sys, "path", folders):
        _up_to_the_work(lambda: runpy.run_path(str(path), run_name="__main__"))


def _module(name: str, words: list[str]) -> None:
    with mock.patch.object(sys, "argv", [name, *words]), mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        assert importlib.util.find_spec(name), f"there is no {name}"
        _up_to_the_work(lambda: runpy.run_module(name, run_name="__main__"))


def _up_to_the_work(run) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *words):
        parse(self, *words)
        raise _Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only), suppress(_Parsed):
        run()  # to the end where nothing is parsed


def _make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    values = dict(word.split("=", 1) for word in words if "=" in word)
    for target in (word for word in words if "=" not in word):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"the Makefile has no target {target!r}"
        more = shlex.split(values.get("ARGS", ""))
        if target == "demo":
            arguments.parse(more)
        elif target == "gpu" and more:
            _module("benchmarks.gpu", more)
    for name in values:
        assert re.search(rf"^{name} \?=", makefile, re.MULTILINE), f"the Makefile does not ask for {name}"


def _pip(words: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for word in words:
        for extra in re.findall(r"\[([\w,-]+)\]$", word)[:1]:
            for name in extra.split(","):
                assert re.search(rf"^{re.escape(name)} = \[", project, re.MULTILINE), f"there is no extra {name!r}"
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).exists()


def _pytest(words: list[str]) -> None:
    for path in (word for word in words if re.fullmatch(r"[\w/.]+(::\w+)?", word)):
        assert (ROOT / path.split("::")[0]).exists(), f"there is no {path}"
