"""Killed at any moment: the output is absent or whole, and the next run removes what is left and makes the same bytes.

One process imports everything and forks each conversion, so that the moments are spread over the conversion itself. The
first is no matter of the clock: the conversion ends itself amid its writing, however fast the machine is.
"""

import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import files_under
from safetensors.torch import save_file
from test_convert_memory import shapes

from convert import gptj, writer

KILLS, INTERRUPTIONS = 16, 8
FORKING = """
import itertools, os, signal, sys, time
from contextlib import suppress
import convert.stream, convert.verify, convert.report
from convert.cli import main
from convert.gptj import FAMILY
def ending_at(written, number, pwrite=os.pwrite):
    calls = itertools.count(1)
    def write(*arguments):
        if next(calls) == written:
            os.kill(os.getpid(), number)
        return pwrite(*arguments)
    os.pwrite = write
for line in sys.stdin:
    number, delay, written, *arguments = line.split()
    child = os.fork()
    if child == 0:
        if int(written):
            ending_at(int(written), int(number))
        code = 130  # of an interruption before the conversion has begun
        with suppress(KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
            sys.stdout = open(os.devnull, "w")
            code = main(FAMILY, arguments)
        os._exit(code)
    if int(number) and not int(written):
        time.sleep(float(delay))
        os.kill(child, int(number))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture
def source(tmp_path):
    config = {**gptj.FAMILY.demo, "n_embd": 256, "n_layer": 8, "vocab_size": 4000, "n_positions": 256}
    directory = tmp_path / "source"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    save_file({name: torch.randn(shape).half() for name, shape in shapes(config).items()},
              directory / "model.safetensors")
    return directory


@pytest.fixture
def conversion(source, workdir):
    """``conversion(*flags, by=signal, after=seconds)``: its exit code, negative where a signal ended it.

    With ``written`` the signal comes with the call that writes for this time, and not after seconds.
    """
    with subprocess.Popen([sys.executable, "-c", FORKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        def run(*flags, by=0, after=0.0, written=0):
            print(int(by), after, written, "--source", source, "--output", "out/run", *flags, file=process.stdin,
                  flush=True)
            return int(process.stdout.readline())
        yield run
        process.stdin.close()


@pytest.fixture
def whole(conversion, workdir):
    """The files of a conversion that nobody disturbed, and its seconds, the least of three."""
    assert conversion() == 0

    def timed():
        started = time.perf_counter()
        assert conversion("--overwrite") == 0
        return time.perf_counter() - started
    seconds = min(timed() for _ in range(3))
    return files_under(workdir / "out"), seconds


def hidden(workdir):
    return [path.name for path in workdir.rglob(".*")]


@pytest.mark.parametrize("number,times", [
    (signal.SIGKILL, KILLS), (signal.SIGINT, INTERRUPTIONS),
    pytest.param(signal.SIGKILL, 6 * KILLS, marks=pytest.mark.full)])
def test_the_output_is_absent_or_whole_and_a_rerun_identical(number, times, conversion, whole, workdir):
    files, seconds = whole
    dice, codes, left = random.Random(4), set(), set()
    for attempt in range(times):
        if attempt % 2:
            for file in sorted((workdir / "out").rglob("*"), reverse=True):
                file.unlink() if file.is_file() else file.rmdir()
        codes.add(conversion("--overwrite", by=number, after=dice.uniform(0, 1.1 * seconds),
                             written=0 if attempt else 9))
        found = {name: held for name, held in files_under(workdir / "out").items() if not name.startswith(".")}
        assert found in ({}, files)
        left |= set(hidden(workdir))
        if number == signal.SIGINT:
            assert hidden(workdir) == []
        assert conversion("--overwrite") == 0
        assert files_under(workdir / "out") == files and hidden(workdir) == []
    if number == signal.SIGKILL:
        assert codes <= {0, -signal.SIGKILL} and -signal.SIGKILL in codes
        assert ".run.staging" in left and {re.sub("staging|lock|replaced", "", name) for name in left} == {".run."}
    else:
        assert codes <= {0, 130} and 130 in codes


@pytest.mark.parametrize("when", ["entering", "leaving"])
def test_an_interruption_amid_tidying_up_leaves_nothing(when, tmp_path, monkeypatch):
    """Sent when the staging directory is removed: on the way in, before it is made, or on the way out."""
    remove, sent = writer.shutil.rmtree, []

    def interrupted(*given, **named):
        if len(sent) == {"entering": 0, "leaving": 2}[when]:
            signal.raise_signal(signal.SIGINT)
        sent.append(given)
        remove(*given, **named)
    monkeypatch.setattr(writer.shutil, "rmtree", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    (tmp_path / "run").mkdir()
    try:
        with pytest.raises(KeyboardInterrupt), writer.Staging(tmp_path / "run") as staging:
            (staging.path / "new").touch()
            staging.publish()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["new"] * (when == "leaving")
