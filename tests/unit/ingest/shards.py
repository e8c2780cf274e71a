"""What shards hold, as any tar reader sees it."""

import json
import tarfile
from pathlib import Path
from urllib.parse import unquote

from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards


def members(folder: Path) -> dict[str, dict[str, dict[str, bytes]]]:
    """{split: {key: {suffix: bytes}}}."""
    found: dict = {}
    for path in sorted(folder.glob("*.tar")):
        split = found.setdefault(path.name.rpartition("-")[0], {})
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                split.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return found


def samples(folder: Path) -> dict[str, dict]:
    """{id: {split, labels, suffix, image}}."""
    found = {}
    for split, keys in members(folder).items():
        for key, parts in keys.items():
            labels = json.loads(parts.pop("json"))
            ((suffix, image),) = parts.items()
            assert labels["id"] == unquote(key)
            sample = {"split": split, "labels": labels, "suffix": suffix, "image": image}
            found[labels["id"]] = sample
    return found


def made(output: Path, **options) -> dict[str, dict]:
    """The samples of a job."""
    make_shards(Job(output=output, **options))
    return samples(output)
