"""Write small data for the paper's three stages of training (§3.5), each in the format of a public data set.

    python examples/make_stages.py --output_dir stages/data

The films are those of `make_videos.py`. Their captions consist of the answers that its questions have.

    stage1.json              pictures with a caption, as in LLaVA-Pretrain
    stage1_5/segments.jsonl  segments of films of one to ten minutes, each with a caption, as in SceneWalk
    stage2/                  films of 8 seconds to three minutes with questions, in folders, as in LLaVA-Video-178K
    validation.json          films of three minutes with the same questions
    test.json                films of ten minutes, longer than those of stage 2

The same seed gives the same files.
"""

import argparse
import json
import math
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import make_videos
from PIL import Image

FOLDERS = {"0_30_s": (8, 30), "30_60_s": (30, 60), "1_2_m": (60, 120), "2_3_m": (120, 180)}  # of LLaVA-Video-178K


def plan(rng: random.Random, seconds: int) -> tuple[dict, dict[str, str]]:
    """Return a film with random answers, and the answers."""
    answers = {kind: rng.choice(choices) for kind, (_, choices) in make_videos.QUESTIONS.items()}
    return make_videos.plan_film(seconds, answers, rng), answers


def events(film: dict) -> list[tuple[int, int, str]]:
    """Return the first and last second, the latter excluded, and the name of each event of a film, in order."""
    shape, *shown = film["shape"]
    direction, *moving = film["ball"]
    colour, flash = film["flash"]
    found = [(*shown, shape), (*moving, direction), (flash, flash + 1, f"flash {colour}")]
    found += [(start, start + 3, colour) for colour, start in film["blocks"]]
    return sorted(found + [(start, start + 1, "blink") for start in film["blinks"]])


def caption(film: dict, start: int, end: int) -> str:
    """Name the events that begin in a part of a film, in order."""
    return ", ".join(name for begin, _, name in events(film) if start <= begin < end) or "nothing"


def cut(film: dict, rng: random.Random) -> list[tuple[int, int]]:
    """Cut a film into segments of 10 to 60 seconds, none of which begins while the ball moves."""
    _, ball_start, ball_end = film["ball"]
    borders = [0]
    while film["seconds"] - borders[-1] > 60:
        border = borders[-1] + rng.randint(10, 60)
        borders.append(ball_end if ball_start < border < ball_end else border)
    return list(zip(borders, [*borders[1:], film["seconds"]], strict=True))


def write_pictures(folder: Path, count: int, rng: random.Random):
    """Write pictures at the times of events, with the events' names, as in LLaVA-Pretrain."""
    rows = []
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        film, _ = plan(rng, 20)
        seen = [event for event in events(film) if event[2] not in make_videos.DIRECTIONS]  # one picture has none
        time, _, _ = rng.choice(seen)
        names = [name for start, end, name in seen if start <= time < end]
        path = f"images/{i:05d}.png"
        Image.fromarray(make_videos.paint(film)(time)).save(folder / path)
        question = rng.choice(["<image>\nName everything.", "Name everything.\n<image>"])
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": ", ".join(names)}]
        rows.append({"id": f"{i:05d}", "image": path, "conversations": turns})
    (folder / "stage1.json").write_text(json.dumps(rows, indent=1))


def plan_segments(folder: Path, count: int, rng: random.Random) -> list:
    """Write the rows of captioned segments, as in SceneWalk, and return arguments of `write_film`."""
    lines, jobs = [], []
    for i in range(count):
        film, _ = plan(rng, round(math.exp(rng.uniform(math.log(60), math.log(600)))))
        name = f"film{i:05d}"
        for start, end in cut(film, rng):
            turns = [
                {"from": "human", "value": "<video>\nName everything."},
                {"from": "gpt", "value": caption(film, start, end)},
            ]
            stamp = {"duration": end - start, "start_time": start, "end_time": end}
            lines.append(json.dumps({"id": name, "time_stamp": stamp, "conversations": turns}))
        jobs.append((folder / "stage1_5" / f"{name}.mp4", film, True))
    (folder / "stage1_5").mkdir()
    (folder / "stage1_5" / "segments.jsonl").write_text("\n".join(lines) + "\n")
    return jobs


def plan_questions(folder: Path, count: int, rng: random.Random) -> list:
    """Write rows of one question each, as in LLaVA-Video-178K, and return arguments of `write_film`."""
    jobs = []
    for name, lengths in FOLDERS.items():
        rows, path = [], folder / "stage2" / f"{name}_toy_v0_1"
        for i in range(count // len(FOLDERS)):
            film, answers = plan(rng, rng.randint(*lengths))
            video = f"toy/{i:05d}.mp4"
            for kind in rng.sample(list(answers), len(answers)):
                turns = [
                    {"from": "human", "value": f"<image>\n{make_videos.QUESTIONS[kind][0]}"},  # sic, as there
                    {"from": "gpt", "value": answers[kind]},
                ]
                row = {"id": f"{name}-{i:05d}-{kind}", "data_source": path.name, "video": video}
                rows.append({**row, "conversations": turns})
            jobs.append((path / video, film, True))
        path.mkdir(parents=True)
        (path / f"{path.name}_oe_processed.json").write_text(json.dumps(rows, indent=1))
    return jobs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_pictures", type=int, default=4000)
    parser.add_argument("--num_segmented", type=int, default=200)
    parser.add_argument("--num_questioned", type=int, default=1000)
    parser.add_argument("--num_validation", type=int, default=40)
    parser.add_argument("--num_test", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    folder, rng = args.output_dir, random.Random(f"{args.seed}/stages")
    write_pictures(folder, args.num_pictures, rng)
    jobs = plan_segments(folder, args.num_segmented, rng)
    jobs += plan_questions(folder, args.num_questioned, rng)
    jobs += make_videos.make_split(folder, args.seed, "validation", args.num_validation, (180, 180), True)
    jobs += make_videos.make_split(folder, args.seed, "test", args.num_test, (600, 600), True)
    for path, _, _ in jobs:
        path.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(make_videos.write_film, *zip(*jobs, strict=True), chunksize=4):
            pass
    print(f"{args.num_pictures} pictures and {len(jobs)} films in {folder}")


if __name__ == "__main__":
    main()
