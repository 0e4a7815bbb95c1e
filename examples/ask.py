"""Answer questions about a video file.

python examples/ask.py film.mp4 "Which shape appears?" "Which way does the ball move?" --model demo/model
"""

import argparse

from transformers import pipeline

import transformers_ma2mba  # noqa: F401  registers the pipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--model", help="a checkpoint (default: the tiny one that ships with the package)")
    args = parser.parse_args()
    qa = pipeline("video-question-answering", model=args.model)
    for question, entry in zip(args.questions, qa(video=args.video, question=args.questions), strict=True):
        print(f"{question} {entry['answer']} ({entry['score']:.2f})")


if __name__ == "__main__":
    main()
