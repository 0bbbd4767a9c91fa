"""What importing Paddle does to signals: a command that is ended ends quietly, and handlers of the user's stay."""

from __future__ import annotations

import signal
import subprocess
import sys

QUIET = """
import os, signal
from convert.errors import require
require("paddle")
os.kill(os.getpid(), signal.SIGTERM)
signal.pause()
"""
THEIRS = """
import os, signal, sys
import paddle
signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
from convert.errors import require
require("paddle")
os.kill(os.getpid(), signal.SIGTERM)
"""


def ended(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_what_is_ended_by_kill_says_nothing_of_cpp():
    run = ended(QUIET)
    assert run.returncode == -signal.SIGTERM and "C++" not in run.stderr and "FatalError" not in run.stderr


def test_a_handler_that_was_there_first_is_left():
    run = ended(THEIRS)
    assert run.returncode == 1 and run.stderr.strip().endswith("saved")
