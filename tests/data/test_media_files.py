"""Names in lists and the files that they stand for."""

import pytest

from transformers_ma2mba.data.media_files import MediaFiles


@pytest.fixture
def tree(tmp_path):
    def make(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


@pytest.mark.parametrize(
    "name, file",
    [
        ("a.mp4", "lists/a.mp4"),
        ("b.mp4", "b.mp4"),  # the parent, as in LLaVA-Video-178K
        ("v_abc", "lists/v_abc.mkv"),
        ("v_abc.mp4", "lists/v_abc.mkv"),
        ("two", "lists/two.mp4"),  # before .webm
        ("clip_1.5", "lists/clip_1.5.mp4"),
        ("deep", "lists/x/y/deep.avi"),
        ("y/deep.mp4", "lists/x/y/deep.avi"),
        ("x/other.mp4", "lists/x/other.mp4"),
        ("frames", "lists/tvqa/frames"),
        ("c", "lists/c.mp4"),  # and not the folder c
    ],
)
def test_a_name_is_found(name, file, tree):
    path = tree(
        *("lists/a.mp4", "a.mp4", "b.mp4", "lists/v_abc.mkv", "lists/two.webm", "lists/two.mp4", "lists/clip_1.5.mp4"),
        *("lists/x/y/deep.avi", "lists/x/other.mp4", "lists/z/other.mp4", "lists/tvqa/frames/1.jpg"),
        *("lists/c/1.jpg", "lists/c.mp4", "lists/v_abc.txt", "lists/.git/hidden.mp4"),
    )
    media = MediaFiles(None, str(path / "lists"))
    assert media.find(name) == str(path / file)
    assert not media.unfound


def test_a_given_folder_is_the_only_one(tree):
    path = tree("lists/a.mp4", "videos/b.mp4")
    media = MediaFiles(str(path / "videos"), str(path / "lists"))
    assert media.find("a.mp4") == str(path / "videos/a.mp4")
    assert media.find("b") == str(path / "videos/b.mp4")
    assert list(media.unfound) == [("a.mp4",)]


def test_other_names_are_tried_before_giving_up(tree):
    media = MediaFiles(None, str(tree("v_abc.mp4")))
    assert media.find("abc", "v_abc") == str(tree() / "v_abc.mp4")
    assert media.find("x", "v_x") == str(tree() / "x")
    assert media.find("x", "v_x") == str(tree() / "x")
    assert list(media.unfound) == [("x", "v_x")]  # each name once


def test_an_ambiguous_name_is_an_error(tree):
    media = MediaFiles(None, str(tree("x/a.mp4", "y/a.mp4", "z/b.mp4", "z/b.webm")))
    with pytest.raises(ValueError, match=r"a.mp4 may be .*x/a.mp4 or .*y/a.mp4: give the folder"):
        media.find("a.mp4")
    assert media.find("b.webm").endswith("z/b.webm")
    assert media.find("b").endswith("z/b.mp4")


def test_urls_and_absolute_paths(tree, tmp_path):
    media = MediaFiles(None, str(tmp_path / "lists"))
    tree("elsewhere/a.mkv", "lists/b/a.mp4")
    assert media.find("https://example.com/a.mp4") == "https://example.com/a.mp4"
    assert media.find(str(tmp_path / "elsewhere/a.mp4")) == str(tmp_path / "elsewhere/a.mkv")
    assert media.find(str(tmp_path / "nowhere/a.mp4")) == str(tmp_path / "nowhere/a.mp4")
    assert list(media.unfound) == [(str(tmp_path / "nowhere/a.mp4"),)]


def test_a_link_to_a_folder_above_ends(tree, tmp_path):
    tree("lists/x/a.mp4")
    (tmp_path / "lists/x/loop").symlink_to(tmp_path / "lists")
    (tmp_path / "lists/linked").symlink_to(tmp_path / "videos")
    tree("videos/b.mp4")
    media = MediaFiles(None, str(tmp_path / "lists"))
    assert media.find("a").endswith("x/a.mp4")
    assert media.find("b").endswith("linked/b.mp4")


@pytest.mark.parametrize("where", ["videos", "videos/deep"])
def test_the_thumbnail_of_a_missing_video_does_not_take_its_place(where, tree):
    media = MediaFiles(str(tree(f"{where}/a.jpg", f"{where}/b.mp4", f"{where}/c.gif") / "videos"), "")
    for name in ("a", "a.mp4"):
        assert not media.find(name).endswith(".jpg")
    assert media.find("a.png", kind="image").endswith(f"{where}/a.jpg")
    assert media.find("a", kind="image").endswith(f"{where}/a.jpg")
    assert not media.find("b.jpg", kind="image").endswith(".mp4")
    assert media.find("c.jpg", kind="image").endswith(f"{where}/c.gif")  # as in OCR-VQA
    assert media.unfound == {("a",): "video", ("a.mp4",): "video", ("b.jpg",): "image"}
