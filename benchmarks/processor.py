"""Seconds that the processor takes for the text of a two-hour film: 7,200 frames of 144 placeholders.

    python benchmarks/processor.py

The frames are tensors of the right size, so nothing is decoded or resized. The tokenizer alone, on the same text with
every placeholder written out, is the comparison. Writes `benchmarks/results/processor.json`.
"""

import json
import time

import torch
from common.recording import describe_run, new_parser, publish
from transformers import pipeline

import transformers_ma2mba  # noqa: F401  registers the pipeline

SECONDS, TOKENS_PER_FRAME = 7200, 144


def measure() -> dict:
    """Return the seconds of the processor and of the tokenizer, whose ids must be the same."""
    processor = pipeline("video-question-answering").processor
    processor.tokens_per_frame = TOKENS_PER_FRAME
    frames = torch.zeros(SECONDS, 3, 8, 8, dtype=torch.uint8)
    content = [{"type": "video", "video": frames}, {"type": "text", "text": "Which shape appears?"}]
    messages = [{"role": "user", "content": content}]
    messages += [{"role": "assistant", "content": "circle"}, {"role": "user", "content": "And then?"}] * 10
    messages += [{"role": "assistant", "content": "square"}]

    start = time.perf_counter()
    inputs = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"do_resize": False},
    )
    ours = time.perf_counter() - start
    placeholders = int((inputs["input_ids"] == processor.video_token_id).sum())

    text = processor.apply_chat_template(messages)
    text = text.replace(processor.video_token, processor.video_token * placeholders)
    start = time.perf_counter()
    written_out = processor.tokenizer(text)["input_ids"]
    stock = time.perf_counter() - start
    assert written_out == inputs["input_ids"][0].tolist()
    return {
        "placeholders": placeholders,
        "seconds": round(ours, 3),
        "seconds_of_the_tokenizer_alone_with_placeholders_written_out": round(stock, 3),
        **describe_run(__file__, threads=torch.get_num_threads(), packages=["tokenizers", "torch", "transformers"]),
    }


def main():
    publish(new_parser(__doc__).parse_args(), "processor", measure, lambda results: json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
