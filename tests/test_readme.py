"""What the README's commands leave in a checkout, and what every command says of itself."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from conftest import call

from align.page import stage_names

PROJECT = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "examples/my_gpt.py", "examples/eight_heads.py")
COMMANDS = ("convert", "convert.gptj", "convert.back", "convert.draft", "align", "align.diagnose",
            *(f"align.{stage}" for stage in stage_names()))


def left_behind():
    """Every relative path that an ``--output`` of the texts makes, and every file that they have the reader write."""
    told = "\n".join((PROJECT / name).read_text("utf-8") for name in TEXTS)
    made = set(re.findall(r"--output ([\w./-]+)", told)) - {"DIR", "FILE"}
    written = set(re.findall(r"(?<![\w/])my\w*\.(?:py|pt)\b", told)) - {"my_gpt.py", "my_gpt_net.py"}
    return sorted({*made, *written, "out/demo-gptj", "reports/my/index.html", "reports/selftest/selftest.md"})


def test_there_is_something_to_ignore():
    assert {"from-openai", "back/gpt-j-6b", "my.pt", "my_family.py", "my_net.py", "out/my"} <= set(left_behind())


@pytest.mark.parametrize("path", left_behind())
def test_git_ignores_what_the_readmes_commands_leave(path):
    if subprocess.run(["git", "rev-parse"], cwd=PROJECT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout")
    name = path if Path(path).suffix else f"{path}/model.safetensors"
    asked = subprocess.run(["git", "check-ignore", "--no-index", "-q", name], cwd=PROJECT, check=False)
    assert asked.returncode == 0, f"{path} would be listed as untracked"


def test_git_ignores_nothing_that_is_tracked():
    listed = subprocess.run(["git", "ls-files", "-ci", "--exclude-standard"], cwd=PROJECT, capture_output=True,
                            text=True, check=False)
    assert listed.stdout == ""


def shown(command):
    """What ``--help`` says: (description, flags), and the command lines in the description, each without its name."""
    done = subprocess.run([sys.executable, "-m", command, "--help"], cwd=PROJECT, capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "80"}, check=True)
    description, _, flags = done.stdout.partition("\noptions:\n")
    return description, flags, re.findall(rf"^  python -m {re.escape(command)}\b(?!\.) ?(.*)$", description, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_itself_in_use_and_says_something_of_every_flag(command, monkeypatch):
    _, flags, lines = shown(command)
    told = re.findall(r"^  (?:-h, )?(--[a-z-]+)[^\n]*?((?:\n {10,}[^\n]+)*|  [^\n]+(?:\n {10,}[^\n]+)*)$", flags, re.M)
    assert len(told) == len(re.findall(r"^  (?:-h, )?--", flags, re.M)) > 3
    for flag, sentence in told:
        assert flag == "--help" or len(sentence.split()) >= 5, (flag, sentence)
    assert lines
    module = importlib.import_module(command if "." in command else f"{command}.__main__")
    for place in ("convert.errors", "convert.cli", module.__name__):
        monkeypatch.setattr(f"{place}.guarded", lambda command: 0, raising=False)
    for line in lines:
        assert call(main_of(module), shlex.split(line))[0] == 0, line


def main_of(module):
    """The command line of a module, as a function of its arguments."""
    if hasattr(module, "STAGE"):
        return partial(module.main, module.STAGE)
    if hasattr(module, "FAMILY"):
        return partial(importlib.import_module("convert.cli").main, module.FAMILY)
    return getattr(module, "run_all", None) or module.main
