"""Files of a data set from elsewhere: any file system that fsspec knows, or a shell command.

``https://host/shards`` and ``s3://bucket/shards`` name the folder; ``pipe:COMMAND`` is a command
that writes a file to its standard output, ``{}`` in it standing for the file's name, as in
``pipe:ssh archive cat /shards/{}``.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from astropt_ds.errors import UserError

PIPE = "pipe:"
CONNECT_TIMEOUT, STALL_TIMEOUT = 30, 60  # seconds without an answer, or without a byte

Result = TypeVar("Result")


class Transfer(Protocol):
    """One way to get files; ``str`` of it is what the user calls the place."""

    def full(self, name: str) -> str:
        """A file's full name, for messages."""

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to a local path; raises whatever went wrong."""


def open_transfer(url: str) -> Transfer:
    """The way to get files from a URL or a ``pipe:`` command.

    Raises:
        UserError: an unknown protocol, one that needs a package that is not installed, or a
            command without ``{}``.
    """
    return _Pipe(url) if url.startswith(PIPE) else _FileSystem(url)


class _FileSystem:
    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._connect()

    def _connect(self) -> None:
        import fsspec

        self._process, url = os.getpid(), self.url
        try:
            self.system, self.root = fsspec.core.url_to_fs(url, **_options(url))
        except (ImportError, ValueError) as error:
            raise UserError(
                f"data.path={url}: {' '.join(str(error).split())}; "
                "pip install 'astropt-ds[remote]' brings https:// and s3://"
            ) from None

    def __str__(self) -> str:
        return self.url

    def full(self, name: str) -> str:
        return f"{self.url}/{name}"

    def fetch(self, name: str, path: Path) -> None:
        if self._process != os.getpid():
            self._connect()  # a fork has none of the threads that serve the connections
        self.system.get_file(f"{self.root}/{name}", str(path))


def _options(url: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    # aiohttp's own limit is five minutes a file, however well it flows
    patience = aiohttp.ClientTimeout(
        total=None, sock_connect=CONNECT_TIMEOUT, sock_read=STALL_TIMEOUT
    )
    return {"client_kwargs": {"timeout": patience}}


class _Pipe:
    def __init__(self, url: str) -> None:
        self.command = url.removeprefix(PIPE)
        if "{}" not in self.command:
            raise UserError(
                f"data.path={url}: the command has no {{}} for the file's name; "
                "pipe:cat /archive/{} would be right"
            )

    def __str__(self) -> str:
        return PIPE + self.command

    def full(self, name: str) -> str:
        return PIPE + self.command.replace("{}", shlex.quote(name))

    def fetch(self, name: str, path: Path) -> None:
        command = self.command.replace("{}", shlex.quote(name))
        with path.open("wb") as output, tempfile.TemporaryFile() as errors:
            # through a pipe: the command ends with the process that reads from it
            process = subprocess.Popen(
                command,
                shell=True,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # a group of its own: it ends with all that it started
            )
            try:
                assert process.stdout is not None
                _copy(process.stdout.fileno(), output)
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
            finally:
                process.communicate()
            if process.returncode:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip().splitlines()
                raise OSError(f"exit code {process.returncode}: {(said or ['no message'])[-1]}")


def _copy(descriptor: int, output: IO[bytes]) -> None:
    while True:
        ready, _, _ = select.select([descriptor], [], [], STALL_TIMEOUT)
        if not ready:
            raise OSError(f"no byte for {STALL_TIMEOUT} s")
        data = os.read(descriptor, 1 << 20)
        if not data:
            return
        output.write(data)


def with_retries(action: Callable[[], Result], retries: int, what: str) -> Result:
    """Do something that may fail for a while, after 1, 2, 4, ... seconds again.

    Args:
        action: a transfer.
        retries: how often again.
        what: is transferred, for the message.

    Raises:
        UserError: it failed each time, or is a user's mistake.
    """
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(2 ** (attempt - 1))
        try:
            return action()
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{what}: is not there") from None
        except Exception as error:  # each transport has its own kinds
            problem = " ".join(str(error).split()) or repr(error)
    raise UserError(f"{what}: cannot be fetched, tried {retries + 1} times ({problem})")
