"""Records of public data sets as rows of one form.

`rows_of` recognises a record by its fields. A row is what the collator takes:

    {"id": str, "video": [path, …], "image": [path, …], "start": [seconds, …], "end": [seconds, …], "fps": float,
     "duration": seconds, "conversations": [{"from": "human" | "gpt" | "system", "value": str}, …],
     "candidates": [str, …], "answer": str}

Every row has all of these keys, with None for whatever it lacks. `start` and `end` have an entry for each video.
`fps` belongs to a folder of frames. `candidates` and `answer` are those of a question with options, for evaluation.
"""

import math
import re
from collections.abc import Callable, Mapping
from numbers import Real
from urllib.parse import parse_qs, urlsplit

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
# LLaVA-Video-178K ends its multiple-choice questions so when the answer repeats the option.
CHOICE_PROMPT = "Please provide your answer by stating the letter followed by the full option."

# The fields of a question, by what they hold; the first that is there counts. Video-MME's video_id is no file name.
_VIDEO_FIELDS = ("videoID", "video_path", "video", "video_name", "video_idx", "video_id")
_OPTIONS_FIELDS = ("options", "option", "candidates")
_ID_FIELDS = ("question_id", "uid", "id")
_START_FIELDS = ("start", "start_time", "start_sec", "begin")
_END_FIELDS = ("end", "end_time", "end_sec", "stop")

_LETTER = re.compile(r"\s*\(?([A-Z])[.):]\s*(.*)", re.DOTALL)
_TIME = re.compile(r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d*)?)")

Find = Callable[..., str]


def rows_of(
    record: Mapping, find: Find = lambda *names, kind: names[0], answers: Mapping[str, object] | None = None
) -> list[dict]:
    """Convert a record of any known data set to rows.

    - LLaVA-Pretrain, LLaVA-Video-178K (with its NExT-QA and PerceptionTest) and IVLLab's SceneWalk: one row.
    - interlive's SceneWalk: a row for each scene, if it has a question and caption for each of them, as in SALOVA's
      training code; otherwise one row about the whole film.
    - VideoChat2-IT: one row of several questions. The instruction of the first is the system's turn, as in
      VideoChat2's training code.
    - Video-MME, LongVideoBench, MLVU, LVBench, EgoSchema, MVBench, and TempCompass: a row for each question.
      Questions with options have the form of LLaVA-Video-178K's: the question, the options as lines "A. …", and
      `CHOICE_PROMPT`, with "A. …." as the answer.
    - ActivityNet-QA and VideoChatGPT's benchmark: a row for each question.

    Args:
        record: an element of a JSON list, or a row of another file.
        find: called as `find(name, …, kind="video")`, or "image", with the names that a file may have; returns its
            path.
        answers: ActivityNet-QA's answers by `question_id`.

    Raises:
        ValueError: if the fields are those of no known data set, or one of them is malformed.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"A record must be an object with fields, got {_short(record)}.")
    record = {name: value for name, value in record.items() if not _is_missing(value)}
    for _, needed, read in SHAPES:
        if record.keys() >= needed:
            return read(record, find)
    if _is_temp_compass(record):
        return _temp_compass(record, find)
    if "question_id" in record and answers is not None:
        record = {"answer": answers.get(str(record["question_id"])), **record}
    if _has_question(record):
        return [_question(record, find)]
    raise ValueError(
        f"The fields {', '.join(map(str, record)) or '(none)'} are those of no known data set. Each needs: {_needs()}."
    )


def is_answer_record(record) -> bool:
    """Whether a record is an answer of ActivityNet-QA, whose questions are in another file."""
    return isinstance(record, Mapping) and {"answer", "question_id"} <= record.keys() and "question" not in record


def _conversation(record: dict, find: Find) -> list[dict]:
    return [_row(record, _turns(record), find)]


def _scenes(record: dict, find: Find) -> list[dict]:
    """The SceneWalk of interlive: turns 2i and 2i + 1 describe scene i."""
    turns, scenes = _turns(record), record["scenes"]
    record = {**record, "duration": record.get("total_time")}
    if not isinstance(scenes, (list, tuple)):
        raise ValueError(f"`scenes` must be a list, got {_short(scenes)}.")
    if len(turns) != 2 * len(scenes) or [turn["from"] for turn in turns] != ["human", "gpt"] * len(scenes):
        return [_row(record, turns, find)]
    return [_row({**record, **_clip_of(scene)}, turns[2 * i : 2 * i + 2], find) for i, scene in enumerate(scenes)]


def _segment(record: dict, find: Find) -> list[dict]:
    """The SceneWalk of IVLLab: one segment of the video that is named by its URL or its id."""
    names = [_name_in_url(str(record["url"]))] if "url" in record else []
    names += [record["id"]] if "id" in record else []
    if not names:
        raise ValueError("A segment needs a `url` or an `id`, which name its video.")
    clip = _clip_of(record["time_stamp"])
    path = find(*map(_as_name, names), kind="video")
    return [_row({**record, **clip, "video": path, "duration": None}, _turns(record), _same)]


def _video_chat(record: dict, find: Find) -> list[dict]:
    questions, turns = record["QA"], []
    if not isinstance(questions, (list, tuple)) or not questions:
        raise ValueError(f"`QA` must be a list of questions and answers, got {_short(questions)}.")
    for number, item in enumerate(questions):
        if not isinstance(item, Mapping) or _is_missing(item.get("a")):
            raise ValueError(f"Question {number + 1} of `QA` must have `q` and `a`, got {_short(item)}.")
        instruction, question = (_text(item.get(name) or "", name) for name in ("i", "q"))
        if number == 0 and instruction:
            turns.append({"from": "system", "value": instruction})
        elif number and not (question or instruction):
            raise ValueError(f"Question {number + 1} of `QA` has neither `q` nor `i`.")
        turns.append({"from": "human", "value": question or (instruction if number else "")})
        turns.append({"from": "gpt", "value": _text(item["a"], "a")})
    return [_row(record, turns, find)]


def _video_chat_gpt(record: dict, find: Find) -> list[dict]:
    """VideoChatGPT's benchmark. Its consistency part asks for one answer in two ways, Q1 and Q2."""
    questions = [record[name] for name in ("Q", "Q1", "Q2") if name in record]
    record = {**record, "answer": record["A"]}
    return [_question({**record, "question": question}, find) for question in questions]


def _is_temp_compass(record: dict) -> bool:
    return bool(record) and all(
        isinstance(aspects, Mapping)
        and aspects
        and all(isinstance(asked, (list, tuple)) for asked in aspects.values())
        for aspects in record.values()
    )


def _temp_compass(record: dict, find: Find) -> list[dict]:
    """TempCompass: questions by video and by aspect."""
    questions = [
        (video, question) for video, aspects in record.items() for asked in aspects.values() for question in asked
    ]
    for _, question in questions:
        if not isinstance(question, Mapping) or not {"question", "answer"} <= question.keys():
            raise ValueError(
                f"Each question of TempCompass must have `question` and `answer`, got {_short(question)}."
            )
    return [_question({**question, "video": video}, find) for video, question in questions]


def _has_question(record: dict) -> bool:
    return "question" in record and any(name in record for name in _VIDEO_FIELDS)


def _question(record: dict, find: Find) -> dict:
    """The row of one question, with or without options."""
    name = _as_name(_first(record, _VIDEO_FIELDS))
    # ActivityNet-QA leaves out the prefix of ActivityNet's files in its authors' files.
    also = [f"v_{name}"] if str(record.get("question_id", "")).startswith(f"v_{name}") else []
    question, answer = _text(record["question"], "question"), record.get("correct_choice", record.get("answer"))
    if _is_missing(answer):
        raise ValueError("The question has no answer: `answer` is missing, or in a file that was not given.")
    options = _first(record, _OPTIONS_FIELDS)
    if options is None:
        options = [record[f"option{i}"] for i in range(26) if f"option{i}" in record]
    if not options:
        question, options = _split_options(question)
    record = {**record, "video": find(name, *also, kind="video"), "id": _first(record, _ID_FIELDS)}
    if not options:
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": _text(answer, "answer")}]
        return _row(record, turns, _same)
    letter, options = _choose(options, answer, is_index="correct_choice" in record)
    lines = [f"{_letter(i)}. {option}" for i, option in enumerate(options)]
    answer = f"{letter}. {options[ord(letter) - ord('A')]}"
    turns = [
        {"from": "human", "value": "\n".join([question, *lines, CHOICE_PROMPT])},
        {"from": "gpt", "value": answer if answer.endswith(".") else f"{answer}."},
    ]
    return {**_row(record, turns, _same), "candidates": options, "answer": letter}


def _split_options(question: str) -> tuple[str, list[str]]:
    """Split the options off a question whose last lines are "A. …" or "(A) …", as in LVBench and TempCompass."""
    lines = question.split("\n")
    for first in range(1, len(lines) - 1):
        if _are_lettered(lines[first:]):
            return "\n".join(lines[:first]).strip(), lines[first:]
    return question, []


def _are_lettered(options: list[str]) -> bool:
    matches = map(_LETTER.fullmatch, options)
    return all(match and match[1] == _letter(i) for i, match in enumerate(matches))


def _choose(options, answer, is_index: bool) -> tuple[str, list[str]]:
    """Return the letter of the right option, and the options without letters of their own.

    The answer may be an option's text, letter or (from 0) number, in this order; but the letter comes before the text
    if the options have letters, as an option's text may be the letter of another one.
    """
    if not isinstance(options, (list, tuple)) or not 1 < len(options) <= 26:
        raise ValueError(f"The options must be a list of 2 to 26 texts, got {_short(options)}.")
    options = [_text(option, "option") for option in options]
    texts, given = options, _text(answer, "answer")
    if lettered := _are_lettered(options):
        texts = [_LETTER.fullmatch(option)[2].strip() for option in options]
    letter = re.fullmatch(r"\(?([A-Z])[.)]?", given)
    readings = [
        *([] if is_index else [_position(given, options)]),
        *([ord(letter[1]) - ord("A")] if letter and lettered else []),
        *([] if is_index else [_position(given, texts)]),
        *([ord(letter[1]) - ord("A")] if letter else []),
        *([int(given)] if re.fullmatch(r"\d{1,2}", given) else []),
    ]
    for index in readings:
        if index is not None and index < len(options):
            return _letter(index), texts
    raise ValueError(f"The answer {_short(answer)} is none of the options {_short(options)}.")


def _position(text: str, options: list[str]) -> int | None:
    if text in options:
        return options.index(text)
    folded = [option.casefold().rstrip(".") for option in options]
    text = text.casefold().rstrip(".")
    return folded.index(text) if folded.count(text) == 1 else None


def _letter(index: int) -> str:
    return chr(ord("A") + index)


def _row(record: dict, turns: list[dict], find: Find) -> dict:
    """A row with all keys, from a record's fields of their own names and the turns."""
    videos, images = (_paths(record.get(kind), kind, find) for kind in ("video", "image"))
    if (videos or images) and all(turn["from"] != "human" for turn in turns):
        raise ValueError("The conversation has no turn of a human to put the video or image into.")
    if any(turn["from"] == "gpt" and not turn["value"].strip() for turn in turns):
        raise ValueError("The conversation has an empty answer, which would teach the model to say nothing.")
    if bool(videos) != bool(images):
        # LLaVA-Video says <image> for a video.
        here, other = ("<video>", "<image>") if videos else ("<image>", "<video>")
        turns = [
            {**turn, "value": turn["value"].replace(other, here)} if turn["from"] == "human" else turn
            for turn in turns
        ]
    start, end = (_times(record.get(name), name, len(videos)) for name in ("start", "end"))
    fps, identifier = record.get("fps"), record.get("id")
    return {
        "id": None if _is_missing(identifier) else str(identifier).encode(errors="replace").decode(),
        "video": videos or None,
        "image": images or None,
        "start": start,
        "end": end,
        "fps": float(fps) if isinstance(fps, Real) and fps > 0 else None,
        "duration": _duration(record.get("duration")),
        "conversations": turns,
        "candidates": None,
        "answer": None,
    }


def _turns(record: dict) -> list[dict]:
    turns = record["conversations"]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise ValueError(f"`conversations` must be a list of turns, got {_short(turns)}.")
    for turn in turns:
        if not isinstance(turn, Mapping) or str(turn.get("from")) not in ROLES or _is_missing(turn.get("value")):
            raise ValueError(f"The turn {_short(turn)} must have `from`, human or gpt, and `value`, a text.")
    return [{"from": ROLES[turn["from"]], "value": _text(turn["value"], "value", strip=False)} for turn in turns]


def _paths(paths, kind: str, find: Find) -> list[str]:
    if _is_missing(paths) or paths == "":
        return []
    paths = paths if isinstance(paths, (list, tuple)) else [paths]
    return [find(_as_name(path, kind), kind=kind) for path in paths]


def _same(path: str, kind: str) -> str:
    return path


def _as_name(name, kind: str = "video") -> str:
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise ValueError(f"`{kind}` must be the name of a file, or a list of names, got {_short(name)}.")
    if not _is_unicode(str(name)):
        raise ValueError(f"`{kind}` has characters that are not UTF-8: {_short(name)}.")
    return str(name)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _name_in_url(url: str) -> str:
    parts = urlsplit(url)
    return next(iter(parse_qs(parts.query).get("v", [])), parts.path.rstrip("/").rpartition("/")[2])


def _clip_of(scene) -> dict:
    """Start and end of a scene: by seconds or time codes under their usual names, a pair, or frames and their rate."""
    if isinstance(scene, (list, tuple)) and len(scene) == 2:
        return {"start": scene[0], "end": scene[1]}
    if not isinstance(scene, Mapping):
        raise ValueError(f"A scene must have a start and an end, got {_short(scene)}.")
    clip = {"start": _first(scene, _START_FIELDS), "end": _first(scene, _END_FIELDS)}
    for name, time in clip.items():
        frame, rate = scene.get(f"{name}_frame"), scene.get(f"{name}_fps") or scene.get("fps")
        if time is None and isinstance(frame, Real) and isinstance(rate, Real) and rate > 0:
            clip[name] = frame / rate
        elif time is None:
            raise ValueError(f"The scene {_short(scene)} has no {name}: give start_time and end_time.")
    return clip


def _times(times, name: str, num_videos: int) -> list[float | None] | None:
    """The start or end of each video in seconds; None if none is cut."""
    times = list(times) if isinstance(times, (list, tuple)) else [times] * num_videos
    if num_videos and len(times) != num_videos:
        raise ValueError(f"`{name}` has {len(times)} times for {num_videos} videos.")
    seconds = [_seconds(time, name) for time in times[:num_videos]]
    return seconds if any(time is not None for time in seconds) else None


def _seconds(time, name: str) -> float | None:
    if _is_missing(time) or time == "" or time == math.inf:
        return None
    if isinstance(time, str) and (match := _TIME.fullmatch(time.strip())):
        hours, minutes, seconds = match.groups()
        return 3600.0 * int(hours or 0) + 60.0 * int(minutes or 0) + float(seconds)
    if isinstance(time, bool) or not isinstance(time, Real) or time < 0:
        raise ValueError(f"`{name}` must be seconds, or a time such as 00:01:23.5, got {_short(time)}.")
    return float(time)


def _duration(time) -> float | None:
    try:
        return _seconds(time, "duration")
    except ValueError:
        return None  # Video-MME's duration is "short", "medium" or "long"


def _text(text, name: str, strip: bool = True) -> str:
    if isinstance(text, Real) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str):
        raise ValueError(f"`{name}` must be a text, got {_short(text)}.")
    if not _is_unicode(text):
        raise ValueError(f"`{name}` has characters that are not UTF-8: {_short(text)}.")
    return text.strip() if strip else text


def _first(record: Mapping, names: tuple[str, ...]):
    return next((record[name] for name in names if not _is_missing(record.get(name))), None)


def _is_missing(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


# The data sets whose records have a form of their own, with the fields that they need.
SHAPES = (
    ("SceneWalk (interlive)", {"video", "scenes", "conversations"}, _scenes),
    ("SceneWalk (IVLLab)", {"time_stamp", "conversations"}, _segment),
    ("LLaVA-Pretrain, LLaVA-Video-178K", {"conversations"}, _conversation),
    ("VideoChat2-IT", {"QA"}, _video_chat),
    ("VideoChatGPT", {"Q", "A", "video_name"}, _video_chat_gpt),
    ("VideoChatGPT (consistency)", {"Q1", "Q2", "A", "video_name"}, _video_chat_gpt),
)
# The data sets of questions. One reader serves them all.
QUESTION_SHAPES = {
    "ActivityNet-QA": "video_name, question, question_id (and answer, question_id in a second file)",
    "Video-MME": "videoID, question, options, answer",
    "LongVideoBench": "video_path, question, option0 to option4 or candidates, correct_choice",
    "LVBench": "video_path, question, answer",
    "EgoSchema": "video_idx, question, option, answer",
    "MLVU, MVBench": "video, question, candidates, answer",
    "TempCompass": "a video's name with an object of lists of question, answer",
}


def _needs() -> str:
    own = [f"{name}: {', '.join(sorted(needed))}" for name, needed, _ in SHAPES]
    return "; ".join(own + [f"{name}: {needed}" for name, needed in QUESTION_SHAPES.items()])
