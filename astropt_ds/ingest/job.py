"""What to make shards of, and whether that makes sense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from astropt_ds.errors import UserError

INPUTS = ("images", "parquet", "hdf5", "fits")
VAL_FRACTION = TEST_FRACTION = 0.01
# Options that not every input takes.
TAKEN_BY = {
    "image_column": ("parquet",),
    "bands": ("hdf5", "fits"),
    "file_pattern": ("fits",),
    "file_column": ("images", "fits"),
    "catalogue_id_column": ("parquet", "hdf5"),
    "stretch": ("hdf5", "fits"),
}


@dataclass(frozen=True)
class Job:
    """What to make shards of. Just one of ``images``, ``parquet``, ``hdf5`` and ``fits`` says.

    Attributes:
        output: the folder of the shards, new.
        images: a folder of JPEG and PNG files.
        parquet: Parquet files, and folders of them, with a column of images.
        hdf5: HDF5 files, and folders of them, in the layout of the Multimodal Universe or of
            Stein et al.
        fits: a folder of FITS images.
        image_column: of the images in Parquet files; ``image`` if None.
        bands: which to take, in order; names for those that have none.
        file_pattern: path of a FITS file with ``{id}`` and ``{band}`` in it.
        catalogue: a table about the images: CSV, a Parquet file or a folder of them, FITS or
            VOTable. It names the files of a folder, and is joined to the others on the id. Where
            both have a column, the catalogue's is taken.
        id_column: of the object's id, in the catalogue that names files or in the Parquet or HDF5
            files; the first of the usual ones if None.
        catalogue_id_column: in a catalogue that is joined, where it is named otherwise.
        file_column: of the files in a catalogue; ``file`` if None.
        columns: those to keep as labels; all if empty.
        filter: rows to keep, as ``pandas.DataFrame.query`` reads it.
        group_column: rows that share its value go to the same split.
        split_column: train, val or test.
        healpix_order: of tiles of the sky, none of which is in two splits.
        ra_column, dec_column: of the sky positions; degrees.
        val_fraction, test_fraction: of the ids, groups or tiles by hash; 0.01 each if None.
        nan: what becomes of an image with pixels that are not finite: it is rejected, or they mean
            zero.
        stretch: turns fluxes to 8-bit colour.
        rgb: the bands to show as red, green and blue.
        scales: of red, green and blue, for the stretch; its defaults if empty.
        softening: for the stretch; its default if None.
        samples_per_shard: images in a tar file.
        min_side: smaller images are rejected; pixels.
        processes: that read and write; the output does not depend on it.
    """

    output: Path
    images: Path | None = None
    parquet: tuple[Path, ...] = ()
    hdf5: tuple[Path, ...] = ()
    fits: Path | None = None
    image_column: str | None = None
    bands: tuple[str, ...] = ()
    file_pattern: str | None = None
    catalogue: Path | None = None
    id_column: str | None = None
    catalogue_id_column: str | None = None
    file_column: str | None = None
    columns: tuple[str, ...] = ()
    filter: str | None = None
    group_column: str | None = None
    split_column: str | None = None
    healpix_order: int | None = None
    ra_column: str = "ra"
    dec_column: str = "dec"
    val_fraction: float | None = None
    test_fraction: float | None = None
    nan: Literal["reject", "zero"] = "reject"
    stretch: Literal["asinh", "lupton"] | None = None
    rgb: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    softening: float | None = None
    samples_per_shard: int = 1000
    min_side: int = 16
    processes: int = 1

    @property
    def kind(self) -> str:
        """Which of INPUTS it is."""
        return next(name for name in INPUTS if getattr(self, name))

    @property
    def where(self) -> str:
        """The input, as the command line has it."""
        value = getattr(self, self.kind)
        paths = value if isinstance(value, tuple) else (value,)
        return f"--{self.kind} {' '.join(map(str, paths))}"

    @property
    def fractions(self) -> tuple[float, float]:
        """Of val and test."""
        val = VAL_FRACTION if self.val_fraction is None else self.val_fraction
        return val, TEST_FRACTION if self.test_fraction is None else self.test_fraction

    def split_columns(self) -> dict[str, str]:
        """The columns that the splits are made of, by option."""
        options = ["group_column", "split_column"]
        if self.healpix_order is not None:
            options += ["ra_column", "dec_column"]
        return {name: column for name in options if (column := getattr(self, name))}

    def needs(self, column: str) -> bool:
        """Whether a column is wanted to choose images or to make splits."""
        return column in self.split_columns().values() or column in (self.filter or "")

    def check(self) -> None:
        """See that the options are right, each and together.

        Raises:
            UserError: they are not.
        """
        self.check_input()
        self._check_splits()
        for option in ("samples_per_shard", "min_side", "processes"):
            if (value := getattr(self, option)) < 1:
                raise UserError(f"{_flag(option)} {value}: 1 or more would be right")
        if self.output.exists():
            raise UserError(f"--output {self.output}: exists already; name a new folder")

    def check_input(self) -> None:
        """See that it is clear what images there are, and how pixels are made of them.

        Raises:
            UserError: it is not.
        """
        self._check_inputs()
        self._check_stretch()

    def _check_inputs(self) -> None:
        given = [name for name in INPUTS if getattr(self, name)]
        if len(given) != 1:
            known = ", ".join(f"--{name}" for name in INPUTS)
            raise UserError(f"just one of {known} would be right, not {len(given)}")
        for option, kinds in TAKEN_BY.items():
            if getattr(self, option) and self.kind not in kinds:
                inputs = " and ".join(f"--{kind}" for kind in kinds)
                raise UserError(f"{_flag(option)} goes with {inputs}, not with --{self.kind}")
        needs_table = ["catalogue_id_column", "file_column"]
        if self.kind in ("images", "fits"):
            needs_table += ["id_column", "filter", *self.split_columns(), "columns"]
        if self.catalogue is None:
            for option in needs_table:
                if getattr(self, option):
                    asked = "healpix_order" if option in ("ra_column", "dec_column") else option
                    raise UserError(
                        f"{_flag(asked)} is about a table: --catalogue beside --{self.kind} would "
                        "be right"
                    )
        if self.file_pattern:
            if self.file_column:
                raise UserError("--file-column and --file-pattern: one of them would be right")
            if not self.bands or not all(m in self.file_pattern for m in ("{id}", "{band}")):
                raise UserError(
                    f"--file-pattern {self.file_pattern}: needs {{id}} and {{band}} in it, and "
                    "--bands"
                )

    def _check_splits(self) -> None:
        options = ("group_column", "split_column", "healpix_order")
        given = [_flag(option) for option in options if getattr(self, option) is not None]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)}: one of them would be right")
        val, test = self.fractions
        if not (val >= 0 and test >= 0 and val + test <= 1):  # false for NaN, too
            raise UserError(
                f"--val-fraction {val} --test-fraction {test}: "
                "0 or more each, 1 at most together, would be right"
            )
        if self.healpix_order is not None and not 0 <= self.healpix_order <= 29:
            raise UserError(f"--healpix-order {self.healpix_order}: 0 to 29 would be right")

    def _check_stretch(self) -> None:
        for option in ("rgb", "scales", "softening"):
            if getattr(self, option) and not self.stretch:
                raise UserError(f"{_flag(option)} needs --stretch asinh or lupton")
        if self.stretch and len(self.rgb) != 3:
            raise UserError(f"--stretch {self.stretch}: needs --rgb and three bands, red first")
        if self.scales and (len(self.scales) != 3 or not all(map(_positive, self.scales))):
            raise UserError(f"--scales {' '.join(map(str, self.scales))}: three above 0, red first")
        if self.softening is not None and not _positive(self.softening):
            raise UserError(f"--softening {self.softening}: above 0 would be right")


def _positive(value: float) -> bool:
    return value > 0 and math.isfinite(value)


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
