"""Features of a frozen vision tower: equal to those of the frames, kept once, never stale, in little memory."""

import json
import multiprocessing
import os
import pickle
import time
import tracemalloc
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from comparison import assert_same
from PIL import Image
from safetensors import safe_open
from tiny import lora, random_frames, tiny_config, tiny_model, tiny_processor
from transformers import AutoModel, AutoProcessor
from video_files import write_video

from transformers_ma2mba import BrokenSamples, DataCollatorForVideoQA, FrozenVisionFeatures, conversation_to_messages

ROW = [{"from": "human", "value": "Who opens the door?"}, {"from": "gpt", "value": "red"}]


@pytest.fixture
def model(config):
    model = tiny_model(config)
    model.model.vision_tower.requires_grad_(False)
    return model


@pytest.fixture
def film(tmp_path):
    """A film of seven seconds with four pictures: A A B C A A D, without loss."""
    return write_film(tmp_path / "film.mp4", "AABCAAD")


def write_film(path, pictures: str, seed=0):
    different = dict(zip(sorted(set(pictures)), random_frames(len(set(pictures)), 48, 48, seed=seed), strict=True))
    frames = [different[picture] for picture in pictures]
    write_video(path, frames, fps=1, codec="libx264rgb", pixel_format="rgb24", qp=0)
    return path


def rows_of(*paths, **extra) -> list[dict]:
    return [{"video": str(path), "conversations": ROW, **extra} for path in paths]


def count_encoded(features, monkeypatch) -> list[int]:
    """A list to which each call of the vision tower adds its number of frames."""
    calls, encode = [], features.model.get_vision_features
    monkeypatch.setattr(
        features.model, "get_vision_features", lambda pixels: (calls.append(len(pixels)), encode(pixels))[1]
    )
    return calls


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "ma-gc"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_step_on_kept_features_equals_one_on_frames(kind, checkpointed, film, tmp_path, in_double):
    model = tiny_model(tiny_config(kind), dtype=torch.float64).train()
    model.model.vision_tower.requires_grad_(False)
    processor = tiny_processor(model.config)
    if checkpointed:
        model.gradient_checkpointing_enable({"layer_interval": 1, "sequence_interval": 8})
    other = write_film(tmp_path / "other.mp4", "EEFEE", seed=1)
    features = FrozenVisionFeatures(model, processor, tmp_path / "features")
    losses, gradients = [], []
    for vision_features in (None, features, features):
        batch = DataCollatorForVideoQA(processor, vision_features=vision_features)(rows_of(film, other))
        assert ("pixel_values_videos" in batch) == (vision_features is None)
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert batch["vision_features_videos"].shape[0] == 6  # A B C D, E F
    assert batch["picture_indices_videos"].tolist() == [0, 0, 1, 2, 0, 0, 3, 4, 4, 5, 4, 4]
    assert any("multi_modal_projector" in name for name in gradients[0])
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert_same([loss], losses[:1])
        assert_same(gradient, gradients[0], smallest_norm=1e-6)


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
def test_a_film_is_encoded_once(in_folder, model, processor, film, tmp_path, monkeypatch):
    features = FrozenVisionFeatures(model, processor, tmp_path / "kept" if in_folder else None)
    calls = count_encoded(features, monkeypatch)
    first, again = features(film), features(os.path.relpath(film))
    assert sum(calls) == 4 and max(calls) <= model.config.frames_per_vision_pass
    assert torch.equal(again.features, first.features) and torch.equal(again.picture_indices, first.picture_indices)
    pixels = processor.video_processor(film)["pixel_values_videos"]
    assert_same([again.features[again.picture_indices]], [model.model.get_vision_features(pixels)], tolerance=1e-5)
    if in_folder:  # for the next process, too
        later = FrozenVisionFeatures(model, processor, tmp_path / "kept")
        calls.clear()
        assert torch.equal(later(film).features, first.features) and calls == []
        assert {path.suffix for path in (tmp_path / "kept").iterdir()} == {".safetensors"}


def change_film(model, processor, film):
    write_film(film, "DCBAABC", seed=5)


def change_size_back_in_time(model, processor, film):
    stat = os.stat(film)
    with open(film, "ab") as file:
        file.write(b"\0" * 8)
    os.utime(film, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_rate(model, processor, film):
    processor.video_processor.fps = 0.5


def change_preparation(model, processor, film):
    processor.video_processor.resample = 0


def change_weights(model, processor, film):
    with torch.no_grad():
        model.model.vision_tower.embeddings.patch_embedding.weight.mul_(1.5)


def change_weights_unseen(model, processor, film):
    for parameter in model.model.vision_tower.parameters():
        parameter.data.mul_(1.5)  # which PyTorch does not count as a change


def change_layer(model, processor, film):
    model.config.vision_feature_layer = -1


def change_dtype(model, processor, film):
    model.double()


CHANGES = [
    change_film,
    change_size_back_in_time,
    change_rate,
    change_preparation,
    change_weights,
    change_weights_unseen,
    change_layer,
    change_dtype,
]


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.removeprefix("change_"))
def test_stale_features_are_not_used(change, in_folder, film, tmp_path, monkeypatch):
    model = tiny_model(tiny_config())
    model.model.vision_tower.requires_grad_(False)
    processor = tiny_processor(model.config)
    features = FrozenVisionFeatures(model, processor, tmp_path / "kept" if in_folder else None)
    features(film)
    change(model, processor, film)
    calls = count_encoded(features, monkeypatch)
    fresh = features(film)
    assert calls
    pixels = processor.video_processor(film)["pixel_values_videos"]
    expected = model.model.get_vision_features(pixels)
    assert_same([fresh.features[fresh.picture_indices]], [expected], tolerance=1e-5)
    calls.clear()
    features(film)
    assert not calls


@pytest.mark.parametrize("damage", ["cut", "text", "other metadata"])
def test_a_damaged_file_is_written_again(damage, model, processor, film, tmp_path):
    features = FrozenVisionFeatures(model, processor, tmp_path)
    first = features(film)
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(
        {"cut": content[:-5], "text": b"no tensors", "other metadata": content.replace(b"mtime", b"ctime")}[damage]
    )
    again = features(film)
    assert torch.equal(again.features, first.features)
    assert file.read_bytes() == content


def test_a_film_that_changes_while_it_is_read_is_not_kept(model, processor, film, tmp_path, monkeypatch):
    features = FrozenVisionFeatures(model, processor)
    encode = features._encode

    def encode_while_written(path):
        result = encode(path)
        write_film(film, "DDDDDDD", seed=7)
        return result

    monkeypatch.setattr(features, "_encode", encode_while_written)
    features(film)
    monkeypatch.setattr(features, "_encode", encode)
    assert len(features(film).features) == 1


def test_a_trained_vision_tower_is_refused(config, processor, film):
    features = FrozenVisionFeatures(tiny_model(config), processor)
    with pytest.raises(ValueError, match="trained cannot be kept.*requires_grad_"):
        features(film)


def test_a_film_in_several_rows_is_in_a_batch_once(model, processor, film, tmp_path):
    """Lists often have several rows for a film, which are of one length and so in one batch."""
    rows = rows_of(film, write_film(tmp_path / "other.mp4", "EEF", seed=1), film)
    features = FrozenVisionFeatures(model, processor, tmp_path / "kept")
    kept = DataCollatorForVideoQA(processor, vision_features=features)(rows)
    assert kept["vision_features_videos"].shape[0] == 4 + 2
    assert kept["picture_indices_videos"].tolist() == [0, 0, 1, 2, 0, 0, 3, 4, 4, 5, 0, 0, 1, 2, 0, 0, 3]
    with torch.no_grad():
        losses = [model(**batch).loss for batch in (kept, DataCollatorForVideoQA(processor)(rows))]
    assert torch.allclose(*losses)


def test_a_url_is_encoded_each_time(model, processor, film, monkeypatch):
    features = FrozenVisionFeatures(model, processor)
    calls = count_encoded(features, monkeypatch)
    for _ in range(2):
        with pytest.warns(UserWarning, match="URLs are not kept"):
            features(f"file://{film}")
    assert sum(calls) == 8


def test_a_saved_checkpoint_has_the_same_features(model, processor, film, tmp_path, monkeypatch):
    FrozenVisionFeatures(model, processor, tmp_path / "kept")(film)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(tmp_path / "saved")
    loaded.model.vision_tower.requires_grad_(False)
    features = FrozenVisionFeatures(loaded, AutoProcessor.from_pretrained(tmp_path / "saved"), tmp_path / "kept")
    calls = count_encoded(features, monkeypatch)
    features(film)
    assert calls == []


def test_a_model_made_in_inference_mode(config, processor, film):
    with torch.inference_mode():
        model = tiny_model(config)
        model.model.vision_tower.requires_grad_(False)
        assert len(FrozenVisionFeatures(model, processor)(film).features) == 4


def test_adapters_of_the_vision_tower_are_refused(config, processor, film):
    """Adapters may be switched on and off without a change of any weight."""
    model = lora(tiny_model(config), target_modules=["q_proj"]).requires_grad_(False)
    with pytest.raises(ValueError, match="adapters cannot be kept.*merge_and_unload"):
        FrozenVisionFeatures(model, processor)(film)


def test_adapters_of_the_language_model(config, processor, film):
    adapted = lora(tiny_model(config), modules_to_save=["multi_modal_projector"])
    features = FrozenVisionFeatures(adapted, processor)
    losses = []
    for vision_features in (None, features):
        losses.append(
            adapted(**DataCollatorForVideoQA(processor, vision_features=vision_features)(rows_of(film))).loss
        )
    losses[1].backward()
    assert torch.allclose(losses[0], losses[1])
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert any("multi_modal_projector" in name for name in trained) and any("lora" in name for name in trained)


def test_a_model_of_another_kind_is_refused(processor):
    with pytest.raises(ValueError, match="must be a Ma2mbaForVideoQA.*got Linear"):
        FrozenVisionFeatures(torch.nn.Linear(1, 1), processor)


# Folders


def test_other_users_may_read_the_folder(model, processor, film, tmp_path):
    usual = tmp_path / "usual"
    usual.touch()
    FrozenVisionFeatures(model, processor, tmp_path / "kept")(film)
    (file,) = (tmp_path / "kept").iterdir()
    assert file.stat().st_mode == usual.stat().st_mode


def test_the_folder_may_be_deleted_at_any_time(model, processor, film, tmp_path):
    features = FrozenVisionFeatures(model, processor, tmp_path / "kept")
    for _ in range(2):
        features(film)
        (file,) = (tmp_path / "kept").iterdir()
        file.unlink()
        file.parent.rmdir()


def test_a_file_in_place_of_the_folder_is_named(model, processor, film):
    with pytest.raises(NotADirectoryError, match="film.mp4 is a file: give a folder"):
        FrozenVisionFeatures(model, processor, film)


def test_a_failed_write_is_named_and_leaves_nothing(model, processor, film, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    features = FrozenVisionFeatures(model, processor, tmp_path / "kept")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"features of .*film.mp4 could not be written to .*kept \(.*No space left"):
        features(film)
    assert list((tmp_path / "kept").iterdir()) == []


def test_an_interrupted_write_leaves_nothing(model, processor, film, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    features = FrozenVisionFeatures(model, processor, tmp_path / "kept")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        features(film)
    assert list((tmp_path / "kept").iterdir()) == []


def test_memory_does_not_grow_with_the_film(model, processor, tmp_path):
    """A row of many frames never has more than a piece of them in memory."""
    peaks = []
    for seconds in (30, 300):
        film = tmp_path / f"{seconds}.mp4"
        write_video(film, (np.full((64, 64), i % 251, np.uint8) for i in range(seconds)), fps=1, pixel_format="gray")
        features = FrozenVisionFeatures(model, processor)
        features(write_film(tmp_path / "short.mp4", "AB"))  # whatever is loaded once
        tracemalloc.start()
        kept = features(film)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(kept.picture_indices) == seconds
    frame_bytes = 3 * 32 * 32
    assert peaks[1] - peaks[0] < 0.2 * 270 * frame_bytes


def test_the_training_mode_of_the_tower_is_kept(model, processor, film):
    model.train()
    model.model.vision_tower.eval()
    model.model.vision_tower.encoder.train()
    modes = [module.training for module in model.modules()]
    FrozenVisionFeatures(model, processor)(film)
    assert [module.training for module in model.modules()] == modes


def test_dropout_and_autocast_do_not_reach_kept_features(film):
    model = tiny_model(tiny_config(vision=dict(attention_dropout=0.5))).train()
    model.model.vision_tower.requires_grad_(False)
    processor = tiny_processor(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        kept = FrozenVisionFeatures(model, processor)(film)
    plain = FrozenVisionFeatures(model.eval(), processor)(film)
    assert_same([kept.features], [plain.features], tolerance=0)


def test_prepare_encodes_what_is_missing(model, processor, film, tmp_path, monkeypatch):
    other = write_film(tmp_path / "other.mp4", "XY", seed=3)
    features = FrozenVisionFeatures(model, processor, tmp_path / "kept")
    features(film)
    calls = count_encoded(features, monkeypatch)
    features.prepare([film, str(film), other])
    assert sum(calls) == 2


def test_prepare_leaves_out_urls(model, processor, film, tmp_path, monkeypatch):
    features = FrozenVisionFeatures(model, processor, tmp_path / "kept")
    calls = count_encoded(features, monkeypatch)
    features.prepare([f"file://{film}"])
    assert calls == []


def test_clips_are_kept_apart(model, processor, film, tmp_path, monkeypatch):
    for folder in (None, tmp_path / "kept"):
        features = FrozenVisionFeatures(model, processor, folder)
        whole = features(film)
        everything = whole.features[whole.picture_indices]
        for start, end in [(0, 2), (2, 4), (3.0, None), (None, 1)]:
            clip = features(film, start, end)
            assert_same([clip.features[clip.picture_indices]], [everything[int(start or 0) : end]], tolerance=1e-6)
        calls = count_encoded(features, monkeypatch)
        for start, end in [(0, 2), (2, 4), (3, None), (0.0, 1.0), (0, None)]:
            features(film, start, end)
        assert calls == []
    assert len(list((tmp_path / "kept").iterdir())) == 5


def test_features_of_whole_films_from_earlier_versions_are_used(model, processor, film, tmp_path):
    """Their key has no clip."""
    FrozenVisionFeatures(model, processor, tmp_path / "kept")(film)
    (file,) = (tmp_path / "kept").iterdir()
    with safe_open(file, "pt") as kept:
        key = json.loads(kept.metadata()["key"])
    assert set(key) == {"path", "size", "mtime_ns", "format", "frame_rate", "vision"}


def broken_rows(film, folder) -> list[dict]:
    (folder / "noise.mp4").write_bytes(b"no film")
    return [
        {"id": "whole", "video": str(film), "conversations": ROW},
        {"id": "clip", "video": "film.mp4", "start": 2, "end": 4, "conversations": ROW},
        {"id": "late", "video": "film.mp4", "start": 200, "conversations": ROW},
        {"id": "missing", "video": "nowhere.mp4", "conversations": ROW},
        {"id": "noise", "video": ["film.mp4", "noise.mp4"], "conversations": ROW},
        {"id": "malformed", "video": "film.mp4", "conversations": []},
        {"id": "image", "image": "no.png", "conversations": ROW},
    ]


def test_prepare_takes_rows_and_leaves_out_broken_ones(model, processor, film, tmp_path, monkeypatch):
    rows, features = broken_rows(film, tmp_path), FrozenVisionFeatures(model, processor, tmp_path / "kept")
    with pytest.raises((FileNotFoundError, ValueError)):
        features.prepare(rows, tmp_path)
    broken = BrokenSamples(tmp_path / "broken.jsonl")
    with pytest.warns(UserWarning, match="Sample noise is left out: .*noise.mp4 is not a video"):
        features.prepare(rows, tmp_path, broken)
    assert len(broken) == 4 and broken.reason("late, start 200", [film])
    assert len(list((tmp_path / "kept").iterdir())) == 2  # the whole film and the clip
    calls = count_encoded(features, monkeypatch)
    features.prepare(rows, tmp_path, broken)
    # A worker process that cannot encode does not meet a film that is not kept.
    worker = pickle.loads(pickle.dumps(DataCollatorForVideoQA(processor, tmp_path, False, features, broken)))
    batch = worker(rows[:6])
    assert calls == [] and [bool((labels != -100).any()) for labels in batch["labels"]] == [True] * 2 + [False] * 4
    with pytest.raises(ValueError, match="Sample .* cannot be read"):
        features.prepare(rows, tmp_path, BrokenSamples(tmp_path / "broken.jsonl", strict=True))


def test_a_full_disk_is_no_broken_sample(model, processor, film, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    broken, features = BrokenSamples(), FrozenVisionFeatures(model, processor, tmp_path / "kept")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="could not be written"):
        DataCollatorForVideoQA(processor, vision_features=features, broken_samples=broken)(rows_of(film))
    with pytest.raises(OSError, match="could not be written"):
        features.prepare(rows_of(film), broken_samples=broken)
    assert len(broken) == 0


def test_a_path_that_cannot_be_one_is_a_broken_sample(model, processor, film):
    broken = BrokenSamples()
    collator = DataCollatorForVideoQA(
        processor, vision_features=FrozenVisionFeatures(model, processor), broken_samples=broken
    )
    for path in (f"{film}/a.mp4", "a" * 5000, "nul\0.mp4"):
        with pytest.warns(UserWarning, match="left out"):
            assert (collator([{"id": path[-9:], "video": path, "conversations": ROW}])["labels"] == -100).all()


# Several processes


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
def test_a_pickled_copy_knows_the_kept_features_only(in_folder, model, processor, film, tmp_path):
    features = FrozenVisionFeatures(model, processor, tmp_path / "kept" if in_folder else None)
    collator = DataCollatorForVideoQA(processor, vision_features=features)
    with pytest.raises(RuntimeError, match="call `prepare`"):
        pickle.loads(pickle.dumps(collator))(rows_of(film))
    features.prepare([film])
    pickled = pickle.dumps(collator)
    assert len(pickled) < 1e5  # no weights
    batch = pickle.loads(pickled)(rows_of(film))
    assert torch.equal(batch["vision_features_videos"], features(film).features)
    with pytest.raises(RuntimeError, match="other.mp4 are not kept.*call `prepare`"):
        pickle.loads(pickled)(rows_of(write_film(tmp_path / "other.mp4", "AB")))


def test_a_worker_process_does_not_use_a_vision_tower_elsewhere(model, processor, film, tmp_path, monkeypatch):
    """A meta tower stands for one on a GPU, which a forked process must not touch."""
    kept, features = (FrozenVisionFeatures(model, processor, tmp_path / "kept") for _ in range(2))
    kept.prepare([film])
    features.prepare([])  # as in a process that has no film to encode
    model.to("meta")
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "a worker")
    assert len(features(film).features) == 4
    with pytest.raises(RuntimeError, match="on a GPU.*call `prepare`"):
        features(write_film(tmp_path / "other.mp4", "AB"))
    with pytest.raises(RuntimeError, match="on a GPU.*call `prepare`"):
        FrozenVisionFeatures(model, processor, tmp_path / "kept")(film)


def prepare_in_process(rank, folder, paths, seconds, results, broken=False):
    """Prepare films in one of two processes, the second of which takes some time."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=1)
    )
    model = tiny_model(tiny_config())
    model.model.vision_tower.requires_grad_(False)
    features = FrozenVisionFeatures(model, tiny_processor(model.config), Path(folder) / "kept")
    encode = features._encode
    features._encode = lambda path: (time.sleep(seconds * rank), encode(path))[1]
    broken_samples = BrokenSamples() if broken else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            features.prepare(paths, folder, broken_samples)
        results.put((rank, broken_samples.summary() if broken else None))
    except Exception as error:
        results.put((rank, f"{type(error).__name__}: {error}"))


def prepare_in_two_processes(folder, paths, seconds=0, broken=False) -> dict:
    """The error of each process, or None, or its broken samples."""
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=prepare_in_process, args=(rank, folder, paths, seconds, results, broken))
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    return dict(results.get() for _ in processes)


def test_two_processes_share_the_films_and_wait_for_each_other(film, tmp_path):
    """Longer than their process group waits."""
    other = write_film(tmp_path / "other.mp4", "XY", seed=3)
    assert prepare_in_two_processes(tmp_path, [film, other], seconds=2) == {0: None, 1: None}
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_a_failure_reaches_the_process_that_waits(film, tmp_path):
    errors = prepare_in_two_processes(tmp_path, [film, tmp_path / "nowhere.mp4"])
    assert errors[1].startswith("FileNotFoundError") and "nowhere.mp4" in errors[1]
    assert errors[0].startswith("RuntimeError: Process 1 could not encode its films") and "nowhere.mp4" in errors[0]


def test_every_process_hears_of_broken_samples(film, tmp_path):
    first, second = prepare_in_two_processes(tmp_path, broken_rows(film, tmp_path), broken=True).values()
    assert sorted(first.splitlines()) == sorted(second.splitlines()) and first.startswith("4 broken samples")
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_generate_answers_from_kept_features(model, processor, film):
    messages = conversation_to_messages({"video": str(film), "conversations": ROW[:1]})
    options = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    plain = processor.apply_chat_template(messages, **options)
    messages[0]["content"][0] = {"type": "video", "video": FrozenVisionFeatures(model, processor)(film)}
    kept = processor.apply_chat_template(messages, **options)
    assert "pixel_values_videos" in plain and "vision_features_videos" in kept
    generate = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected, given = model.generate(**plain, **generate), model.generate(**kept, **generate)
    assert torch.equal(given.sequences, expected.sequences)
    assert torch.allclose(torch.stack(given.logits)[..., :-2], torch.stack(expected.logits)[..., :-2], atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [dict(num_beams=3, num_return_sequences=2), dict(do_sample=True, num_return_sequences=3), dict(use_cache=False)],
    ids=["beams", "samples", "no-cache"],
)
def test_generate_expands_kept_features_as_it_does_frames(options, model, processor, film, tmp_path):
    other = write_film(tmp_path / "other.mp4", "EEF", seed=1)
    features, answers = FrozenVisionFeatures(model, processor), []
    for videos in ([[str(film)], [str(other)]], [[features(film)], [features(other)]]):
        text = ["<|user|><video>Who opens the door?<|assistant|>"] * 2
        inputs = processor(text=text, videos=videos, padding=True, return_tensors="pt")
        torch.manual_seed(0)
        answers.append(model.generate(**inputs, max_new_tokens=6, **{"do_sample": False, **options}))
    assert torch.equal(answers[1], answers[0])
    with pytest.raises(ValueError, match="either pixel_values_videos or vision_features_videos"):
        model.generate(**inputs, pixel_values_videos=torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_bad_features_are_named(model, processor, film):
    batch = DataCollatorForVideoQA(processor, vision_features=FrozenVisionFeatures(model, processor))(rows_of(film))
    with pytest.raises(ValueError, match=r"vision_features_videos must be floats of shape \(pictures, 4, 24\)"):
        model(**{**batch, "vision_features_videos": batch["vision_features_videos"][:, :1]})
    with pytest.raises(ValueError, match="picture_indices_videos must be integers.*got none"):
        model(**{**batch, "picture_indices_videos": None})
    indices = batch["picture_indices_videos"]
    for bad, message in ((indices - 4, "between 0 and 3.*got -4 to -1"), (indices + 1, "between 0 and 3.*got 1 to 4")):
        with pytest.raises(ValueError, match=f"picture_indices_videos must lie {message}"):
            model(**{**batch, "picture_indices_videos": bad})
    for dtype in (torch.bool, torch.uint8):  # these would be masks
        with pytest.raises(ValueError, match="picture_indices_videos must be integers"):
            model(**{**batch, "picture_indices_videos": indices.to(dtype)})
    with pytest.raises(ValueError, match="either pixel_values_videos or vision_features_videos"):
        model(**batch, pixel_values_videos=torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="placeholders"):
        model(**{**batch, "picture_indices_videos": batch["picture_indices_videos"][:-1]})
    with pytest.raises(FileNotFoundError):
        FrozenVisionFeatures(model, processor)("no such film.mp4")


def test_films_encoded_and_not_encoded_cannot_share_a_batch(model, processor, film):
    encoded = FrozenVisionFeatures(model, processor)(film)
    with pytest.raises(ValueError, match="all of them"):
        processor(text="<video> and <video>", videos=[encoded, str(film)])


def test_no_warning_for_a_plain_use(model, processor, film, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FrozenVisionFeatures(model, processor, tmp_path / "kept")(film)


@pytest.mark.parametrize("in_folder", [False, True], ids=["memory", "folder"])
def test_a_folder_of_frames_is_encoded(in_folder, model, processor, film, tmp_path, monkeypatch):
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(random_frames(6, 48, 48)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{number}.png")
    rows = [row | {"fps": fps} for fps in (2.0, 3.0) for row in rows_of(tmp_path / "frames", film)]
    features = FrozenVisionFeatures(model, processor, tmp_path / "kept" if in_folder else None)
    features.prepare(rows)
    calls = count_encoded(features, monkeypatch)
    collator = DataCollatorForVideoQA(processor, vision_features=features)
    kept = [collator([row])["picture_indices_videos"].tolist() for row in rows]
    if in_folder:
        assert calls == []
    assert kept[0] == [0, 1, 2] and kept[2] == [0, 1] and kept[1] == kept[3]
    pixels = DataCollatorForVideoQA(processor)(rows[:1])["pixel_values_videos"]
    batch = collator(rows[:1])
    assert_same([batch["vision_features_videos"]], [model.model.get_vision_features(pixels)], tolerance=1e-5)
    calls.clear()
    stat = os.stat(tmp_path / "frames")
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(tmp_path / "frames" / "0.png")
    os.utime(tmp_path / "frames", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # overwriting leaves the folder's time
    assert not torch.equal(collator(rows[:1])["vision_features_videos"], batch["vision_features_videos"])
