"""What the tests of conversion share: the names of what is saved, and how to compare."""

import pytest
import torch

from astropt_ds.convert.find import open_source
from astropt_ds.convert.write import write_model_folder
from astropt_ds.errors import UserError
from astropt_ds.files import sha256_file
from astropt_ds.model import parameter_shapes
from astropt_ds.model_folder.weights import DTYPES
from astropt_ds.training.fragments import STATES
from tests.distributed.convert_scenarios import ENGINES, UNIVERSAL, VARIANTS
from tests.distributed.scenarios import configuration

RANKS = (2, 1, 3)  # two ranks first: they train what all save
SAVED = [f"{ranks}-{precision}-{stage}" for ranks in RANKS for precision, stage in ENGINES]
DEEPSPEEDS = [
    *("trained", *SAVED),
    *(f"{ranks}-{variant}" for ranks in RANKS for variant in VARIANTS),
    *(f"2-{name}-universal" for name in UNIVERSAL),
]
CONFIG = configuration("3", 12)
MODEL = CONFIG.model
SHAPES = parameter_shapes(MODEL)


def tensors(source, states=STATES):
    return {(name, state): source.tensor(name, state) for name in SHAPES for state in states}


def assert_equal(found, expected):
    assert found.keys() <= expected.keys()
    for key, values in found.items():
        assert values.dtype == expected[key].dtype, key
        assert torch.equal(values, expected[key]), key


def converted(folder, output, dtype):
    model = MODEL if "deepspeed" in folder.parts else None
    write_model_folder(open_source(folder, model), output, DTYPES[dtype])
    return {path.name: sha256_file(path) for path in output.iterdir()}


def told(path, model=MODEL):
    with pytest.raises(UserError) as caught:
        tensors(open_source(path, model))
    assert "\n" not in str(caught.value)
    return str(caught.value)
