import pytest

from astropt_ds.data.split_names import split_in_path


@pytest.mark.parametrize(
    "path, split",
    [
        ("data/train-00000-of-00123.parquet", "train"),
        ("galaxies-train-0001.tar", "train"),
        ("test/0001.parquet", "test"),
        ("test2/00.tar", "test"),
        ("v2/Validation_3/a.hdf5", "val"),
        ("VAL-1.tar", "val"),
        ("valid.parquet", "val"),
        ("set/dev/x.tar", "val"),
        ("train/test_7.jpg", "train"),  # the folder, not what is in the picture
        ("test/train-0.tar", "test"),
        ("training/a.jpg", None),
        ("trainee-1.tar", None),
        ("contest/0.tar", None),
        ("testbed.parquet", None),
        ("development/a.jpg", None),
        ("train-test-0.tar", None),
        ("0001.tar", None),
    ],
)
def test_the_outermost_part_with_a_split_as_a_word_of_its_own_tells(path, split):
    assert split_in_path(path) == split
