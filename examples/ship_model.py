"""Copy the demo's model into the package as the checkpoint that the task loads when none is named.

    python examples/ship_model.py --model demo/model --accuracy demo/accuracy.json --output_dir checkpoint

Writes weights, processor and a model card that lists the model's questions and accuracy.
"""

import argparse
import json
import textwrap
from pathlib import Path

from make_videos import QUESTIONS
from transformers import AutoModel, AutoProcessor

import transformers_ma2mba  # noqa: F401  registers the classes

ACCURACY = (
    "It was trained on clips of 8 to 20 seconds, and then on films of 8 seconds to two hours. Accuracy on questions "
    "about films that it has not seen, asked one by one: {counts}. The most frequent answer alone gets at most "
    "{guessing:.2f} of a kind right."
)
COLUMNS = {"validation": "clips", "long": "films of 80 seconds", "hours": "films of two hours"}
CARD = """\
---
library_name: transformers
pipeline_tag: video-text-to-text
license: apache-2.0
---
# The toy model of `transformers_ma2mba`

The pipeline loads this checkpoint when no model is named, so that the first try works offline. It has {parameters}
parameters, sees frames of {size} x {size} pixels once a second, and was made by `make demo` on two CPU cores.

**It can** answer these questions, in these words, about films made by `examples/make_videos.py`:

{questions}

{accuracy}

{table}

**It cannot** answer anything else. Every other film or question gets an answer from the same short list, however
confident its score: it has never seen a real video and knows no other words. For those, name a model of your own.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--accuracy", type=Path, required=True, help="the figures that examples/evaluate.py wrote")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()

    model = AutoModel.from_pretrained(args.model)
    results = json.loads(args.accuracy.read_text())
    columns = {title: results[name] for name, title in COLUMNS.items()}
    rows = [
        f"| {kind} |" + "".join(f" {result[kind]['accuracy']:.3f} |" for result in columns.values())
        for kind in results["validation"]
    ]
    accuracy = ACCURACY.format(
        counts=", ".join(f"{result['all']['questions']} about {title}" for title, result in columns.items()),
        guessing=max(kind["guessing"] for kind in results["validation"].values()),
    )
    card = CARD.format(
        parameters=f"{model.num_parameters() / 1e6:.2f}M",
        size=model.config.vision_config.image_size,
        questions="\n".join(
            f"- {question} ({', '.join(choices[:-1])} or {choices[-1]})" for question, choices in QUESTIONS.values()
        ),
        accuracy=textwrap.fill(accuracy, width=119),
        table="\n".join([f"| kind | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns), *rows]),
    )
    model.save_pretrained(args.output_dir)
    AutoProcessor.from_pretrained(args.model).save_pretrained(args.output_dir)
    (args.output_dir / "README.md").write_text(card)
    total = sum(file.stat().st_size for file in args.output_dir.iterdir())
    print(f"{total / 1e6:.2f} MB in {args.output_dir}")


if __name__ == "__main__":
    main()
