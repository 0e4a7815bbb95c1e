"""A two-hour film through the whole model on a GPU: one training step, and watching it; and then for a whole day.

    python benchmarks/film.py --device cuda                  # Video-Ma²mba-3.1B, random weights; ten minutes
    python benchmarks/film.py --device cuda --resume --parts watch --most_seconds 300

    train   forward, loss and backward of 7,200 frames with a question and an answer, the vision tower trained too,
            with MA-GC and checkpoints in host memory, without an optimizer; one of 128 frames before does not count
    watch   frames in pieces through vision tower and language model, the state carried from one to the next, and an
            answer to a question from a copy of the state at 10 minutes, 1, 2, 6, 12 and 24 hours of film, or as far as
            `--most_seconds` allow; the clock stops while it answers

The film has one frame a second. Its frames are noise, uint8 of the model's size in host memory, and few of them repeat
again and again: no decoding is measured here, which `breakdown.py` does. Memory is the peak above the loaded model.
Each part has a process of its own.

Writes `film.json` to `benchmarks/results`.
"""

import sys
import time
from collections.abc import Iterator

import torch
from recording import (
    PeakMemory,
    Record,
    describe_environment,
    gigabytes,
    print_rows,
    reasons,
    run_benchmark,
    table,
    worker_rows,
)
from training_step import TINY, base_job, base_parser, goes_by_method, hold_to_limit, parse

PARTS = ["train", "watch"]
HOUR = 3600
FILMS = {"train": 2 * HOUR, "watch": [600, HOUR, 2 * HOUR, 6 * HOUR, 12 * HOUR, 24 * HOUR]}
TINY_FILMS = {"train": 6, "watch": [4, 8, 12]}
TEXT_TOKENS, ANSWER_TOKENS = 16, 8
DIFFERENT_FRAMES = 480
WARM_UP_FRAMES = {"cpu": 2, "cuda": 128}
FRAMES_PER_PIECE = 48  # of 144 tokens: as many as the language model takes at once
MEMORY_BUDGET = "24GiB"  # for the language model's activations: frames, their features and gradients take more


def load_model(job: dict):
    """`Ma2mbaForVideoQA` with random weights, in the size of the job's preset or a tiny one."""
    from transformers import CLIPVisionConfig, Mamba2Config

    from transformers_ma2mba import Ma2mbaConfig, Ma2mbaForVideoQA

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    device = torch.device(job["device"])
    hold_to_limit(device)
    if job["preset"]:
        config = Ma2mbaConfig.from_preset(job["preset"])
    else:
        sizes = dict(hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3)
        vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
        tokens = dict(image_token_id=TINY["vocab_size"] - 2, video_token_id=TINY["vocab_size"] - 1)
        config = Ma2mbaConfig(vision_config=vision, text_config=Mamba2Config(**TINY), **tokens)
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    with device:
        model = Ma2mbaForVideoQA(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def random_frames(model, num_frames: int) -> torch.Tensor:
    """`(num_frames, 3, size, size)` uint8 in host memory."""
    size = model.config.vision_config.image_size
    frames = torch.randint(256, (min(num_frames, DIFFERENT_FRAMES), 3, size, size), dtype=torch.uint8)
    return frames.repeat(-(-num_frames // len(frames)), 1, 1, 1)[:num_frames]


def random_text(model, num_tokens: int) -> torch.Tensor:
    """`(1, num_tokens)` without placeholders."""
    highest = min(model.config.image_token_id, model.config.video_token_id)
    return torch.randint(highest, (1, num_tokens), device=model.device)


def measure_train(job: dict) -> Iterator[dict]:
    """One step on the film."""
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
        wait_for(model)
        start = time.perf_counter()
        loss = model(input_ids=input_ids, pixel_values_videos=frames, labels=labels).loss
        loss.backward()
        wait_for(model)
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
    """A row at each mark of the film, and one where time is up."""
    from transformers_ma2mba.recurrent_state import copy_cache

    model = load_model(job)
    frames = random_frames(model, DIFFERENT_FRAMES if job["preset"] else 12)
    per_piece = job["frames_per_piece"]
    question = random_text(model, TEXT_TOKENS)

    def see(piece, cache):
        features = model.get_video_features(piece).pooler_output
        inputs_embeds = features.reshape(1, -1, features.shape[-1])
        return model(inputs_embeds=inputs_embeds, cache_params=cache, use_cache=True, logits_to_keep=1).cache_params

    def answer(cache) -> tuple[float, bool]:
        wait_for(model)
        start = time.perf_counter()
        input_ids, cache, finite = question, copy_cache(cache), True
        for _ in range(ANSWER_TOKENS):
            outputs = model(input_ids=input_ids, cache_params=cache, use_cache=True, logits_to_keep=1)
            input_ids, cache = outputs.logits[:, -1].argmax(-1, keepdim=True), outputs.cache_params
            finite &= bool(outputs.logits.isfinite().all())
        return time.perf_counter() - start, finite

    with torch.no_grad():
        answer(see(frames[:per_piece], None))
        peak, cache, num_frames, seconds = PeakMemory(model.device), None, 0, 0.0
        for mark in job["film"]:
            wait_for(model)
            start = time.perf_counter()
            before = seconds
            while num_frames < mark and (cache is None or seconds < job["most_seconds"]):
                first = num_frames % len(frames)
                piece = frames[first : first + min(per_piece, mark - num_frames)]
                cache = see(piece, cache)
                num_frames += len(piece)
                # The device lags behind this clock by a piece or two; at the marks it is waited for.
                seconds = before + time.perf_counter() - start
            wait_for(model)
            seconds = before + time.perf_counter() - start
            row = {"film_seconds": num_frames, "seconds": round(seconds, 2), **peak.read()}
            answer_seconds, finite = answer(cache)
            row |= {"frames_per_second": round(num_frames / seconds, 1), "answer_seconds": round(answer_seconds, 3)}
            yield {**row, "finite": finite}
            if num_frames < mark:
                return


def wait_for(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def measure_part(record: Record, part: str, job: dict) -> None:
    """Adds the rows of a part that the record lacks; those of a film that time did not allow say so."""
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


def duration(seconds: int) -> str:
    if seconds < 600:
        return f"{seconds} seconds"
    return f"{seconds / 60:g} minutes" if seconds < HOUR else f"{seconds / HOUR:.3g} hours"


def report(results: dict) -> str:
    """The results as a Markdown page."""
    name = f"Video-Ma²mba-{results['job']['preset'].upper()}" if results["job"]["preset"] else "A tiny Video-Ma²mba"
    lines = []
    for row in results["rows"]:
        cells = ["–"] * 7
        if "seconds" in row:
            host = gigabytes(row["host_bytes"]) if "host_bytes" in row else "–"
            without = row["peak_bytes"] - row.get("gradient_bytes", 0)
            cells = [f"{row['seconds']:.1f}", f"{row['frames_per_second']:,.0f}", gigabytes(row["peak_bytes"])]
            cells += [gigabytes(without), host]
            cells += [f"{row['answer_seconds']:.2f} s" if "answer_seconds" in row else f"loss {row['loss']:.3f}"]
            cells += ["yes" if row["finite"] else "**no**"]
        what = {"train": "training step", "watch": "watching"}[row["part"]]
        lines.append([f"{what}, {duration(row['film_seconds'])}", *cells])
    header = ["film", "seconds", "frames/s", "peak above the model, GB", "of it beyond gradients", "host"]
    settings = ", ".join(f"{name}={value}" for name, value in results["job"]["ma_gc"].items())
    text = [
        f"{name}, random weights, {results['job']['dtype']}, a frame a second of film. The training step is forward, "
        f"loss and backward of the whole film, everything trained, with MA-GC ({settings}). Watching carries the "
        "state from piece to piece; times and peaks are from its beginning. Answers come from copies of the state.",
        "",
        *table([*header, f"{ANSWER_TOKENS} tokens of answer", "finite"], lines),
        "",
        *reasons(results["rows"]),
        describe_environment(results),
        "",
    ]
    return "\n".join(text)


def main():
    parser = base_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: both")
    parser.add_argument("--most_seconds", type=float, default=400.0, help="to watch for (default: %(default)s)")
    parser.add_argument("--frames_per_piece", type=int, default=FRAMES_PER_PIECE, help="default: %(default)s")
    arguments = parse(parser)
    if arguments.worker:
        job = arguments.worker
        print_rows({"train": measure_train, "watch": measure_watch}[job["part"]](job))
        return
    if not goes_by_method(arguments):
        sys.exit("This is about a GPU: --device cuda, or --tiny to rehearse it.")
    job = {name: value for name, value in base_job(arguments).items() if name not in ("shape", "step")}
    job["preset"] = arguments.preset or (None if arguments.tiny else "3.1b")
    job["ma_gc"] = {"memory_budget": None if arguments.tiny else MEMORY_BUDGET, "offload": True, **job["ma_gc"]}
    job["frames_per_piece"] = 3 if arguments.tiny else arguments.frames_per_piece

    def measure(record: Record):
        for part in arguments.parts:
            film = (TINY_FILMS if arguments.tiny else FILMS)[part]
            measure_part(record, part, {**job, "film": film, "most_seconds": arguments.most_seconds})

    run_benchmark(arguments, __file__, "film", {"job": job}, measure, report, keys=("part", "film_seconds"))


if __name__ == "__main__":
    main()
