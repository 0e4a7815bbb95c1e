"""Weight files: lazy reading of safetensors, pickles and shards, and writing within the memory of one tensor."""

import json
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config, tiny_model
from transformers import Mamba2Model

from transformers_ma2mba.checkpoints.tensor_files import (
    PlannedTensor,
    TensorFolder,
    TensorInfo,
    check_tensors,
    new_folder,
    write_pickle,
    write_safetensors,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def some_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"layers.{i}.weight": (4 * torch.randn(3, i + 1)).to(dtype) for i, dtype in enumerate(DTYPES)}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "odd": torch.ones(3).bool()}


def planned(tensors: dict[str, torch.Tensor]) -> dict[str, PlannedTensor]:
    return {
        name: PlannedTensor(TensorInfo(tuple(tensor.shape), tensor.dtype), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def write_in_shards(folder, tensors, number: int, kind: str):
    """Write shards of either kind, as Transformers names them."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    weight_map = {}
    for shard in range(number):
        part = dict(list(tensors.items())[shard::number])
        file = f"{stem}-{shard + 1:05}-of-{number:05}.{kind}"
        (save_file if kind == "safetensors" else torch.save)(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Reading


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("number", [1, 2, 10])
def test_tensors_are_read_as_they_were_saved(tmp_path, kind, number):
    tensors = some_tensors()
    if number > 1:
        write_in_shards(tmp_path, tensors, number, kind)
    elif kind == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    found = TensorFolder(tmp_path)
    assert_same(found, tensors)
    assert {name: found.info(name).shape for name in found} == {name: t.shape for name, t in tensors.items()}
    assert {name: found.info(name).dtype for name in found} == {name: t.dtype for name, t in tensors.items()}


def test_a_pickle_of_old_pytorch_is_read(tmp_path):
    tensors = some_tensors()
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(TensorFolder(tmp_path), tensors)


def test_a_pickle_gives_back_its_pages(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_ma2mba.checkpoints.tensor_files._MAPPED_BYTES", 100)
    tensors = some_tensors()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_same(TensorFolder(tmp_path), tensors)


def test_tensors_that_share_memory_or_have_gaps(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    torch.save({"embedding": weight, "head": weight, "turned": weight.T}, tmp_path / "pytorch_model.bin")
    assert_same(TensorFolder(tmp_path), {"embedding": weight, "head": weight, "turned": weight.T})


def test_parameters_are_read_as_tensors(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3))
    torch.save({"weight": weight}, tmp_path / "pytorch_model.bin")
    found = TensorFolder(tmp_path)["weight"]
    assert type(found) is torch.Tensor and not found.requires_grad


def test_of_two_sets_of_weights_transformers_takes_the_single_file(tmp_path):
    """`save_pretrained` into the folder of another model may leave that model's index, or its single file."""
    model = tiny_model(tiny_config()).model.language_model
    model.save_pretrained(tmp_path)
    in_shards = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    write_in_shards(tmp_path, in_shards, 2, "safetensors")
    torch.save(in_shards, tmp_path / "pytorch_model.bin")
    assert_same(TensorFolder(tmp_path), Mamba2Model.from_pretrained(tmp_path).state_dict())


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("change", ["overwritten", "shortened", "replaced"])
def test_a_file_that_changes_while_it_is_read(tmp_path, kind, change):
    file = tmp_path / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    save = save_file if kind == "safetensors" else torch.save
    save({"a": torch.ones(5000), "b": torch.ones(5000)}, file)
    os.utime(file, (1, 1))
    found = TensorFolder(tmp_path)
    assert torch.equal(found["a"], torch.ones(5000))
    if change == "shortened":
        os.truncate(file, 100)
    else:
        save({"a": torch.zeros(5000), "b": torch.zeros(5000)}, tmp_path / "new")
        if change == "overwritten":
            file.write_bytes((tmp_path / "new").read_bytes())
        else:
            os.utime(tmp_path / "new", (1, 1))
            (tmp_path / "new").replace(file)
    with pytest.raises(ValueError, match=f"{file.name} was changed or replaced while it was read"):
        found["b"]


def test_a_pickle_of_old_pytorch_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_ma2mba.checkpoints.tensor_files._MAPPED_BYTES", 100)
    torch.save(some_tensors(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = TensorFolder(tmp_path)
    monkeypatch.setattr(torch, "load", None)
    assert_same(found, some_tensors())


def test_membership_reads_no_data(tmp_path, monkeypatch):
    save_file(some_tensors(), tmp_path / "model.safetensors")
    found = TensorFolder(tmp_path)
    monkeypatch.setattr(TensorFolder, "__getitem__", None)
    assert "scalar" in found and "other" not in found and len(found) == len(some_tensors())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_with_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (os.system, ("touch harm",))

    with open(tmp_path / "pytorch_model.bin", "wb") as file:
        pickle.dump({"weight": Harmful()}, file)
    with pytest.raises(ValueError, match="damaged or holds more than tensors, which could run code"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("content", [{"state_dict": {"weight": torch.ones(1)}}, {3: torch.ones(1)}, torch.ones(1)])
def test_a_pickle_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no dictionary of tensors"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [0, 5, 300, -9])
def test_a_truncated_file_is_named(tmp_path, file, kept):
    (save_file if file.startswith("model") else torch.save)(some_tensors(), tmp_path / file)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:kept])
    with pytest.raises(ValueError, match=rf"{file} (is (truncated|damaged)|has a header)") as caught:
        TensorFolder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data_offsets": [8, 24]}, r"data of weight at \[8, 24\] does not have the shape \[2\] in F32"),
        ({"shape": [3]}, r"data of weight at \[0, 8\] does not have the shape \[3\] in F32"),
        ({"shape": ["x"]}, "does not have the shape"),
        ({"shape": None}, "NoneType"),
        ({"dtype": "F4"}, "weight has the dtype 'F4', which is not supported"),
        ({"data_offsets": [-8, 0]}, r"data of weight at \[-8, 0\]"),
    ],
)
def test_a_header_that_does_not_fit_its_data(tmp_path, entry, message):
    whole = {"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}
    header = json.dumps(whole).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(ValueError, match=f"model.safetensors has a header that cannot be read: .*{message}"):
        TensorFolder(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_in_shards(tmp_path, some_tensors(), 3, "safetensors")
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="shards that are missing: model-00002-of-00003.safetensors"):
        TensorFolder(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    write_in_shards(tmp_path, some_tensors(), 2, "safetensors")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["another"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"their shards lack: another \(model-00001-of-00002.safetensors\)"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("path", ["../secret.safetensors", "/etc/secret", "a/../../b", "C:\\secret", "..\\secret"])
def test_an_index_cannot_lead_outside_of_its_folder(tmp_path, path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": path}}))
    with pytest.raises(ValueError, match="files outside of its folder"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"weight": 3}}', "\ufeff{}"])
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="no index of shards"):
        TensorFolder(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="There are no weights in .*expected model.safetensors or"):
        TensorFolder(tmp_path)


# Writing


def test_one_file_is_read_by_safetensors(tmp_path):
    write_safetensors(tmp_path, planned(some_tensors()))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), some_tensors())
    assert_same(TensorFolder(tmp_path), some_tensors())


def test_shards_are_read_by_safetensors(tmp_path):
    write_safetensors(tmp_path, planned(some_tensors()), max_shard_size=60)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 2000 for file in files)
    found = {}
    for file in files:
        found |= load_file(file)
    assert_same(found, some_tensors())
    assert_same(TensorFolder(tmp_path), some_tensors())


def test_a_tensor_is_stored_in_the_planned_dtype_and_shape(tmp_path):
    info = TensorInfo((3,), torch.bfloat16)
    write_safetensors(tmp_path, {"weight": PlannedTensor(info, lambda: torch.tensor([1.0, 2.0, 3.0]))})
    assert TensorFolder(tmp_path)["weight"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), expected \(3,\)"):
        write_safetensors(tmp_path, {"weight": PlannedTensor(info, lambda: torch.ones(4))})


def test_values_beyond_the_range_of_the_planned_dtype(tmp_path):
    info = TensorInfo((2,), torch.float16)
    with pytest.raises(ValueError, match="weight has values beyond the range of torch.float16"):
        write_safetensors(tmp_path, {"weight": PlannedTensor(info, lambda: torch.tensor([1.0, 1e5]))})
    write_safetensors(tmp_path, {"weight": PlannedTensor(info, lambda: torch.tensor([1.0, -torch.inf]))})
    assert TensorFolder(tmp_path)["weight"].tolist() == [1, -torch.inf]


def test_a_pickle_is_read_by_pytorch(tmp_path):
    tensors = some_tensors()
    write_pickle(tmp_path / "pytorch_model.bin", planned(tensors), ties={"head": "layers.1.weight"})
    found = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert found["head"].data_ptr() == found["layers.1.weight"].data_ptr()
    assert_same(found, {**tensors, "head": tensors["layers.1.weight"]})
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


# A new folder


def test_a_folder_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "new" / "model"
    with new_folder(target) as folder:
        (folder / "file").write_text("content")
        assert not target.exists()
    assert (target / "file").read_text() == "content"
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "model") as folder:
        (folder / "file").write_text("content")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_safetensors, lambda folder, t: write_pickle(folder / "model.bin", t)])
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path, write):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(repr(str(tmp_path)))), new_folder(tmp_path / "model") as folder:
            write(folder, planned({"weight": torch.ones(10_000)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="exists already: name a new or an empty folder"), new_folder(target):
            raise AssertionError
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("content")
    assert (tmp_path / "empty" / "file").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_leads_to_the_folder_that_it_names(tmp_path, exists):
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    if exists:
        (tmp_path / "folder").mkdir()
    with new_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("content")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == "content"


def test_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(".") as folder:
        (folder / "file").write_text("content")
    assert (tmp_path / "here" / "file").exists()


def test_a_mounted_file_system_is_refused_at_once(tmp_path, monkeypatch):
    """It can be neither removed nor renamed to."""
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == os.fspath(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    with pytest.raises(ValueError, match="disk' is a mounted file system: name a new folder inside it"):
        with new_folder(tmp_path / "disk"):
            raise AssertionError
    with new_folder(tmp_path / "disk" / "inside"):
        pass
    assert (tmp_path / "disk" / "inside").is_dir()


def test_one_error_lists_all_differences():
    with pytest.raises(ValueError) as caught:
        check_tensors("DIR", {"a": (1,), "b": (2,), "c": (3,)}, {"b": (2,), "c": (4,), "d": (5,)}, "Do this.")
    assert str(caught.value).splitlines() == [
        "The weights in DIR do not fit their configuration. Do this.",
        "  missing: a [1]",
        "  left over: d [5]",
        "  wrong shape: c is [4], the configuration makes it [3]",
    ]
