import random

import pytest
import torch

from astropt_ds.config_source import load_config
from astropt_ds.convert.astropt import AstroPTSource
from astropt_ds.convert.find import open_source
from astropt_ds.convert.generations import generation_of, upstream_name, upstream_order
from astropt_ds.convert.load import LiveSource
from astropt_ds.convert.model_folders import FolderSource
from astropt_ds.convert.write import write_astropt, write_model_folder
from astropt_ds.errors import UserError
from astropt_ds.model import AstroPT, parameter_shapes
from astropt_ds.model_folder.release import Release
from tests.unit.convert.documented import (
    SIZES,
    model_args,
    random_state,
    save,
    shapes,
    v1_predictions,
)

LAYERS, HEADS, WIDTH = 3, 4, 32
KINDS = [("v1", "relu"), ("v2", "aim"), ("v2", "affine"), ("v3", "aim"), ("v3", "affine")]


def written(path, generation, tokeniser="aim", **more):
    options = {} if generation == "v1" else {"tokeniser": tokeniser}
    state = random_state(generation, LAYERS, WIDTH, **options)
    told = {"tokeniser": tokeniser} if generation == "v3" else {}
    if generation == "v3":
        told |= {"objective": "ar", "mae_mask_ratio": 0.5, "norm_pix_loss": False}
    args = model_args(generation, LAYERS, HEADS, WIDTH, **told)
    return save(path, state, {**args, **more.pop("args", {})}, **more), state


def loaded(source):
    model = AstroPT(source.model, seed=9)
    model.load_state_dict({name: source.tensor(name) for name in parameter_shapes(source.model)})
    return model.eval()


@pytest.mark.parametrize("preset", SIZES)
def test_every_size_of_every_generation_has_the_documented_keys_and_shapes(preset):
    layers, heads, width, *totals = SIZES[preset]
    for tokeniser, total in zip(("relu", "aim", "affine"), totals, strict=True):
        model = load_config(preset, [f"model.tokeniser={tokeniser}"]).model
        assert (model.layers, model.heads, model.width) == (layers, heads, width)
        ours = parameter_shapes(model)
        for generation in ("v1",) if tokeniser == "relu" else ("v2", "v3"):
            wanted = shapes(generation, layers, width, tokeniser)
            names = upstream_order(list(ours), generation)
            found = {upstream_name(name, generation): ours[name] for name in names}
            assert list(found.items()) == list(wanted.items())  # in the order, too
            assert generation_of(list(wanted)) == generation
        assert sum(torch.Size(shape).numel() for shape in ours.values()) == total


@pytest.mark.parametrize("generation, tokeniser", KINDS)
def test_a_file_becomes_a_folder_and_the_same_tensors_again(tmp_path, generation, tokeniser):
    path, state = written(tmp_path / "ckpt.pt", generation, tokeniser)
    source = AstroPTSource(path)
    assert source.what == f"AstroPT {generation} checkpoint"
    assert source.model.tokeniser == tokeniser
    assert source.model.orientation == ("rows" if generation == "v1" else "columns")
    assert source.facts == {"step": 7, "best_val_loss": 0.25}
    write_model_folder(source, tmp_path / "folder")
    folder = FolderSource(tmp_path / "folder")
    assert folder.facts["source"]["sha256"] == source.sha256
    back = tmp_path / "back.pt"
    write_astropt(folder, back, generation)
    content = torch.load(back, weights_only=False) if generation == "v1" else None
    again = AstroPTSource(back)
    for name in parameter_shapes(source.model):
        assert torch.equal(again.tensor(name), state[upstream_name(name, generation)]), name
    if content is not None:
        assert list(content["model"]) == list(state)
        assert content["model_args"] == model_args("v1", LAYERS, HEADS, WIDTH)
        assert (content["iter_num"], content["best_val_loss"]) == (7, 0.25)
        assert content.keys() == {"model", "model_args", "iter_num", "best_val_loss", "config"}


def test_torch_maps_a_file_into_memory_with_its_tensors_aligned(tmp_path):
    path, state = written(tmp_path / "ckpt.pt", "v1")
    write_astropt(AstroPTSource(path), tmp_path / "back.pt", "v1")
    mapped = torch.load(tmp_path / "back.pt", weights_only=True, mmap=True)["model"]
    assert all(torch.equal(mapped[name], state[name]) for name in state)
    assert {tensor.data_ptr() % 64 for tensor in mapped.values()} == {0}


def test_v1_predicts_what_its_formulas_say(tmp_path):
    path, state = written(tmp_path / "ckpt.pt", "v1")
    tokens = torch.randn(2, 20, 768, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        predictions, _ = loaded(AstroPTSource(path))(tokens)
    expected = v1_predictions(state, tokens, LAYERS, HEADS)
    assert expected.std() > 0.1
    torch.testing.assert_close(predictions, expected, atol=1e-5, rtol=1e-5)


def test_v2_and_v3_differ_in_names_alone(tmp_path):
    path, state = written(tmp_path / "v2.pt", "v2")
    source = AstroPTSource(path)
    write_astropt(source, tmp_path / "v3.pt", "v3")
    third = AstroPTSource(tmp_path / "v3.pt")
    assert third.what == "AstroPT v3 checkpoint" and third.model == source.model
    renamed = {
        "transformer.wte.images.": "encoders.images.",
        "transformer.wpe.images.": "embedders.images.",
        "lm_head.images.": "decoders.images.",
    }
    for name, tensor in state.items():
        new = name
        for old, prefix in renamed.items():
            new = new.replace(old, prefix)
        assert torch.equal(third.tensor(new), tensor)
    write_astropt(third, tmp_path / "v2again.pt", "v2")
    write_astropt(source, tmp_path / "v2copy.pt", "v2")
    first, second = (AstroPTSource(tmp_path / f"{n}.pt") for n in ("v2again", "v2copy"))
    assert all(
        torch.equal(first.tensor(n), second.tensor(n)) for n in parameter_shapes(first.model)
    )


@pytest.mark.parametrize("generation", ["v1", "v2", "v3"])
def test_what_torch_compile_puts_into_names_is_taken_out_anywhere(tmp_path, generation):
    _, state = written(tmp_path / "plain.pt", generation)
    strange = {
        ("_orig_mod." + n if i % 3 == 0 else n.replace("mlp.", "mlp._orig_mod.")): t
        for i, (n, t) in enumerate(state.items())
    }
    path = save(tmp_path / "ckpt.pt", strange, model_args(generation, LAYERS, HEADS, WIDTH))
    source = AstroPTSource(path)
    for name in parameter_shapes(source.model):
        assert torch.equal(source.tensor(name), state[upstream_name(name, generation)])
    both = {**state, **strange}
    path = save(tmp_path / "both.pt", both, model_args(generation, LAYERS, HEADS, WIDTH))
    with pytest.raises(UserError, match="is there twice, with _orig_mod. and without"):
        AstroPTSource(path)


@pytest.mark.parametrize(
    "change",
    [{"modality_registry": None}, {"modality_registry": None, "args": {"modalities": None}}],
)
def test_early_files_of_v2_without_registry_are_read(tmp_path, change):
    path, state = written(tmp_path / "ckpt.pt", "v2", **change)
    source = AstroPTSource(path)
    assert source.model.images.patch == 16 and source.model.images.channels == 3
    assert torch.equal(source.tensor("decoders.images.c_proj.weight"), list(state.values())[-1])


def modality(**changes):
    args = model_args("v2", LAYERS, HEADS, WIDTH)
    vars(args["modalities"][0]).update(changes)
    return {"modalities": args["modalities"]}


@pytest.mark.parametrize(
    "args, message",
    [
        ({"attn_type": "prefix"}, "model_args.attn_type='prefix', only 'causal' is read"),
        ({"objective": "mae"}, "model_args.objective='mae', only 'ar' is read"),
        ({"lora_r": 4}, "model_args.lora_r=4, only 0 is read"),
        ({"bias": True}, "model_args.bias=True, only False is read"),
        ({"gate": 2}, "model_args.gate=2 is not known"),
        ({"tokeniser": "affine"}, "model_args.tokeniser='affine', but its tensors are aim's"),
        ({"n_head": 5}, "model_args: .*width=32 is no multiple of heads=5"),
        ({"n_layer": "three"}, "model_args.n_layer='three' is no whole number"),
        ({"n_embd": 0}, "model_args: n_embd"),
        ({"n_layer": 10**9}, r"model_args.n_layer=1000000000 of \d+ tensors"),
        (modality(name="spectra"), r"modalities \['spectra'\], only \['images'\] is read"),
        (modality(embed_pos=False), "modality images: embed_pos=False, only True is read"),
        (modality(vocab_size=9), "modality images: vocab_size=9, only 0 is read"),
        (modality(patch_size=10), "input_size=768 is no patch of patch_size=10"),
        ({"attn_type": "prefix", "gate": 1}, "'causal' is read; model_args.gate=1 is not known"),
    ],
)
def test_a_model_that_this_package_has_not_is_refused_with_every_reason(tmp_path, args, message):
    path, _ = written(tmp_path / "ckpt.pt", "v2", args=args, modality_registry=None)
    with pytest.raises(UserError, match=message) as caught:
        AstroPTSource(path)
    assert "ckpt.pt: AstroPT v2: " in str(caught.value) and "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_are_named_together_as_the_file_has_them(tmp_path):
    state = random_state("v2", LAYERS, WIDTH)
    del state["transformer.wpe.images.wpe.weight"]
    state["transformer.h.1.ln_2.weight"] = torch.ones(5)
    state["transformer.h.2.ln_2.weight"] = torch.ones(WIDTH, dtype=torch.float64)
    state["mask_token"] = torch.ones(1, 1, WIDTH)
    path = save(tmp_path / "ckpt.pt", state, model_args("v2", LAYERS, HEADS, WIDTH))
    with pytest.raises(UserError) as caught:
        AstroPTSource(path)
    for part in (
        "missing: transformer.wpe.images.wpe.weight",
        "not of this model: mask_token",
        "of another shape: transformer.h.1.ln_2.weight [5] for [32]",
        "of a dtype other than fp32, bf16 and fp16: transformer.h.2.ln_2.weight float64",
    ):
        assert part in str(caught.value)


def test_prefixes_of_torchs_wrappers_and_masks_of_old_torch_are_no_tensors_of_the_model(tmp_path):
    state = random_state("v1", LAYERS, WIDTH)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    wrapped["module._orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    path = save(tmp_path / "ckpt.pt", wrapped, model_args("v1", LAYERS, HEADS, WIDTH))
    source = AstroPTSource(path)
    for name in parameter_shapes(source.model):
        assert torch.equal(source.tensor(name), state[upstream_name(name, "v1")])


@pytest.mark.parametrize(
    "more",
    [
        {"best_val_loss": torch.ones(2)},
        {"best_val_loss": "low"},
        {"args": {3: 1, "b": 2}},
        {"args": {"x\ny": 1}},
        {"args": {"attn_type": [[["prefix"] * 9] * 9]}},
        {"args": {"n_head": True}},
    ],
)
def test_strange_content_is_told_in_one_short_line(tmp_path, more):
    path, _ = written(tmp_path / "ckpt.pt", "v1", **more)
    with pytest.raises(UserError) as caught:
        AstroPTSource(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 300


def test_an_optimizer_state_of_other_weights_is_not_called_none(tmp_path):
    state = random_state("v1", LAYERS, WIDTH)
    weights = [torch.nn.Parameter(tensor) for tensor in state.values()]
    optimizer = torch.optim.AdamW(weights)  # one group, in another order than AstroPT's two
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    args = model_args("v1", LAYERS, HEADS, WIDTH)
    path = save(tmp_path / "ckpt.pt", state, args, optimizer=optimizer.state_dict())
    with pytest.raises(UserError, match="holds an optimizer state that does not fit its weight"):
        write_astropt(AstroPTSource(path), tmp_path / "out.pt", "v1", optimizer=True)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1], "no AstroPT checkpoint, which holds model and model_args"),
        ({"model": {}}, "no AstroPT checkpoint, which holds model and model_args"),
        ({"model": {}, "model_args": {}}, "none of its tensors is an encoder's"),
        ({"model": {"encoders.images.c_fc.weight": 3}, "model_args": {}}, "is no tensor"),
    ],
)
def test_a_torch_file_of_something_else_is_told(tmp_path, content, message):
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=f"ckpt.pt: .*{message}"):
        AstroPTSource(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    "overrides, generation, message",
    [
        ([], "v2", "tokeniser relu is no v2's .astropt-v1 would be right.; v2 reads columns first"),
        (["model.tokeniser=aim"], "v1", "tokeniser aim is no v1's .astropt-v2 or astropt-v3"),
        (["model.tokeniser=aim", "model.orientation=rows"], "v3", "v3 reads columns first"),
        (["model.orientation=columns"], "v1", "v1 reads rows first, the model columns"),
    ],
)
def test_what_a_generation_cannot_express_is_refused(tmp_path, overrides, generation, message):
    model = load_config("1m", ["model.layers=1", "model.width=32", *overrides]).model
    source = LiveSource(AstroPT(model), {})
    with pytest.raises(UserError, match=f"astropt-{generation} cannot express.*{message}"):
        write_astropt(source, tmp_path / "ckpt.pt", generation)
    assert not list(tmp_path.iterdir())


def test_thirty_random_corruptions_are_told_or_change_nothing(tmp_path):
    path, state = written(tmp_path / "ckpt.pt", "v2")
    data = path.read_bytes()
    rng = random.Random(5)
    told = 0
    for case in range(30):
        harmed = bytearray(data)
        start, length = rng.randrange(len(data)), rng.choice((1, 8, 512))
        harmed[start : start + length] = rng.randbytes(len(harmed[start : start + length]))
        path.write_bytes(harmed)
        try:
            source = AstroPTSource(path)
            found = {name: source.tensor(name) for name in parameter_shapes(source.model)}
        except UserError as error:
            told += 1
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            for name, tensor in found.items():
                assert torch.equal(tensor, state[upstream_name(name, "v2")]), case
    assert told >= 25


def test_a_truncated_file_is_told_at_any_length(tmp_path):
    path, _ = written(tmp_path / "ckpt.pt", "v3")
    data = path.read_bytes()
    for length in range(len(data) // 20, len(data), len(data) // 20):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged, or no file that torch.save wrote"):
            open_source(path)


def test_what_torch_saved_before_zip_files_is_told_how_to_become_one(tmp_path):
    torch.save({}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="a plain pickle, as torch before 1.6 wrote; saved anew"):
        open_source(tmp_path / "old.pt")


def test_the_weights_of_a_file_take_any_dtype_and_return(tmp_path):
    path, state = written(tmp_path / "ckpt.pt", "v2")
    source = AstroPTSource(path)
    for dtype in (torch.bfloat16, torch.float16):
        folder, back = tmp_path / str(dtype), tmp_path / f"{dtype}.pt"
        write_model_folder(source, folder, dtype)
        write_astropt(FolderSource(folder), back, "v2")
        again = AstroPTSource(back)
        assert again.dtype == dtype
        for name in parameter_shapes(source.model):
            assert torch.equal(again.tensor(name), state[upstream_name(name, "v2")].to(dtype))


def test_values_that_are_not_finite_are_told_and_kept(tmp_path, capsys):
    state = random_state("v2", LAYERS, WIDTH)
    state["transformer.ln_f.weight"][3] = torch.nan
    path = save(tmp_path / "ckpt.pt", state, model_args("v2", LAYERS, HEADS, WIDTH))
    write_model_folder(AstroPTSource(path), tmp_path / "folder")
    assert "not finite, in 1 tensors: transformer.ln_f.weight" in capsys.readouterr().err
    assert FolderSource(tmp_path / "folder").tensor("transformer.ln_f.weight")[3].isnan()


def test_two_conversions_to_one_name_do_not_delete_each_others_work(tmp_path):
    path, _ = written(tmp_path / "ckpt.pt", "v2")
    (mine := tmp_path / "folder.partial").mkdir()
    (mine / "letter").write_text("dear reader")
    with pytest.raises(UserError, match="folder.partial exists, of a command that still runs"):
        write_model_folder(AstroPTSource(path), tmp_path / "folder")
    assert (mine / "letter").exists()


def test_licence_and_data_sets_outlast_a_conversion_unless_others_are_given(tmp_path):
    path, _ = written(tmp_path / "ckpt.pt", "v2")
    release = Release("mit", ("organisation/name",))
    write_model_folder(AstroPTSource(path), tmp_path / "a", release=release)
    write_model_folder(FolderSource(tmp_path / "a"), tmp_path / "b", torch.bfloat16)
    assert FolderSource(tmp_path / "b").release == release
    assert "license: mit" in (tmp_path / "b" / "README.md").read_text()
    write_model_folder(FolderSource(tmp_path / "b"), tmp_path / "c", release=Release("other"))
    assert FolderSource(tmp_path / "c").release == Release("other")


def test_nothing_is_left_of_an_output_that_failed_and_nothing_overwritten(tmp_path):
    path, _ = written(tmp_path / "ckpt.pt", "v2")
    source = AstroPTSource(path)
    for write in (write_model_folder, lambda s, o: write_astropt(s, o, "v2")):
        with pytest.raises(UserError, match=r"ckpt.pt: cannot be written \(exists already"):
            write(source, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for write in (write_model_folder, lambda s, o: write_astropt(s, o, "v3")):
        with pytest.raises(UserError, match="damaged"):
            write(source, tmp_path / "output")
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt.pt"]


def test_the_same_file_gives_the_same_bytes(tmp_path):
    path, _ = written(tmp_path / "ckpt.pt", "v1")
    for name in "ab":
        write_model_folder(AstroPTSource(path), tmp_path / name)
        write_astropt(AstroPTSource(path), tmp_path / f"{name}.pt", "v1")
    for file in sorted(p.name for p in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
