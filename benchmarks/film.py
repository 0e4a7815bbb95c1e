"""A two-hour film through the whole model on a GPU: one training step, and watching it, then watching a whole day.

    python benchmarks/film.py --device cuda                  # Video-Ma²mba-3.1B, random weights; ten minutes
    python benchmarks/film.py --device cuda --resume --parts watch --most_seconds 300

    train   forward, loss and backward of 7,200 frames with a question and an answer, without an optimizer; everything
            is trained, with MA-GC and checkpoints in host memory. A step of 128 frames before does not count.
    watch   pieces of frames go through vision tower and language model, which carry the state from piece to piece; at
            10 minutes, 1, 2, 6, 12 and 24 hours of film a copy of the state answers a question. `--most_seconds`
            limits the time; the clock stops during answers.

The film has one frame a second. Its frames are noise, uint8 of the model's size in host memory, and few of them repeat
again and again: `breakdown.py` measures the decoding. Memory is the peak above the loaded model. Each part has a
process of its own.

Writes `film.json` to `benchmarks/results`.
"""

import time
from collections.abc import Iterator

import torch
from common.memory_use import PeakMemory, gigabytes
from common.options import base_job, base_parser, parse_step
from common.recording import Record, describe_environment, page, reasons, run_benchmark, table, worker_rows
from common.video_model import (
    DIFFERENT_FRAMES,
    HOUR,
    duration,
    load_model,
    random_frames,
    random_text,
    synchronize,
    watch_piece,
)

FILMS = {"train": 2 * HOUR, "watch": [600, HOUR, 2 * HOUR, 6 * HOUR, 12 * HOUR, 24 * HOUR]}  # seconds
TINY_FILMS = {"train": 6, "watch": [4, 8, 12]}
TEXT_TOKENS, ANSWER_TOKENS = 16, 8
WARM_UP_FRAMES = {"cpu": 2, "cuda": 128}
FRAMES_PER_PIECE = 48  # of 144 tokens: as many as the language model takes at once
MEMORY_BUDGET = "24GiB"  # for the language model's activations: frames, their features and gradients take more


def measure_train(job: dict) -> Iterator[dict]:
    """Yield the row of one training step on the film."""
    model = load_model(job).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=job["ma_gc"])

    def step(frames) -> tuple[float, float]:
        num_tokens = len(frames) * model.config.tokens_per_frame
        video = torch.full((1, num_tokens), model.config.video_token_id, device=model.device)
        answer = random_text(model, ANSWER_TOKENS)
        question = random_text(model, TEXT_TOKENS)
        input_ids = torch.cat([random_text(model, TEXT_TOKENS), video, question, answer], dim=1)
        labels = torch.full_like(input_ids, -100)
        labels[:, -ANSWER_TOKENS:] = answer
        synchronize(model)
        start = time.perf_counter()
        loss = model(input_ids=input_ids, pixel_values_videos=frames, labels=labels).loss
        loss.backward()
        synchronize(model)
        return time.perf_counter() - start, loss.item()

    num_frames = job["film"]
    frames = random_frames(model, num_frames)
    row = {"film_seconds": num_frames}
    try:
        step(frames[: WARM_UP_FRAMES[job["device"]]])
        model.zero_grad(set_to_none=True)
        peak = PeakMemory(model.device)
        seconds, loss = step(frames)
    except torch.OutOfMemoryError:
        yield {**row, "skipped": "out of memory"}
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    vision = [parameter.grad for parameter in model.model.vision_tower.parameters() if parameter.grad is not None]
    yield {
        **row,
        **peak.read(),
        "seconds": round(seconds, 2),
        "frames_per_second": round(num_frames / seconds, 1),
        "tokens": num_frames * model.config.tokens_per_frame + 2 * TEXT_TOKENS + ANSWER_TOKENS,
        "gradient_bytes": sum(gradient.nbytes for gradient in gradients),
        "loss": loss,
        "finite": loss == loss and all(bool(gradient.isfinite().all()) for gradient in gradients),
        "vision_weights_with_gradients": sum(bool(gradient.any()) for gradient in vision),
    }


def measure_watch(job: dict) -> Iterator[dict]:
    """Yield a row at each mark of the film, and a last one when the time is up."""
    from transformers_ma2mba.mamba2.recurrent_state import copy_cache

    model = load_model(job)
    frames = random_frames(model, DIFFERENT_FRAMES if job["preset"] else 12)
    per_piece = job["frames_per_piece"]
    question = random_text(model, TEXT_TOKENS)

    def answer(cache) -> tuple[float, bool]:
        synchronize(model)
        start = time.perf_counter()
        input_ids, cache, finite = question, copy_cache(cache), True
        for _ in range(ANSWER_TOKENS):
            outputs = model(input_ids=input_ids, cache_params=cache, use_cache=True, logits_to_keep=1)
            input_ids, cache = outputs.logits[:, -1].argmax(-1, keepdim=True), outputs.cache_params
            finite &= bool(outputs.logits.isfinite().all())
        return time.perf_counter() - start, finite

    with torch.no_grad():
        answer(watch_piece(model, frames[:per_piece], None))
        peak, cache, num_frames, seconds = PeakMemory(model.device), None, 0, 0.0
        for mark in job["film"]:
            synchronize(model)
            start = time.perf_counter()
            before = seconds
            while num_frames < mark and (cache is None or seconds < job["most_seconds"]):
                first = num_frames % len(frames)
                piece = frames[first : first + min(per_piece, mark - num_frames)]
                cache = watch_piece(model, piece, cache)
                num_frames += len(piece)
                # The device lags behind this clock by a piece or two; the marks wait for it.
                seconds = before + time.perf_counter() - start
            synchronize(model)
            seconds = before + time.perf_counter() - start
            row = {"film_seconds": num_frames, "seconds": round(seconds, 2), **peak.read()}
            answer_seconds, finite = answer(cache)
            row |= {"frames_per_second": round(num_frames / seconds, 1), "answer_seconds": round(answer_seconds, 3)}
            yield {**row, "finite": finite}
            if num_frames < mark:
                return


MEASUREMENTS = {"train": measure_train, "watch": measure_watch}


def measure_one(job: dict) -> Iterator[dict]:
    """Yield the rows of the job's part."""
    return MEASUREMENTS[job["part"]](job)


def measure_part(record: Record, part: str, job: dict) -> None:
    """Add the rows of a part that the record lacks. Marks that the time did not allow are added as skipped."""
    marks = [job["film"]] if part == "train" else job["film"]
    missing = [mark for mark in marks if not record.has(part=part, film_seconds=mark)]
    for row in worker_rows(__file__, {**job, "part": part}) if missing else ():
        film_seconds = row.get("film_seconds", missing[0])
        if film_seconds in missing or film_seconds not in marks:
            record.add({"part": part, "film_seconds": film_seconds, **row})
            print(f"{part}, {duration(film_seconds)} of film: {row}", flush=True)
        missing = [mark for mark in missing if mark != film_seconds]
        if film_seconds not in marks:
            for mark in missing:
                record.add({"part": part, "film_seconds": mark, "skipped": f"{job['most_seconds']} seconds were over"})


def report(results: dict) -> str:
    """Return the results as a Markdown page."""
    name = f"Video-Ma²mba-{results['job']['preset'].upper()}" if results["job"]["preset"] else "A tiny Video-Ma²mba"
    lines = []
    for row in results["rows"]:
        cells = ["–"] * 7
        if "seconds" in row:
            cells = [
                f"{row['seconds']:.1f}",
                f"{row['frames_per_second']:,.0f}",
                gigabytes(row["peak_bytes"]),
                gigabytes(row["peak_bytes"] - row.get("gradient_bytes", 0)),
                gigabytes(row["host_bytes"]) if "host_bytes" in row else "–",
                f"{row['answer_seconds']:.2f} s" if "answer_seconds" in row else f"loss {row['loss']:.3f}",
                "yes" if row["finite"] else "**no**",
            ]
        part = {"train": "training step", "watch": "watching"}[row["part"]]
        lines.append([f"{part}, {duration(row['film_seconds'])}", *cells])
    header = ["film", "seconds", "frames/s", "peak above the model, GB", "beyond gradients", "host"]
    settings = ", ".join(f"{name}={value}" for name, value in results["job"]["ma_gc"].items())
    return page(
        f"{name}, random weights, {results['job']['dtype']}, a frame a second of film. The training step is forward, "
        f"loss and backward of the whole film, everything trained, with MA-GC ({settings}). Watching carries the "
        "state from piece to piece; times and peaks are from its beginning. Answers come from copies of the state.",
        table([*header, f"{ANSWER_TOKENS} tokens of answer", "finite"], lines),
        reasons(results["rows"]),
        describe_environment(results),
    )


def main():
    parser = base_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), help="default: both")
    parser.add_argument("--most_seconds", type=float, default=400.0, help="limit of watching (default: %(default)s)")
    parser.add_argument("--frames_per_piece", type=int, default=FRAMES_PER_PIECE, help="default: %(default)s")
    arguments = parse_step(parser, measure_one)
    job = {name: value for name, value in base_job(arguments).items() if name not in ("shape", "step")}
    job["preset"] = arguments.preset or (None if arguments.tiny else "3.1b")
    job["ma_gc"] = {"memory_budget": None if arguments.tiny else MEMORY_BUDGET, "offload": True, **job["ma_gc"]}
    job["frames_per_piece"] = 3 if arguments.tiny else arguments.frames_per_piece

    def measure(record: Record) -> None:
        for part in arguments.parts:
            film = (TINY_FILMS if arguments.tiny else FILMS)[part]
            measure_part(record, part, {**job, "film": film, "most_seconds": arguments.most_seconds})

    run_benchmark(arguments, __file__, "film", {"job": job}, measure, report, keys=("part", "film_seconds"))


if __name__ == "__main__":
    main()
