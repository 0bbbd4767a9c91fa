"""What a user is told when something cannot go on, and the exit code that goes with it.

0 aligned · 1 diverged · 2 bad input, plan or usage · 3 a framework is missing · 4 a fault of ours.
"""

from __future__ import annotations

import errno
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

ALIGNED, DIVERGED, BAD_INPUT, FRAMEWORK_MISSING, OUR_FAULT, INTERRUPTED = 0, 1, 2, 3, 4, 130

THE_DISKS_FAULT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}

FRAMEWORKS = {
    "torch": "pip install torch",
    "transformers": "pip install transformers",
    "paddle": "pip install paddlepaddle",
    "paddlenlp": 'pip install "paddle-parity[paddlenlp]"',
    "PIL": "pip install pillow",
    "sentencepiece": "pip install sentencepiece",
}
MARKER = "paddle_parity.json"
"""What a conversion leaves about itself beside its result."""


class BadInput(Exception):
    """What the user gave cannot be used. The message says what is wrong, where, and what to do."""


class FrameworkMissing(Exception):
    """A framework that this command needs is not installed."""


def require(framework: str) -> None:
    """Import ``framework`` or raise :class:`FrameworkMissing` with the command that installs it."""
    imported_already = framework in sys.modules
    try:
        module = __import__(framework)
    except ImportError as error:
        raise FrameworkMissing(
            f"{framework} cannot be imported ({error}). Install it: {FRAMEWORKS[framework]}"
        ) from error
    if framework == "paddle" and not imported_already:  # else handlers of the user's would be taken away
        module.disable_signal_handler()  # where a command is ended by kill it prints a C++ traceback


def remedy(path: Path) -> str:
    """What helps against a damaged ``path``, a file of a checkpoint or its directory."""
    directory = path if path.is_dir() else path.parent
    return ("Convert it again, or get it again from where it came." if (directory / MARKER).is_file() else
            "Download it again.")


def guarded(command: Callable[[], int]) -> int:
    """Run ``command`` and turn whatever it raises into one sentence on stderr and an exit code."""
    try:
        return command()
    except BadInput as error:
        return _say(error, BAD_INPUT)
    except FrameworkMissing as error:
        return _say(error, FRAMEWORK_MISSING)
    except BrokenPipeError:
        sys.stderr.close()
        return BAD_INPUT
    except SystemExit as error:  # of a family, a net or a set-up of the user's: its code is no verdict
        if isinstance(error.__context__, BrokenPipeError):  # as rich ends where nobody reads on
            sys.stderr.close()
            return BAD_INPUT
        return _say(f"code that was run for this ended the program (exit {error.code}), as a script does that calls "
                    'its main. Put that under if __name__ == "__main__":', BAD_INPUT)
    except KeyboardInterrupt:
        return _say("interrupted. What was not finished was not written.", INTERRUPTED)
    except Exception as error:  # a crash must never look like a verdict
        if isinstance(error, OSError) and error.errno in THE_DISKS_FAULT:
            return _say(f"{error.strerror}: {str(error.filename)[:200]}", BAD_INPUT)
        return _say(f"{_one_line(error)} This is a fault of paddle-parity; traceback in {_log()}", OUR_FAULT)


def _say(message: object, code: int) -> int:
    print(f"error: {_in_one_line(str(message))}", file=sys.stderr)
    return code


def _in_one_line(message: str) -> str:
    """Names come from files: control characters in them are shown, not obeyed."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)


def _one_line(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}."


def _log() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="paddle-parity-", suffix=".log", delete=False) as log:
        traceback.print_exc(file=log)
    return log.name
