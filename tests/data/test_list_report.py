"""Reports on lists: lengths as training has them, and what is wrong, without training."""

import pytest
from PIL import Image
from tiny import tiny_config, tiny_processor
from video_files import index_video_bytes

from transformers_ma2mba import BrokenSamples, DataCollatorForVideoQA
from transformers_ma2mba.data import check_rows, count_text_tokens, files_in, histogram


@pytest.fixture(scope="module")
def processor():
    return tiny_processor(tiny_config())


@pytest.fixture
def film(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_bytes(index_video_bytes(10, fps=2))  # 5 seconds
    return str(path)


def turns(question="What?", answer="red"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def check(processor, rows, **options):
    def count_text(messages):
        return count_text_tokens(processor, messages) - len(files_in(messages))

    fps = processor.video_processor.fps
    return check_rows(rows, fps, processor.tokens_per_frame, count_text, BrokenSamples(), **options)


@pytest.mark.parametrize("whole", [False, True], ids=["header", "decoded"])
def test_lengths_are_those_of_the_batches(processor, film, tmp_path, whole):
    folder = tmp_path / "frames"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (64, 64), (40 * index, 0, 0)).save(folder / f"{index:03d}.jpg")
    rows = [
        {"id": "film", "video": film, "conversations": turns()},
        {"id": "clip", "video": film, "start": 1.5, "end": 4, "conversations": turns()},
        {"id": "two clips", "video": [film, film], "start": [0, 2], "end": [2, 9], "conversations": turns()},
        {"id": "text", "conversations": turns("Why?", "because")},
        {"id": "frames", "video": str(folder), "fps": 3, "conversations": turns()},
    ]
    report = check(processor, rows, whole=whole)
    collator = DataCollatorForVideoQA(processor)
    assert [length.name for length in report.lengths] == [
        "film",
        "clip, start 1.5, end 4",
        "two clips, start 0, 2, end 2, 9",
        "text",
        "frames",
    ]
    assert [length.tokens for length in report.lengths] == [collator([row])["input_ids"].shape[1] for row in rows]
    assert [length.seconds for length in report.lengths] == [5, 2.5, 5, 0, 2]
    assert [length.frames for length in report.lengths] == [5, 3, 5, 0, 2]
    assert (report.num_answers, report.num_videos, report.num_images) == (5, 2, 0)
    assert report.longest.tokens == max(length.tokens for length in report.lengths)
    assert not report.broken and not report.notes


def test_broken_rows_and_files_are_named(processor, film, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "picture.png").write_bytes(b"no picture")
    rows = [
        {"id": "good", "video": film, "conversations": turns()},
        {"id": "silent", "video": film, "conversations": turns()[:1]},
        {"id": "missing", "video": str(tmp_path / "none.mp4"), "conversations": turns()},
        {"id": "empty", "video": str(tmp_path / "empty.mp4"), "conversations": turns()},
        {"id": "late", "video": film, "start": 7, "conversations": turns()},
        {"id": "picture", "image": str(tmp_path / "picture.png"), "conversations": turns()},
        {"id": "malformed", "video": 3, "conversations": turns()},
    ]
    with pytest.warns(UserWarning, match="is left out"):
        report = check(processor, rows)
    assert [length.name for length in report.lengths] == ["good"]
    reasons = dict(report.broken)
    expected = {
        "silent": "no answer to learn from",
        "missing": "There is no file",
        "empty": "is empty",
        "late, start 7": "ends at 5.00 seconds, before the clip starts at 7 seconds",
        "picture": "picture.png",
        "malformed": "give a path",
    }
    assert reasons.keys() == expected.keys()
    for name, part in expected.items():
        assert part in reasons[name], name


def test_files_that_are_not_as_stated_are_noted(processor, film, tmp_path):
    cut = tmp_path / "cut.mkv"
    whole = index_video_bytes(60, file_format="matroska", fps=2)
    cut.write_bytes(whole[: len(whole) // 2])
    rows = [
        {"id": "stated", "video": film, "duration": 2, "conversations": turns()},
        {"id": "cut", "video": str(cut), "conversations": turns()},
    ]
    notes = check(processor, rows, whole=True).notes
    assert any(name == "stated" and "says 2 seconds" in note for name, note in notes)
    assert any(name == str(cut) and "ends early" in note for name, note in notes)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([0, 0], [(0, 0, 2)]),
        ([1, 1.9, 2, 5], [(1, 2, 2), (2, 4, 1), (4, 8, 1)]),
        ([0, 3], [(0, 0, 1), (2, 4, 1)]),
        ([0.5], [(0.5, 1, 1)]),
    ],
)
def test_histogram(values, expected):
    assert histogram(values) == expected


def test_a_wide_histogram_has_few_bins():
    bins = histogram([2.0**exponent for exponent in range(20)])
    assert len(bins) <= 8 and sum(count for _, _, count in bins) == 20
    assert bins[0][0] == 1 and bins[-1][1] >= 2**20
