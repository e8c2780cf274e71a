"""The command-line options that say how a survey is read."""

from __future__ import annotations

import argparse
from pathlib import Path

COLOURS = ("RED", "GREEN", "BLUE")


def add_survey_options(parser: argparse.ArgumentParser) -> None:
    """Add what :class:`~astropt_ds.ingest.job.Job` knows of images and the table about them.

    Args:
        parser: one that leaves out what is not given, for the job's own defaults.
    """
    add = parser.add_argument
    add("--catalogue", type=Path, help="CSV, Parquet (a file or a folder), FITS or VOTable")
    add("--id-column", help="of the ids (id, object_id, dr8_id or objid)")
    add("--catalogue-id-column", help="where a catalogue beside Parquet or HDF5 has another")
    add("--file-column", help="files in the catalogue, relative to the images' folder (file)")
    add("--file-pattern", help="FITS files of one band each: '{id}-{band}.fits'")
    add("--image-column", help="images in Parquet files (image)")
    add("--bands", nargs="+", help="bands to take, in order; names for bands without any")
    add("--filter", help="rows to keep: 'mag_r < 19 and redshift > 0.01'")

    group = parser.add_argument_group("fluxes, read as they are if nothing else is said")
    group.add_argument("--nan", choices=("reject", "zero"), help="images with NaN pixels (reject)")
    group.add_argument("--stretch", choices=("asinh", "lupton"), help="to 8-bit colour")
    group.add_argument("--rgb", nargs=3, metavar=COLOURS, help="bands to show so")
    group.add_argument("--scales", nargs=3, type=float, metavar=COLOURS, help="(2.2 3.4 6.0)")
    group.add_argument("--softening", type=float, help="Q, holds back what is bright (5.8)")
