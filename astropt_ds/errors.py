"""How a user's mistake ends: one clear line and exit code 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class UserError(Exception):
    """A mistake that the user can mend. The message names the file, key or value, and what fits."""


def run_cli(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command line's ``main``; a :class:`UserError` becomes one line on stderr and exit 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # the ranks of a run fail alike; one of them speaks
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("\ninterrupted; the same command goes on from what is saved", file=sys.stderr)
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)  # at once: the other processes of a run do not answer any more
    sys.exit(0)
