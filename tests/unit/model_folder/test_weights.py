import json
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.model import AstroPT, parameter_shapes
from astropt_ds.model_folder.weights import StoredWeights, write_weights

MODEL = load_config("1m", ["model.layers=1", "model.width=24", "data.image_size=48"]).model


def values(seed=0):
    return [(name, p.detach()) for name, p in AstroPT(MODEL, seed=seed).named_parameters()]


def read_weights(folder, model):
    weights = StoredWeights(folder, model)
    return {name: weights.tensor(name) for name in parameter_shapes(model)}


def write(folder, dtype=torch.float32, **options):
    write_weights(folder, MODEL, dtype, values(), **options)
    return dict(values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_safetensors_library_reads_what_was_written(tmp_path, dtype):
    expected = write(tmp_path, dtype)
    found = load_file(tmp_path / "model.safetensors")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)


def test_large_weights_are_several_files_with_an_index(tmp_path):
    expected = write(tmp_path, shard_bytes=40_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == files
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in expected.values())
    sizes = [sum(t.nbytes for t in load_file(tmp_path / file).values()) for file in files]
    single = max(4 * p.numel() for p in expected.values())
    assert max(sizes) <= max(40_000, single)
    found = read_weights(tmp_path, MODEL)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_file_of_several_that_is_gone_is_named(tmp_path):
    write(tmp_path, shard_bytes=40_000)
    (gone := next(tmp_path.glob("model-00002-*"))).unlink()
    with pytest.raises(UserError, match=f"{gone.name}: cannot be read"):
        read_weights(tmp_path, MODEL)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_what_is_no_index_is_told(tmp_path, text):
    write(tmp_path, shard_bytes=40_000)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match="not the index of a model's files"):
        read_weights(tmp_path, MODEL)


def test_an_index_beside_a_single_file_is_refused_since_either_may_be_stale(tmp_path):
    write(tmp_path, shard_bytes=40_000)
    write(tmp_path)
    with pytest.raises(UserError, match="index.json: beside model.safetensors"):
        read_weights(tmp_path, MODEL)


def test_an_index_that_names_the_wrong_file_or_too_few_tensors_is_told(tmp_path):
    write(tmp_path, shard_bytes=40_000)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *_, last = index["weight_map"]
    index["weight_map"][first] = index["weight_map"][last]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"missing: {first}"):
        read_weights(tmp_path, MODEL)
    del index["weight_map"][first]
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"missing: {first}"):
        read_weights(tmp_path, MODEL)
    path.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(UserError, match="layers=1 of 0 tensors"):
        read_weights(tmp_path, MODEL)


def test_a_billion_layers_are_refused_at_once(tmp_path):
    save_file(dict(values()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers=1000000000 of \d+ tensors"):
        read_weights(tmp_path, MODEL.model_copy(update={"layers": 10**9}))


def test_a_key_that_an_older_version_did_not_write_has_its_default(tmp_path):
    older = MODEL.architecture()
    del older["objective"]
    header = {"format": "pt", "architecture": json.dumps(older)}
    save_file(dict(values()), tmp_path / "model.safetensors", metadata=header)
    assert len(read_weights(tmp_path, MODEL)) == len(values())


def test_a_key_of_a_newer_version_is_named(tmp_path):
    header = {"format": "pt", "architecture": json.dumps({**MODEL.architecture(), "rotary": True})}
    save_file(dict(values()), tmp_path / "model.safetensors", metadata=header)
    with pytest.raises(UserError, match=r"damaged or of a newer version \(rotary\)"):
        read_weights(tmp_path, MODEL)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_a_tensor_that_was_not_announced_is_no_file(tmp_path):
    first = values()[0]
    with pytest.raises(ValueError, match=f"b where {first[0]} was announced"):
        write_weights(tmp_path, MODEL, torch.float32, [("b", first[1])])
    with pytest.raises(ValueError, match="nothing where"):
        write_weights(tmp_path, MODEL, torch.float32, values()[:-1])
    with pytest.raises(ValueError, match="b where nothing was announced"):
        write_weights(tmp_path, MODEL, torch.float32, [*values(), ("b", first[1])])


def test_values_that_fp16_cannot_hold_are_refused_and_infinities_kept(tmp_path):
    changed = values()
    changed[3][1].view(-1)[0] = torch.inf
    write_weights(tmp_path, MODEL, torch.float16, changed)
    changed[3][1].view(-1)[0] = 70_000
    with pytest.raises(UserError, match=f"{changed[3][0]} has values beyond 65504; bf16 or fp32"):
        write_weights(tmp_path, MODEL, torch.float16, changed)


def test_tensors_start_at_multiples_of_eight_bytes(tmp_path):
    write(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert header % 8 == 0
    parameters = sum(map(math.prod, parameter_shapes(MODEL).values()))
    assert len(data) == 8 + header + 4 * parameters


def test_shapes_on_the_meta_device_are_the_models():
    shapes = {name: tuple(value.shape) for name, value in values()}
    assert list(parameter_shapes(MODEL).items()) == list(shapes.items())


def test_all_that_is_wrong_with_the_tensors_is_told_at_once(tmp_path):
    tensors = dict(values())
    del tensors["transformer.ln_f.weight"]
    tensors["surplus"] = torch.zeros(2)
    tensors["transformer.h.0.ln_1.weight"] = torch.zeros(3)
    tensors["transformer.h.0.ln_2.weight"] = torch.zeros(24, dtype=torch.float64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        read_weights(tmp_path, MODEL)
    told = str(caught.value)
    assert "\n" not in told
    for part in (
        "missing: transformer.ln_f.weight",
        "not of this model: surplus",
        "of another shape: transformer.h.0.ln_1.weight [3] for [24]",
        "of a dtype other than fp32, bf16 and fp16: transformer.h.0.ln_2.weight F64",
    ):
        assert part in told


def test_weights_of_another_model_of_the_same_shapes_are_refused(tmp_path):
    write(tmp_path)
    other = MODEL.model_copy(update={"heads": 4})
    with pytest.raises(
        UserError, match="of another model than config.json beside it: heads=8, not 4"
    ):
        read_weights(tmp_path, other)


def test_files_without_checksum_as_other_tools_write_them_load(tmp_path):
    save_file(dict(values()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert len(read_weights(tmp_path, MODEL)) == len(values())


def test_a_missing_a_foreign_and_a_truncated_file_are_told_in_a_line(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="model.safetensors: cannot be read"):
        read_weights(tmp_path, MODEL)
    write(tmp_path)
    data = path.read_bytes()
    for harm in (b"x", data[:-4], data + b"x"):
        path.write_bytes(harm)
        with pytest.raises(UserError, match="is no whole safetensors file") as caught:
            read_weights(tmp_path, MODEL)
        assert "\n" not in str(caught.value)


def test_random_corruptions_are_told_or_change_nothing(tmp_path):
    expected = write(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    rng = random.Random(0)
    told = 0
    for case in range(60):
        harmed = bytearray(data)
        # every other one in the header, where a byte matters more
        end = len(data) if case % 2 else int.from_bytes(data[:8], "little")
        start, length = rng.randrange(end), rng.choice((1, 4, 64))
        for at in range(start, min(start + length, len(data))):
            harmed[at] ^= rng.randrange(1, 256)
        path.write_bytes(harmed)
        try:
            found = read_weights(tmp_path, MODEL)
        except UserError as error:
            told += 1
            assert "\n" not in str(error)
        else:
            assert all(torch.equal(found[name], expected[name]) for name in expected), case
    assert told >= 50
