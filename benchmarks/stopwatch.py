"""``python stopwatch.py LOG COMMAND …``: run the command, its output into LOG, and print what it took as one JSON line.

A small process of its own, because Linux counts a child's memory from its parent's: what is started from here begins at
a few megabytes whatever the benchmark itself has loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence


def measure(log: str, command: Sequence[str]) -> dict[str, float | int]:
    """``seconds`` of wall and of processor time, ``peak_rss`` in bytes, and the exit ``code`` of ``command``."""
    sink = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    started = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ,
                            file_actions=[(os.POSIX_SPAWN_DUP2, sink, 1), (os.POSIX_SPAWN_DUP2, sink, 2)])
    _, status, usage = os.wait4(child, 0)
    return {"seconds": time.perf_counter() - started, "processor_seconds": usage.ru_utime + usage.ru_stime,
            "peak_rss": usage.ru_maxrss * 1024, "code": os.waitstatus_to_exitcode(status)}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2:])))
