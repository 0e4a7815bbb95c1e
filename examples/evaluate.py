"""Measure how often the pipeline's answers equal those of a list, by kind of question, and print a table.

    python examples/evaluate.py --model demo/model demo/data/validation.json demo/data/long.json

Each list is in the LLaVA-Video format; its rows may have `kinds`, the kind of each question. Every question is asked
on its own. "guessing" is the accuracy of the most frequent answer. Each core has a process with the model.
"""

import argparse
import json
from collections import Counter, defaultdict
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path

from transformers import pipeline

from transformers_ma2mba import conversation_to_messages


def load(model: str):
    """Load the pipeline of this process."""
    global qa
    qa = pipeline("video-question-answering", model=model)


def ask(path: Path, row: dict) -> list[tuple[str, str, str]]:
    """Return the kind, the right answer and the given answer of each question of a row."""
    messages = conversation_to_messages(row)
    questions, expected = (
        [message["content"][-1]["text"] for message in messages if message["role"] == role]
        for role in ("user", "assistant")
    )
    given = qa.watch(str(path.parent / row["video"]), progress=False).ask(questions)
    kinds = row.get("kinds", [""] * len(questions))
    return [(*pair, entry["answer"]) for *pair, entry in zip(kinds, expected, given, strict=True)]


def evaluate(pool: Executor, path: Path) -> dict[str, dict[str, float]]:
    """Return accuracy and guessing rate of each kind of question, and of all questions under "all"."""
    answers = defaultdict(list)
    for answered in pool.map(partial(ask, path), json.loads(path.read_text())):
        for kind, right, given in answered:
            answers[kind].append((right, given))
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
    stems = Counter(path.stem for path in args.files)
    names = [path.stem if stems[path.stem] == 1 else str(path) for path in args.files]
    with ProcessPoolExecutor(initializer=load, initargs=(args.model,)) as pool:
        results = {name: evaluate(pool, path) for name, path in zip(names, args.files, strict=True)}
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
