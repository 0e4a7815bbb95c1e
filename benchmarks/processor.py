"""How long the processor takes for the text of a two-hour film: 7,200 frames of 144 placeholders.

    python benchmarks/processor.py

Frames are given as they are, so that nothing is decoded or resized. Compared with what the tokenizer would need for
the same text with every placeholder written out. Writes `benchmarks/results/processor.json`.
"""

import json
import platform
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import AutoProcessor

from transformers_ma2mba.auto import DEFAULT_CHECKPOINT

SECONDS, TOKENS_PER_FRAME = 7200, 144


def main():
    processor = AutoProcessor.from_pretrained(DEFAULT_CHECKPOINT)
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

    results = {
        "placeholders": placeholders,
        "seconds": round(ours, 3),
        "seconds_of_the_tokenizer_alone_with_placeholders_written_out": round(stock, 3),
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": f"python {' '.join(sys.argv)}",
    }
    print(json.dumps(results, indent=1))
    (Path(__file__).parent / "results" / "processor.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
