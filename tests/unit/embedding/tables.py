"""Tables of embeddings as tests make and read them."""

import csv

import numpy as np

from astropt_ds import read_embeddings
from astropt_ds.embedding.run import embed


def quiet(line):
    pass


def table_of(job):
    embed(job, quiet)
    return read_embeddings(job.output, kind="numpy")


def failures_of(job):
    with (job.output / "_failures.csv").open() as file:
        return {row["id"]: row["reason"] for row in csv.DictReader(file)}


def check(table, expected):
    assert sorted(table["id"]) == sorted(expected)
    for row in table:
        split, embedding = expected[row["id"]]
        assert row["split"] == split
        np.testing.assert_allclose(row["embedding"], embedding, atol=1e-5, rtol=0)
