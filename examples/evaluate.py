"""Measure how often the pipeline's answers equal those of a list, by kind of question, and print a table.

    python examples/evaluate.py --model demo/model demo/data/validation.json demo/data/long.json

Each list is in the LLaVA-Video format; its rows may have `kinds`, the kind of each question. Every question is asked
on its own. "guessing" is the accuracy of the most frequent answer.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

from transformers import pipeline

from transformers_ma2mba import conversation_to_messages


def evaluate(qa, path: Path) -> dict[str, dict[str, float]]:
    """Return accuracy and guessing rate of each kind of question, and of all questions under "all"."""
    answers = defaultdict(list)
    rows = json.loads(path.read_text())
    for row in rows:
        messages = conversation_to_messages(row)
        questions, expected = (
            [message["content"][-1]["text"] for message in messages if message["role"] == role]
            for role in ("user", "assistant")
        )
        given = qa.watch(str(path.parent / row["video"]), progress=False).ask(questions)
        for kind, right, entry in zip(row.get("kinds", [""] * len(questions)), expected, given, strict=True):
            answers[kind].append((right, entry["answer"]))
    results = {}
    for kind, pairs in sorted(answers.items()):
        most_frequent = Counter(right for right, _ in pairs).most_common(1)[0][1]
        results[kind] = {
            "accuracy": sum(right == answer for right, answer in pairs) / len(pairs),
            "guessing": most_frequent / len(pairs),
            "questions": len(pairs),
        }
    total = sum(result["questions"] for result in results.values())
    results["all"] = {
        name: sum(result[name] * result["questions"] for result in results.values()) / total
        for name in ("accuracy", "guessing")
    }
    results["all"]["questions"] = total
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output_file", type=Path, help="where to write the figures as JSON")
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    qa = pipeline("video-question-answering", model=args.model)
    stems = Counter(path.stem for path in args.files)
    names = [path.stem if stems[path.stem] == 1 else str(path) for path in args.files]
    results = {name: evaluate(qa, path) for name, path in zip(names, args.files, strict=True)}
    if args.output_file:
        args.output_file.write_text(json.dumps(results, indent=1) + "\n")

    first = next(iter(results.values()))
    print("| kind | guessing |" + "".join(f" {name} |" for name in results))
    print("| --- | ---: |" + " ---: |" * len(results))
    for kind in first:
        row = "".join(f" {result[kind]['accuracy']:.3f} |" for result in results.values())
        print(f"| {kind} | {first[kind]['guessing']:.3f} |{row}")


if __name__ == "__main__":
    main()
