"""Libraries that only some commands need, and that need not be installed."""

from __future__ import annotations

import importlib
from types import ModuleType

from astropt_ds.errors import UserError


def optional(module: str, what: str) -> ModuleType:
    """A module of a library that is in the extra ``surveys``.

    Args:
        module: its full name.
        what: needs it, for the message.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        library = module.partition(".")[0]
        raise UserError(
            f"{what} needs {library}: pip install 'astropt-ds[surveys]' would be right"
        ) from None
