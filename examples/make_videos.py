"""Write .mp4 films with questions that no single frame can answer, in the LLaVA-Video format.

    python examples/make_videos.py --output_dir demo/data

Each film has five events, each at its own time and place, and six kinds of question about them:

    top left      a white shape appears for a while       what: which shape?   when: at the start, middle or end?
    top right     a ball comes, crosses and goes          direction: which way?
    bottom left   two to four coloured blocks, in turn    first: which colour?
    bottom right  a lamp blinks                           count: how often?
    whole frame   a coloured flash of one second          flash: which colour?

Six lists have rows of `video`, `conversations` (human and gpt turns, one question of each kind) and `kinds`:

    train.json         clips of 8 to 20 seconds
    train_minutes.json films of 8 seconds to ten minutes
    train_hours.json   films of 8 seconds to two hours
    validation.json    clips of 8 to 20 seconds
    long.json          films of 80 seconds
    hours.json         films of two hours

All are H.264, and lengths are uniform on a logarithmic scale. The films of `train_minutes.json` and `train_hours.json`
have a variable frame rate: a frame for each change of the picture, as in recordings of a screen, so that thousands of
them are written and read in seconds. The others have all frames. The same seed gives the same files. To train on real
data, give `examples/train.py` a list of the same format.
"""

import argparse
import json
import math
import random
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

SIDE = 128  # pixels
FPS = 2  # frames per second of the files; the model looks once a second
COLOURS = {"red": (230, 60, 50), "green": (60, 200, 80), "blue": (70, 110, 240), "yellow": (240, 210, 60)}
QUESTIONS = {
    "what": ("Which shape appears?", ("circle", "square", "triangle", "cross")),
    "when": ("When does the shape appear?", ("start", "middle", "end")),
    "direction": ("Which way does the ball move?", ("left", "right", "up", "down")),
    "first": ("Which colour comes first?", tuple(COLOURS)),
    "count": ("How often does the lamp blink?", ("once", "twice", "three times", "four times")),
    "flash": ("Which colour is the flash?", tuple(COLOURS)),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def plan_film(seconds: int, answers: dict[str, str], rng: random.Random) -> dict:
    """Choose the time of each event in whole seconds, such that `answers` are right."""
    shown = rng.randint(2, 3)
    earliest, latest = {
        "start": (0, 0),
        "middle": (2, seconds - shown - 2),
        "end": (seconds - shown, seconds - shown),
    }[answers["when"]]
    shape_start = rng.randint(earliest, latest)
    moving = rng.randint(6, 8)
    ball_start = rng.randint(0, seconds - moving)
    # A model that judges age by how far a trace has faded learns nothing that holds for hours. The number of blocks,
    # and colours that come again, mislead it.
    places = range(0, seconds - 2, 3)
    block_starts = sorted(rng.sample(places, rng.randint(2, min(4, len(places)))))
    block_colours = [answers["first"]]
    while len(block_colours) < len(block_starts):
        block_colours.append(rng.choice([colour for colour in COLOURS if colour != block_colours[-1]]))
    blinks = QUESTIONS["count"][1].index(answers["count"]) + 1
    return {
        "seconds": seconds,
        "shape": (answers["what"], shape_start, shape_start + shown),
        "ball": (answers["direction"], ball_start, ball_start + moving),
        "blocks": list(zip(block_colours, block_starts, strict=True)),
        # at most every other second, so that two blinks never merge
        "blinks": rng.sample(range(0, seconds, 2), blinks),
        "flash": (answers["flash"], rng.randrange(seconds)),
        "texture": rng.randrange(2**32),
    }


def paint(film: dict):
    """Return a function from seconds to the picture that the film then shows, `(SIDE, SIDE, 3)` uint8."""
    half = SIDE // 2
    rows, columns = np.mgrid[:half, :half]  # of one quarter of the frame
    x = y = half // 2
    disc = (columns - x) ** 2 + (rows - y) ** 2
    bars = (abs(columns - x) <= 6) | (abs(rows - y) <= 6)
    shapes = {
        "circle": disc <= 22**2,
        "square": (abs(columns - x) <= 20) & (abs(rows - y) <= 20),
        "triangle": (rows >= y - 22) & (rows <= y + 20) & (abs(columns - x) <= (rows - (y - 22)) * 0.55),
        "cross": (abs(columns - x) <= 22) & (abs(rows - y) <= 22) & bars,
    }
    texture = np.random.default_rng(film["texture"]).integers(20, 40, size=(SIDE // 8, SIDE // 8, 1), dtype=np.uint8)
    background = texture.repeat(8, 0).repeat(8, 1).repeat(3, 2)

    def picture(seconds: float) -> np.ndarray:
        frame = background.copy()
        top_left, top_right = frame[:half, :half], frame[:half, half:]
        bottom_left, bottom_right = frame[half:, :half], frame[half:, half:]
        bottom_right[disc <= 20**2] = 70  # the lamp is visible when it is off, too
        if film["flash"][1] == int(seconds):
            frame[:] = COLOURS[film["flash"][0]]
        shape, start, end = film["shape"]
        if start <= seconds < end:
            top_left[shapes[shape]] = 245
        for colour, start in film["blocks"]:
            if start <= seconds < start + 3:
                bottom_left[shapes["square"]] = COLOURS[colour]
        if int(seconds) in film["blinks"]:
            bottom_right[disc <= 20**2] = (255, 250, 225)
        direction, start, end = film["ball"]
        if start <= seconds < end:
            step_x, step_y = DIRECTIONS[direction]
            # From -1 to 1: the ball rests for a second on one side, crosses, and rests on the other.
            way = min(max((seconds - start - 1) / (end - start - 3), 0), 1) * 2 - 1
            ball = (columns - x - step_x * way * 15) ** 2 + (rows - y - step_y * way * 15) ** 2 <= 15**2
            top_right[ball] = (250, 150, 60)
        return frame

    return picture


def changes(film: dict) -> list[float]:
    """Return the times, in seconds, at which a film may show another picture than before."""
    times = {0}
    for _, start, end in (film["shape"], *((colour, start, start + 3) for colour, start in film["blocks"])):
        times |= {start, end}
    for start in (*film["blinks"], film["flash"][1]):
        times |= {start, start + 1}
    _, start, end = film["ball"]
    times |= {start + step / FPS for step in range((end - start) * FPS + 1)}
    return sorted(time for time in times if 0 <= time < film["seconds"])


def render(film: dict):
    """Yield the frames of a film at `FPS`, `(SIDE, SIDE, 3)` uint8; one that does not change is the same array."""
    picture, times = paint(film), set(changes(film))
    for index in range(film["seconds"] * FPS):
        if index / FPS in times:
            frame = picture(index / FPS)
        yield frame


def write_film(path: Path, film: dict, variable_rate: bool = False):
    """Write the film as H.264, with all frames at `FPS` or, at a variable rate, the frames at which it changes."""
    if variable_rate:
        picture = paint(film)
        end = film["seconds"] - 1 / FPS  # the time of the last frame tells how long the film is
        frames = ((round(time * FPS), picture(time)) for time in sorted({*changes(film), end}))
    else:
        frames = enumerate(render(film))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.thread_count = 1
        for index, pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_split(
    output_dir: Path, seed: int, name: str, count: int, lengths: tuple[int, int], variable_rate: bool = False
) -> list:
    """Write the rows of one split, and return arguments of `write_film` for its films.

    The answers of each kind are as balanced as possible.
    """
    rng = random.Random(f"{seed}/{name}")
    answers = {}
    for kind, (_, choices) in QUESTIONS.items():
        answers[kind] = [choices[i % len(choices)] for i in range(count)]
        rng.shuffle(answers[kind])
    rows, jobs = [], []
    for i in range(count):
        film_answers = {kind: answers[kind][i] for kind in QUESTIONS}
        # Lengths are uniform on a logarithmic scale, so that the model learns what also holds for longer films.
        seconds = round(math.exp(rng.uniform(*map(math.log, lengths))))
        film = plan_film(seconds, film_answers, rng)
        kinds = rng.sample(list(QUESTIONS), len(QUESTIONS))
        turns = []
        for kind in kinds:
            turns.append({"from": "human", "value": QUESTIONS[kind][0]})
            turns.append({"from": "gpt", "value": film_answers[kind]})
        turns[0]["value"] = "<video>\n" + turns[0]["value"]
        path = f"{name}/{i:05d}.mp4"
        rows.append({"id": f"{name}-{i:05d}", "video": path, "conversations": turns, "kinds": kinds})
        jobs.append((output_dir / path, film, variable_rate))
    (output_dir / name).mkdir(parents=True, exist_ok=True)
    (output_dir / f"{name}.json").write_text(json.dumps(rows, indent=1))
    return jobs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train", type=int, default=4000)
    parser.add_argument("--num_train_minutes", type=int, default=3000)
    parser.add_argument("--num_train_hours", type=int, default=1000)
    parser.add_argument("--num_validation", type=int, default=120)
    parser.add_argument("--num_long", type=int, default=60)
    parser.add_argument("--num_hours", type=int, default=24)
    parser.add_argument("--min_seconds", type=int, default=8)
    parser.add_argument("--max_seconds", type=int, default=20, help="of a clip; the long films take four times this")
    parser.add_argument("--max_minutes_seconds", type=int, default=600)
    parser.add_argument("--max_hours_seconds", type=int, default=7200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.min_seconds < 8:
        parser.error("--min_seconds must be at least 8, so that everything fits into a film")

    clips, minutes, up_to_hours = (
        (args.min_seconds, longest) for longest in (args.max_seconds, args.max_minutes_seconds, args.max_hours_seconds)
    )
    long, hours = (4 * args.max_seconds,) * 2, (args.max_hours_seconds,) * 2
    split = partial(make_split, args.output_dir, args.seed)
    jobs = [
        *split("hours", args.num_hours, hours),  # first, because they take longest
        *split("train", args.num_train, clips),
        *split("train_minutes", args.num_train_minutes, minutes, variable_rate=True),
        *split("train_hours", args.num_train_hours, up_to_hours, variable_rate=True),
        *split("validation", args.num_validation, clips),
        *split("long", args.num_long, long),
    ]
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(write_film, *zip(*jobs, strict=True), chunksize=4):
            pass
    print(f"{len(jobs)} films with {len(QUESTIONS)} questions each in {args.output_dir}")


if __name__ == "__main__":
    main()
