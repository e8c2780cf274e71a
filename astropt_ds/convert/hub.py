"""Model folders on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from astropt_ds.errors import UserError
from astropt_ds.model_folder.config_json import CONFIG
from astropt_ds.model_folder.weights import INDEX

HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
FILES = [CONFIG, "*.safetensors", INDEX]


def download(hub_id: str) -> Path:
    """The local copy of a model folder on the hub; without a network, what its cache holds.

    Args:
        hub_id: ``organisation/name``, or ``organisation/name@revision``.

    Raises:
        UserError: there is none, or huggingface_hub is not installed.
    """
    match = HUB_ID.fullmatch(hub_id)
    assert match
    neither = f"{hub_id}: no such path here, and as an id of the Hugging Face hub"
    try:
        from huggingface_hub import snapshot_download  # an optional extra
    except ImportError:
        raise UserError(
            f"{neither} it needs the huggingface_hub package (pip install 'astropt-ds[hub]')"
        ) from None
    try:
        folder = Path(
            snapshot_download(match["repository"], revision=match["revision"], allow_patterns=FILES)
        )
    except Exception as error:  # of its own, or of whichever library it speaks to the network by
        raise UserError(f"{neither} not to be had: {' '.join(str(error).split())}") from None
    if not (folder / CONFIG).is_file():
        raise UserError(f"{hub_id}: has no {CONFIG}, so it is no model folder")
    return folder
