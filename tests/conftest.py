"""Tiny checkpoints with every weight random, and conversions carried out in a directory of their own."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")  # an example that takes 200 ms is no failure where others compute too

TINY = {
    "gptj": dict(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_inner=24,
                 bos_token_id=1, eos_token_id=2),
    "bert": dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                 max_position_embeddings=20),
}


DRAWN = ("test_align_page", "test_align_reports")
"""Where the page's charts are looked at; matplotlib takes longer to draw them than a stage takes with a tiny net."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A net that is built without a seed of its own is the same whatever was tested before in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    if "paddle" in sys.modules:
        sys.modules["paddle"].seed(0)


FIRST = ("test_new_family", "test_convert_memory", "test_convert_kill", "test_align_real", "test_align_all")
"""Files of few tests that take long: what is left for one process at the end should be short."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)


def pytest_collection_finish() -> None:
    """The frameworks are millions of objects that stay: the garbage collector need not go through them again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def code_of_checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """Where transformers copies it to and executes it: no other process that tests writes the same files meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        directory = str(tmp_path_factory.mktemp("modules"))
        patch.setenv("HF_MODULES_CACHE", directory)
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", directory)
        yield


@pytest.fixture(scope="module", autouse=True)
def charts(request: pytest.FixtureRequest):
    """An empty drawing in place of each chart of a report, but in the modules of ``DRAWN``."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in DRAWN:
            patch.setattr("align.page._svg", lambda tensors, downwards: "<svg></svg>")
        yield


def fast(cases: Iterable[Any], *names: Any) -> list[Any]:
    """``cases`` to parametrize with: those of ``names``, and all others for ``make test-full``."""
    held = list(cases)
    assert set(names) <= set(held)
    return [case if case in names else pytest.param(case, marks=pytest.mark.full) for case in held]


@dataclass(frozen=True)
class Run:
    """What a command line said and left behind."""

    code: int
    stdout: str
    stderr: str
    output: Path
    reports: Path

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.reports / self.output.name / "convert.json").read_text("utf-8"))

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.output / "config.json").read_text("utf-8"))

    @property
    def weights(self) -> bytes:
        return (self.output / "model.safetensors").read_bytes()


def call(main: Any, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a ``main``, argparse's way out included."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(*arguments)
        except SystemExit as stopped:
            code = stopped.code
    return code, out.getvalue(), err.getvalue()


def _says_bert(config: str) -> bool:
    return os.path.isfile(config) and '"model_type": "bert"' in Path(config).read_text("latin-1")


def files_under(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, which relative outputs and reports fall into."""
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def torch_model():
    """``torch_model(head, **config)``: a tiny model of transformers, every parameter random."""
    def make(head: str, **overrides: Any) -> Any:
        torch.manual_seed(0)
        cls = getattr(transformers, head)
        model = cls(cls.config_class(**{**TINY[cls.config_class.model_type], **overrides})).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        return model
    return make


@pytest.fixture
def checkpoint(tmp_path: Path, torch_model):
    """``checkpoint(head, **config)``: the directory that ``save_pretrained`` makes of it."""
    def make(head: str = "GPTJForCausalLM", **overrides: Any) -> Path:
        directory = tmp_path / f"source{len(list(tmp_path.glob('source*')))}"
        torch_model(head, **overrides).save_pretrained(directory)
        return directory
    return make


@pytest.fixture
def convert(workdir: Path):
    """``convert(source, *flags)``: a conversion into ``out/run`` of the current directory."""
    def run(source: Path | str | None, *flags: str, family: str | None = None, output: str | None = "out/run") -> Run:
        family = family or ("bert" if _says_bert(f"{source}/config.json") else "gptj")
        arguments = ["--source", str(source)] * (source is not None) + ["--output", str(output)] * (output is not None)
        program, main = importlib.import_module(f"convert.{family}"), importlib.import_module("convert.cli").main
        result = call(main, program.FAMILY, [*arguments, *flags])
        return Run(*result, workdir / (output or ""), workdir / "reports")
    return run


@pytest.fixture
def refused(convert, workdir: Path):
    """``refused(source, *flags, says=...)``: one sentence, exit code 2, and every file as it was."""
    def check(source: Path | str | None, *flags: str, says: str | tuple[str, ...], **options: Any) -> str:
        before = files_under(workdir)
        run = convert(source, *flags, **options)
        assert run.code == 2, run.stderr
        assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
        for words in (says,) if isinstance(says, str) else says:
            assert words in run.stderr
        assert files_under(workdir) == before
        assert not [path for path in workdir.rglob("*") if path.name.startswith(".")]
        return run.stderr
    return check
