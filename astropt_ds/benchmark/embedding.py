"""Embedding, measured: from images to a table, beside AstroPT's own way and beside the machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from astropt_ds.benchmark.data import Stamps
from astropt_ds.benchmark.measure import Work, in_turns, ratio
from astropt_ds.benchmark.reference import reference_dataset, reference_model
from astropt_ds.benchmark.work import products
from astropt_ds.config_source import load_config
from astropt_ds.convert.load import save_model
from astropt_ds.data.centre import decode_centre
from astropt_ds.data.decode import decode
from astropt_ds.embedding.job import EmbedJob
from astropt_ds.embedding.prepare import make_embedder, open_reader, prepare
from astropt_ds.embedding.run import embed
from astropt_ds.errors import UserError
from astropt_ds.flops import embedding_flops
from astropt_ds.ingest.job import Job
from astropt_ds.ingest.make import make_shards
from astropt_ds.model import AstroPT
from astropt_ds.table.read import read_embeddings

TOKENS = 64
BATCH = 16  # of AstroPT's loader
SMALL, LARGE = "1m", {"21m": 24, "89m": 8}  # presets; images of the large at all their tokens
WHOLE, CENTRE = "decode", "decode of the centre"
OURS, ALL = f"1m, {TOKENS} tokens", "1m, all tokens"
REFERENCE = "astropt 2.0.9, 1m, all tokens"
REFERENCE_PREFIX = f"astropt 2.0.9, 1m, cut to {TOKENS} tokens"
AGREE = 5e-3  # AstroPT rounds its tokens to fp16


def measure_embedding(stamps: Stamps, rounds: int, against: bool, scratch: Path) -> dict[str, Any]:
    """CPU milliseconds an image from tar to table, and the ratios that are claimed.

    All embeddings are means of the output of block layers // 2, which is AstroPT 2.0.9's own.

    Args:
        stamps: 512-pixel images; they are read from the page cache.
        rounds: in which all take turns.
        against: measure AstroPT's own way, too.
        scratch: an empty folder.
    """
    torch.set_num_threads(1)
    images = scratch / "images"
    files = stamps.copy_to(images)
    shards = Job(images=images, output=scratch / "shards", val_fraction=0, test_fraction=0)
    make_shards(shards, say=_quiet)
    models = {name: _model(name) for name in (SMALL, *LARGE)}
    for name, model in models.items():
        save_model(model, scratch / name)
    blobs = [file.read_bytes() for file in files]
    works: dict[str, Work] = {
        WHOLE: lambda: sum(decode(data).shape[2] // 3 for data in blobs),
        CENTRE: lambda: sum(decode_centre(data, 128).shape[2] // 3 for data in blobs),
        OURS: _table(_job(scratch, SMALL, tokens=TOKENS)),
        ALL: _table(_job(scratch, SMALL)),
    }
    if against:
        reference = _Reference(models[SMALL], files, scratch)
        _check(reference, _job(scratch, SMALL, tokens=TOKENS))
        works[REFERENCE] = reference
        # what its user could do: all is read, and its model is given the first tokens alone
        works[REFERENCE_PREFIX] = lambda: reference(TOKENS)
    needed = {}
    with ExitStack() as stack:
        for name, limit in LARGE.items():
            config = models[name].config
            works[_ceiling(name)] = products(4096, config.width, 100)
            for tokens, images_ in ((TOKENS, len(files)), (1024, limit)):
                job = _job(scratch, name, tokens=tokens, limit=images_)
                works[f"{name}, {tokens} tokens"] = stack.enter_context(_steady(job))
                needed[name, tokens] = embedding_flops(config, tokens, config.layers // 2 + 1) / 1e9
        found = in_turns(works, rounds, {})
    shares = {
        f"{name}, {tokens} tokens": gigaflop
        * ratio(found, _ceiling(name), f"{name}, {tokens} tokens")
        for (name, tokens), gigaflop in needed.items()
    }
    timed = {name: times for name, times in found.items() if not name.endswith("a GFLOP")}
    result: dict[str, Any] = {
        "images": len(files),
        "bytes_an_image": round(sum(map(len, blobs)) / len(blobs)),
        "cpu_ms_an_image": {name: 1e3 * median(times) for name, times in timed.items()},
        "images_a_cpu_second": {name: 1 / median(times) for name, times in timed.items()},
        "share_of_matrix_products": shares,
        "gain_of_64_tokens_over_all": {
            SMALL: ratio(found, ALL, OURS),
            **{n: ratio(found, f"{n}, 1024 tokens", f"{n}, {TOKENS} tokens") for n in LARGE},
        },
        "decode_over_centre": ratio(found, WHOLE, CENTRE),
    }
    if against:
        result["reference_over_ours"] = {
            f"{TOKENS} tokens": ratio(found, REFERENCE_PREFIX, OURS),
            f"{TOKENS} tokens, its all": ratio(found, REFERENCE, OURS),
            "all tokens": ratio(found, REFERENCE, ALL),
        }
    return result


class _Reference:
    """AstroPT's way: its loader and its model, all in memory."""

    def __init__(self, model: AstroPT, files: list[Path], scratch: Path) -> None:
        self._model = reference_model(model, scratch)
        self._loader = DataLoader(reference_dataset(files, scratch, transposed=True), BATCH)
        self.found = np.empty(0)

    def __call__(self, tokens: int | None = None) -> int:
        parts = []
        with torch.inference_mode():
            for batch in self._loader:
                inputs = {"images": batch["images"][:, :tokens].float()}
                inputs["images_positions"] = batch["images_positions"][:, :tokens]
                states = self._model.get_embeddings(inputs)["images"]
                parts.append(states[:, :TOKENS].mean(dim=1))
        self.found = torch.cat(parts).numpy()
        return len(self.found)


def _check(reference: _Reference, job: EmbedJob) -> None:
    """See that both ways make the same embeddings."""
    reference()
    embed(job, _quiet)
    table = read_embeddings(job.output, kind="numpy")
    shutil.rmtree(job.output)
    ours = table["embedding"][np.argsort(table["id"])]
    if not np.allclose(ours, reference.found, atol=AGREE):
        difference = np.abs(ours - reference.found).max()
        raise UserError(f"--against astropt: embeddings differ by {difference:.2g}")


def _model(preset: str) -> AstroPT:
    return AstroPT(load_config(preset, ["model.tokeniser=aim"]).model).eval()


def _job(scratch: Path, model: str, **options: Any) -> EmbedJob:
    shards = (str(scratch / "shards"),)
    return EmbedJob(str(scratch / model), shards, scratch / "table", workers=0, **options)


def _table(job: EmbedJob) -> Work:
    """From the command to a table on the disk."""

    def work() -> int:
        rows = embed(job, _quiet).rows
        shutil.rmtree(job.output)
        return rows

    return work


@contextmanager
def _steady(job: EmbedJob) -> Iterator[Work]:
    """From tar to embeddings, once all is open and loaded."""
    ready = prepare(job)
    reader, embedder = open_reader(ready), make_embedder(job, ready)

    def work() -> int:
        for chunk in reader.read([(0, 0, ready.plan.rows)]):
            embedder.embed_patches(torch.from_numpy(chunk.patches), ready.recipe)
        return ready.plan.rows

    try:
        yield work
    finally:
        reader.close()


def _ceiling(preset: str) -> str:
    return f"{preset}, products, a GFLOP"


def _quiet(line: str) -> None:
    """What a user would be told."""
