import hashlib
import itertools
import json

import pytest
import torch

from astropt_ds.errors import UserError
from astropt_ds.training import checkpoint, staging
from astropt_ds.training.fragments import STATES, Fragment
from astropt_ds.training.ranks import start


@pytest.fixture(scope="module")
def ranks():
    with start() as ranks:
        yield ranks


def fragments(shapes, cuts=(0.5,), fill=None):
    """Every state of every tensor in pieces, as some topology would hold them."""
    found = []
    for name, shape in shapes.items():
        count = int(torch.tensor(shape).prod())
        bounds = [0, *(int(count * cut) for cut in cuts), count]
        for state in STATES:
            generator = torch.Generator().manual_seed(len(name) + len(state))
            whole = (
                torch.randn(count, generator=generator)
                if fill is None
                else torch.full((count,), fill)
            )
            for low, high in itertools.pairwise(bounds):
                found.append(Fragment(name, state, shape, low, whole[low:high].clone(), True))
    return found


SHAPES = {"a.weight": (5, 7), "b.weight": (11,), "c.bias": (1,)}


def whole(found):
    tensors = {}
    for f in sorted(found, key=lambda f: (f.name, f.state, f.offset)):
        tensors.setdefault((f.name, f.state), []).append(f.values)
    return {key: torch.cat(parts) for key, parts in tensors.items()}


@pytest.fixture
def saved(ranks, tmp_path):
    for step in (3, 6):
        checkpoint.save(tmp_path, step, fragments(SHAPES), {"updates": step}, ranks)
    return tmp_path


def test_any_cutting_reads_what_any_other_wrote(ranks, tmp_path):
    written = fragments(SHAPES, cuts=(0.2, 0.5, 0.9))
    path = checkpoint.save(tmp_path, 7, written, {"updates": 7}, ranks)
    for cuts in ((), (0.5,), (0.1, 0.4, 0.8, 0.95)):
        read = fragments(SHAPES, cuts, fill=-1.0)
        manifest = checkpoint.load(path, read)
        assert (manifest["step"], manifest["state"]) == (7, {"updates": 7})
        for key, values in whole(written).items():
            assert torch.equal(values, whole(read)[key])


def test_a_save_leaves_a_whole_folder_a_pointer_and_nothing_else(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["checkpoints", "latest"]
    names = sorted(p.name for p in (saved / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000006"]
    assert (saved / "latest").read_text() == "step-00000006\n"


def test_a_hole_or_an_overlap_is_no_checkpoint(ranks, saved):
    holey = [f for f in fragments(SHAPES) if (f.name, f.offset) != ("b.weight", 5)]
    doubled = [*fragments(SHAPES), fragments(SHAPES, cuts=(0.3,))[1]]
    for wrong, message in ((holey, "ends at element 5"), (doubled, "an overlap in weight of a")):
        with pytest.raises(UserError, match=message):
            checkpoint.save(saved, 9, wrong, {}, ranks)
    assert checkpoint.find(saved, ranks)[0].name == "step-00000006"
    assert (saved / "latest").read_text() == "step-00000006\n"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x01
    path.write_bytes(data)


def edit_manifest(path, old, new):
    text = (path / "manifest.json").read_text()
    assert old in text
    (path / "manifest.json").write_text(text.replace(old, new))


def whole_manifest(path, text):
    """Another manifest, with the checksum that belongs to it."""
    (path / "manifest.json").write_text(text)
    (path / "complete").write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


@pytest.mark.parametrize(
    "harm, reason",
    [
        (lambda p: flip(p / "rank-00000.safetensors"), "does not match its checksum"),
        (lambda p: (p / "rank-00000.safetensors").unlink(), "is missing"),
        (lambda p: (p / "rank-00000.safetensors").write_bytes(b"x"), "has 1 of"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json: No such file or directory"),
        (lambda p: edit_manifest(p, '"updates": 6', '"updates": 5'), "not match its checksum"),
        (lambda p: (p / "complete").unlink(), "complete: No such file or directory"),
        (lambda p: (p / "complete").write_text(""), "does not match its checksum"),
        (lambda p: whole_manifest(p, "{"), "not a checkpoint's manifest"),
        (lambda p: whole_manifest(p, '{"format": "x"}'), "format 'x'"),
        (lambda p: whole_manifest(p, "[]"), "not a checkpoint's manifest"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(ranks, saved, harm, reason):
    harm(saved / "checkpoints" / "step-00000006")
    found, passed_over = checkpoint.find(saved, ranks)
    assert found.name == "step-00000003"
    ((path, why),) = passed_over
    assert path.name == "step-00000006" and reason in why


def test_a_staging_folder_is_no_checkpoint(ranks, saved):
    final = saved / "checkpoints" / "step-00000006"
    final.rename(final.with_name("step-00000009.partial"))
    assert checkpoint.find(saved, ranks) == (saved / "checkpoints" / "step-00000003", [])


def test_a_wrong_or_missing_pointer_does_not_mislead(ranks, saved):
    (saved / "latest").write_text("step-99999999\n")
    assert checkpoint.find(saved, ranks)[0].name == "step-00000006"
    (saved / "latest").unlink()
    assert checkpoint.find(saved, ranks)[0].name == "step-00000006"


def test_a_failed_write_leaves_the_older_ones(ranks, saved, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(staging, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save(saved, 9, fragments(SHAPES), {}, ranks)
    assert checkpoint.find(saved, ranks) == (saved / "checkpoints" / "step-00000006", [])
    assert (saved / "latest").read_text() == "step-00000006\n"
    monkeypatch.undo()
    checkpoint.save(saved, 9, fragments(SHAPES), {}, ranks)  # over the staging folder left behind
    assert checkpoint.find(saved, ranks)[0].name == "step-00000009"


def test_another_models_checkpoint_is_refused_by_tensor(saved):
    path = saved / "checkpoints" / "step-00000006"
    with pytest.raises(UserError, match=r"tensor a.weight is \[5, 7\]; the model needs \[7, 5\]"):
        checkpoint.load(path, fragments({**SHAPES, "a.weight": (7, 5)}))
    with pytest.raises(UserError, match="tensor d.weight is nothing"):
        checkpoint.load(path, fragments({**SHAPES, "d.weight": (2,)}))


def test_one_checkpoint_can_be_named_itself(ranks, saved):
    path = saved / "checkpoints" / "step-00000003"
    assert checkpoint.find(path, ranks) == (path, [])
    assert checkpoint.find(saved / "nowhere", ranks) == (None, [])


def test_the_files_can_be_read_by_anyone(saved):
    from safetensors.torch import load_file

    path = saved / "checkpoints" / "step-00000006"
    manifest = json.loads((path / "manifest.json").read_text())
    stored = load_file(path / "rank-00000.safetensors")
    for offset, length, _ in manifest["tensors"]["a.weight"]["fragments"]["exp_avg"]:
        assert stored[f"exp_avg/a.weight/{offset}"].shape == (length,)


def test_saving_a_step_anew_replaces_what_was_there(ranks, saved):
    flip(saved / "checkpoints" / "step-00000006" / "rank-00000.safetensors")
    path = checkpoint.save(saved, 6, fragments(SHAPES), {"updates": 60}, ranks)
    assert checkpoint.find(saved, ranks) == (path, [])
    names = sorted(p.name for p in (saved / "checkpoints").iterdir())
    assert names == ["step-00000003", "step-00000006"]


@pytest.fixture
def many(ranks, tmp_path):
    for step in (3, 6, 9, 12, 15):
        checkpoint.save(tmp_path, step, fragments(SHAPES), {}, ranks)
    return tmp_path


def left(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "keep, keep_every, steps",
    [
        (None, None, [3, 6, 9, 12, 15]),
        (1, None, [15]),
        (2, None, [12, 15]),
        (9, None, [3, 6, 9, 12, 15]),
        (1, 6, [6, 12, 15]),
        (2, 100, [12, 15]),
    ],
)
def test_the_newest_ones_and_multiples_stay(many, keep, keep_every, steps):
    assert checkpoint.retain(many, 15, keep, keep_every) == []
    assert left(many) == [f"step-{step:08d}" for step in steps]


def test_what_was_just_saved_stays_whatever_else_is_there(ranks, many):
    flip(many / "checkpoints" / "step-00000015" / "manifest.json")
    (many / "checkpoints" / "step-00000012" / "complete").unlink()
    checkpoint.retain(many, 9, 1, None)  # a run that fell back to 6 has just saved 9
    assert left(many) == ["step-00000009", "step-00000012", "step-00000015"]
    assert checkpoint.find(many, ranks)[0].name == "step-00000009"


def test_only_whole_ones_count_among_those_that_stay(many):
    (many / "checkpoints" / "step-00000012" / "complete").unlink()
    checkpoint.retain(many, 15, 2, None)
    assert left(many) == ["step-00000009", "step-00000012", "step-00000015"]


def test_what_people_put_beside_them_is_none_of_ours(ranks, many):
    others = ["step-6.backup", "best", "step-00000018.damaged-1"]
    for name in others:
        (many / "checkpoints" / name).mkdir()
    checkpoint.retain(many, 15, 1, 6)
    assert set(left(many)) == {*others, "step-00000006", "step-00000012", "step-00000015"}
    assert checkpoint.find(many, ranks) == (many / "checkpoints" / "step-00000015", [])


def test_what_cannot_be_deleted_is_told(many, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "remove_folder", refuse)
    lines = checkpoint.retain(many, 15, 4, None)
    assert [line.partition(":")[0] for line in lines] == [str(many / "checkpoints/step-00000003")]


def test_steps_are_numbers_not_names(ranks, tmp_path):
    for step in (99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, fragments(SHAPES), {}, ranks)
    assert checkpoint.find(tmp_path, ranks)[0].name == "step-100000000"


def test_a_failure_of_ours_is_no_users_mistake(ranks):
    with pytest.raises(ZeroDivisionError), ranks.together():
        raise ZeroDivisionError
    with pytest.raises(UserError, match="TimeoutError"), ranks.together():
        raise TimeoutError


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT not set"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_PORT not set"),
    ],
)
def test_half_a_description_of_the_group_is_refused(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message), start():
        pass


def test_a_users_mistake_on_one_rank_is_every_ranks(ranks):
    with pytest.raises(UserError, match="^no space$"), ranks.together():
        raise UserError("no space")
    with ranks.together():
        pass
