"""How a command ends: a user's mistake is one clear line and exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
EXIT_PIPE = 141  # 128 + SIGPIPE
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class UserError(Exception):
    """A mistake that the user can mend. The message names the file, key or value, and what fits."""


class RunAgain(Exception):
    """The command has saved what it did and ended early; given again, it goes on from there."""


def run_cli(
    main: Callable[[list[str]], None], resumes: bool = True, alike: bool = True
) -> NoReturn:
    """Run a command line's ``main``.

    A :class:`UserError` becomes one line on stderr and exit code 2, :class:`RunAgain` 75.

    Args:
        main: takes the arguments.
        resumes: whether the command, interrupted and given again, goes on where it was.
        alike: whether the ranks of a run fail alike, so that the first speaks for all.
    """
    code = 0
    try:
        main(sys.argv[1:])
    except UserError as error:
        code = EXIT_USER_ERROR
        say(f"error: {error}", alike)
    except RunAgain as error:
        code = EXIT_RUN_AGAIN
        say(str(error), alike)
    except BrokenPipeError:
        code = EXIT_PIPE  # whoever read has had enough
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
        left = "the same command goes on from what is saved" if resumes else "nothing is left of it"
        say(f"\ninterrupted; {left}", alike)
    # By now all is closed and flushed that main opened. The interpreter's own teardown is left out:
    # in it, C++ threads of a process group now and then abort a run that is complete (SIGABRT).
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def say(text: str, once: bool = True) -> None:
    """Print a line on stderr, on the first rank of a run or on all of them."""
    if not once or os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            print(text, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """What a library says is wrong, short enough for a message."""
    return " ".join(str(error).split())[:120] or type(error).__name__
