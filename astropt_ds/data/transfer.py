"""Files of a data set from elsewhere: any file system that fsspec knows, or a shell command.

``https://host/shards`` and ``s3://bucket/shards`` name the folder; ``pipe:COMMAND`` is a command
that writes a file to its standard output, ``{}`` in it standing for the file's name, as in
``pipe:ssh archive cat /shards/{}``.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from astropt_ds.errors import UserError

PIPE = "pipe:"
CONNECT_TIMEOUT, STALL_TIMEOUT = 30, 60  # seconds without an answer, or without a byte


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
    return _Pipe(url) if url.startswith(PIPE) else _Remote(url)


class _Remote:
    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.system, self.root = fsspec.core.url_to_fs(self.url, **_options(url))
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
        with path.open("wb") as output:
            process = subprocess.Popen(
                command,
                shell=True,
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # a group of its own: it ends with all that it started
            )
            try:
                _wait_while_growing(process, path)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                _, errors = process.communicate()
        if process.returncode:
            last = (errors.strip().splitlines() or ["no message"])[-1]
            raise OSError(f"exit code {process.returncode}: {last}")


def _wait_while_growing(process: subprocess.Popen, path: Path) -> None:
    size, since = 0, time.monotonic()
    while True:
        try:
            process.wait(timeout=0.1)
            return
        except subprocess.TimeoutExpired:
            now = path.stat().st_size
            if now > size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > STALL_TIMEOUT:
                raise OSError(f"no byte for {STALL_TIMEOUT} s") from None
