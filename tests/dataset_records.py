"""Small files in the forms of public data sets, with the rows that they stand for.

Each entry of `DATA_SETS` has the files of a list by their names, the videos and images by theirs, and the rows: `id`,
the names of their files, their clips, and the texts of their turns. What a row has beside these is in `more`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

CHOICE = "Please provide your answer by stating the letter followed by the full option."


@dataclass
class Expected:
    files: list[str]
    turns: list[str]
    id: str | None = None
    start: list | None = None
    end: list | None = None
    system: str | None = None
    more: dict = field(default_factory=dict)


@dataclass
class DataSet:
    lists: dict[str, object]
    media: list[str]
    rows: list[Expected]
    folder: str | None = None

    def write(self, path: Path) -> list[Path]:
        """Write the lists, each as its suffix says, and return their paths."""
        for name, content in self.lists.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            lines = content if name.endswith(".jsonl") else [content]
            (path / name).write_text("\n".join(map(json.dumps, lines)))
        return [path / name for name in self.lists]


def turns(*texts: str) -> list[dict]:
    """A conversation in which human and assistant alternate."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def asked(question: str, options: list[str], letter: str) -> list[str]:
    """The turns of a question with options, in the form of LLaVA-Video-178K."""
    lines = [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options)]
    return ["\n".join([question, *lines, CHOICE]), f"{lines[ord(letter) - ord('A')]}."]


COLOURS = ["red", "blue", "green"]
WHICH = asked("Which colour?", COLOURS, "B")
CHOSEN = {"candidates": COLOURS, "answer": "B"}

DATA_SETS = {
    "LLaVA-Pretrain": DataSet(
        {
            "blip_laion_cc_sbu_558k.json": [
                {"id": "004539375", "image": "00453/004539375.jpg", "conversations": turns("Who?\n<image>", "red")},
                {"id": "004539376", "image": "00453/004539376.jpg", "conversations": turns("<image>\nWhy?", "blue")},
            ]
        },
        ["00453/004539375.jpg", "00453/004539376.jpg"],
        [
            Expected(["00453/004539375.jpg"], ["Who?\n<image>", "red"], "004539375"),
            Expected(["00453/004539376.jpg"], ["<image>\nWhy?", "blue"], "004539376"),
        ],
    ),
    # Lists in folders, three of them about the same video; <image> stands for the video; videos in the parent.
    "LLaVA-Video-178K": DataSet(
        {
            "0_30_s_academic_v0_1/0_30_s_academic_mc_v0_1_qa_processed.json": [
                {
                    "id": "mc",
                    "conversations": turns(
                        f"<image>\nWhich?\nA. Black\nB. Red\n{CHOICE}", "B. Red.", "Who?\nA. I\nB. You\nLetter.", "A."
                    ),
                    "data_source": "0_30_s_academic_v0_1",
                    "video": "academic_source/youcook2/split_2.mp4",
                },
            ],
            "0_30_s_academic_v0_1/0_30_s_academic_oe_v0_1_qa_processed.json": [
                {
                    "id": "oe",
                    "conversations": turns("<image>\nWhy?", "green"),
                    "data_source": "0_30_s_academic_v0_1",
                    "video": "academic_source/youcook2/split_2.mp4",
                },
                {"id": "other", "conversations": turns("<image>\nWhy?", "red"), "video": "academic_source/other.mp4"},
            ],
            "0_30_s_academic_v0_1/0_30_s_academic_v0_1_cap_processed.json": [
                {
                    "id": "cap",
                    "conversations": turns("<image>\nTell.", "A dog."),
                    "video": "academic_source/other.mp4",
                },
            ],
        },
        ["academic_source/youcook2/split_2.mp4", "academic_source/other.mp4"],
        [
            Expected(
                ["academic_source/youcook2/split_2.mp4"],
                [
                    *(f"<video>\nWhich?\nA. Black\nB. Red\n{CHOICE}", "B. Red.", "Who?\nA. I\nB. You\nLetter.", "A."),
                    *("Why?", "green"),
                ],
                "mc",
            ),
            Expected(["academic_source/other.mp4"], ["<video>\nWhy?", "red", "Tell.", "A dog."], "other"),
        ],
    ),
    "SceneWalk of IVLLab": DataSet(
        {
            "train.jsonl": [
                {
                    "id": f"segment_{i}",
                    "url": "https://www.youtube.com/watch?v=zukEQgbWdsY&t=1",
                    "time_stamp": {
                        "duration": 25,
                        "end_fps": 25,
                        "end_frame": 25 * (i + 1),
                        "end_time": f"00:00:0{i + 1}.000",
                        "start_fps": 25,
                        "start_frame": 25 * i,
                        "start_time": f"00:00:0{i}.000",
                    },
                    "v2t_score": [0.5],
                    "t2t_score": [0.5],
                    "conversations": turns("<image>\nTell.", text),
                }
                for i, text in enumerate(["red", "blue"])
            ]
        },
        ["zukEQgbWdsY.webm"],
        [
            Expected(["zukEQgbWdsY.webm"], ["<video>\nTell.", text], f"segment_{i}", [float(i)], [i + 1.0])
            for i, text in enumerate(["red", "blue"])
        ],
    ),
    # `start_frame` and the like as SALOVA's training code reads them.
    "SceneWalk of interlive": DataSet(
        {
            "data/train.jsonl": [
                {
                    "id": "walk",
                    "video": "yt_01/walk.mp4",
                    "total_time": 2.0,
                    "clip_num": 2,
                    "scenes": [
                        {"start_frame": 0, "end_frame": 4, "start_fps": 4.0, "end_fps": 4.0},
                        {"start_frame": 4, "end_frame": 8, "start_fps": 4.0, "end_fps": 4.0},
                    ],
                    "conversations": turns("<image>\nTell.", "red", "<image>\nTell.", "blue"),
                },
                {
                    "id": "whole",
                    "video": "yt_01/whole.mp4",
                    "total_time": 2.0,
                    "clip_num": 2,
                    "scenes": [{"start": 0, "end": 1}, {"start": 1, "end": 2}],
                    "conversations": turns("<image>\nWhy?", "green"),
                },
            ]
        },
        ["videos/yt_01/walk.mp4", "videos/yt_01/whole.mp4"],
        [
            Expected(["walk.mp4"], ["<video>\nTell.", "red"], "walk", [0.0], [1.0], more={"duration": 2.0}),
            Expected(["walk.mp4"], ["<video>\nTell.", "blue"], "walk", [1.0], [2.0], more={"duration": 2.0}),
            Expected(["whole.mp4"], ["<video>\nWhy?", "green"], "whole", more={"duration": 2.0}),
        ],
        folder="videos",
    ),
    "VideoChat2-IT": DataSet(
        {
            "video/train.json": [
                {
                    "video": "a.mp4",
                    "QA": [{"i": "Be brief.", "q": "Who?", "a": "red"}, {"i": "Be brief.", "q": "Why?", "a": "blue"}],
                    "start": 0.5,
                    "end": 1.5,
                },
                {"video": "b.mp4", "QA": [{"i": "Describe the video.", "q": "", "a": "A dog."}]},
            ],
            "image/train.json": [{"image": "c.png", "QA": [{"i": "", "q": "Who?", "a": "red"}]}],
        },
        ["a.mp4", "b.mp4", "c.png"],
        [
            Expected(["a.mp4"], ["Who?", "red", "Why?", "blue"], None, [0.5], [1.5], system="Be brief."),
            Expected(["b.mp4"], ["", "A dog."], system="Describe the video."),
            Expected(["c.png"], ["Who?", "red"]),
        ],
    ),
    "ActivityNet-QA": DataSet(
        {
            "train_a.json": [
                {"answer": "yes", "type": 3, "question_id": "v_one_2"},
                {"answer": "red", "type": 0, "question_id": "v_one_1"},
                {"answer": 2, "type": 7, "question_id": "v_two_1"},
            ],
            "train_q.json": [
                {"question": "Who?", "video_name": "one", "question_id": "v_one_1"},
                {"question": "Is it?", "video_name": "one", "question_id": "v_one_2"},
                {"question": "How many?", "video_name": "v_two", "question_id": "v_two_1"},
            ],
        },
        ["v_one.mkv", "v_two.mp4"],
        [
            Expected(["v_one.mkv"], ["Who?", "red", "Is it?", "yes"], "v_one_1"),
            Expected(["v_two.mp4"], ["How many?", "2"], "v_two_1"),
        ],
    ),
    "NExT-QA as LLaVA-Video-178K has it": DataSet(
        {
            "0_30_s_nextqa/0_30_s_nextqa_mc_qa_processed.json": [
                {
                    "id": "4010069381_1",
                    "conversations": turns(f"<image>\nWhich colour?\nA. red.\nB. blue.\n{CHOICE}", "B. blue."),
                    "data_source": "0_30_s_nextqa",
                    "video": "NExTQA/NExTVideo/1164/4010069381.mp4",
                }
            ]
        },
        ["NExTQA/NExTVideo/1164/4010069381.mp4"],
        [
            Expected(
                ["NExTQA/NExTVideo/1164/4010069381.mp4"],
                [f"<video>\nWhich colour?\nA. red.\nB. blue.\n{CHOICE}", "B. blue."],
                "4010069381_1",
            )
        ],
    ),
    "Video-MME": DataSet(
        {
            "videomme.json": [
                {
                    "video_id": "001",
                    "duration": "short",
                    "domain": "Knowledge",
                    "sub_category": "Science",
                    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
                    "videoID": "fFjv93ACGo8",
                    "question_id": "001-1",
                    "task_type": "Counting",
                    "question": "Which colour?",
                    "options": ["A. red", "B. blue", "C. green"],
                    "answer": "B",
                }
            ]
        },
        ["videos/data/fFjv93ACGo8.mp4"],
        [Expected(["fFjv93ACGo8.mp4"], WHICH, "001-1", more=CHOSEN)],
    ),
    "LongVideoBench": DataSet(
        {
            "validation.json": [
                {
                    "video_id": "86CxyhFV9MI",
                    "id": "86CxyhFV9MI_0",
                    "video_path": "86CxyhFV9MI.mp4",
                    "subtitle_path": "86CxyhFV9MI_en.json",
                    "correct_choice": 1,
                    "question": "Which colour?",
                    **{f"option{i}": option for i, option in enumerate([*COLOURS, None, None])},
                    "duration": 190.16,
                    "duration_group": 600,
                    "question_category": "TOS",
                    "topic_category": "NP-News-Programs",
                }
            ]
        },
        ["videos/86CxyhFV9MI.mp4"],
        [Expected(["86CxyhFV9MI.mp4"], WHICH, "86CxyhFV9MI_0", more={**CHOSEN, "duration": 190.16})],
        folder="videos",
    ),
    "MLVU": DataSet(
        {
            "1_plotQA.json": [
                {
                    "video": "movie101_66.mp4",
                    "duration": 480,
                    "question": "Which colour?",
                    "candidates": COLOURS,
                    "answer": "blue",
                    "question_type": "plotQA",
                }
            ]
        },
        ["video/1_plotQA/movie101_66.mp4"],
        [Expected(["movie101_66.mp4"], WHICH, more={**CHOSEN, "duration": 480.0})],
    ),
    "LVBench": DataSet(
        {
            "test.json": [
                {
                    "uid": "164",
                    "question": "Which colour?\n(A) red\n(B) blue\n(C) green",
                    "answer": "B",
                    "question_type": ["key information retrieval"],
                    "time_reference": "00:15-00:19",
                    "video_path": "Cm73ma6Ibcs.mp4",
                    "video_info": {"fps": 25.0, "duration_minutes": 30.0},
                }
            ]
        },
        ["Cm73ma6Ibcs.mp4"],
        [Expected(["Cm73ma6Ibcs.mp4"], WHICH, "164", more=CHOSEN)],
    ),
    "EgoSchema": DataSet(
        {
            "subset.json": [
                {
                    "question_idx": "0",
                    "question": "Which colour?",
                    "video_idx": "001934bb-81bd-4cd8-a574-0472ef3f6678",
                    "option": ["A. red", "B. blue", "C. green"],
                    "answer": "1",
                }
            ]
        },
        ["videos/001934bb-81bd-4cd8-a574-0472ef3f6678.mp4"],
        [Expected(["001934bb-81bd-4cd8-a574-0472ef3f6678.mp4"], WHICH, more=CHOSEN)],
    ),
    "MVBench": DataSet(
        {
            "json/action_sequence.json": [
                {
                    "video": "ZS9XR.mp4",
                    "question": "Which colour?",
                    "candidates": COLOURS,
                    "answer": "blue",
                    "start": 0.5,
                    "end": 1.5,
                }
            ],
            "json/moving_count.json": [
                {"video": "video_1.mp4", "question": "How many?", "candidates": ["1", "0", "2"], "answer": "0"}
            ],
        },
        ["video/star/Charades_v1_480/ZS9XR.mp4", "video/clevrer/video_1.mp4"],
        [
            Expected(["ZS9XR.mp4"], WHICH, None, [0.5], [1.5], more=CHOSEN),
            Expected(["video_1.mp4"], asked("How many?", ["1", "0", "2"], "B"), more={"answer": "B"}),
        ],
        folder="video",
    ),
    "TempCompass": DataSet(
        {
            "multi-choice.json": {
                "1089494": {
                    "action": [{"question": "Which colour?\nA. red\nB. blue\nC. green", "answer": "B. blue"}],
                    "speed": [{"question": "Is it?", "answer": "yes"}],
                },
                "1089495": {"order": [{"question": "Why?", "answer": "no"}]},
            }
        },
        ["1089494.mp4", "1089495.mp4"],
        [
            Expected(["1089494.mp4"], [*WHICH, "Is it?", "yes"]),
            Expected(["1089495.mp4"], ["Why?", "no"]),
        ],
    ),
    "VideoChatGPT": DataSet(
        {
            "generic_qa.json": [{"Q": "Who?", "A": "A dog.", "video_name": "v_p1QGn0IzfW0"}],
            "consistency_qa.json": [{"Q1": "Why?", "Q2": "How?", "A": "red", "video_name": "v_p1QGn0IzfW0"}],
        },
        ["Test_Videos/v_p1QGn0IzfW0.mkv"],
        [Expected(["v_p1QGn0IzfW0.mkv"], ["Who?", "A dog.", "Why?", "red", "How?", "red"])],
    ),
}
