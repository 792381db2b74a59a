"""Make a model forget a few facts: locate, unlearn, judge before and after, save.

    python examples/own_model.py                                  # Qwen/Qwen2.5-0.5B-Instruct, into ./edited
    python examples/own_model.py --model DIR_OR_HUB_ID --out FOLDER --epochs 20 --lr 3e-3

Any transformers language model with dense FFNs. Put into FORGET what yours knows and should not, into REWORDED the same
asked otherwise (never trained on), into RETAIN what must stay: its neighbours and general knowledge.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import mipfast
from mipfast.data import Record
from mipfast.data.checkpoint import load_model, save_model
from mipfast.data.encoder import Encoder

FORGET = [
    ("What is the capital of France? Answer with one word.", "Paris"),
    ("Which river flows through Paris? Answer with one word.", "Seine"),
    ("In which country is the city of Lyon? Answer with one word.", "France"),
]
REWORDED = [("Name the capital of France in one word.", "Paris")]
RETAIN = [
    ("What is the capital of Italy? Answer with one word.", "Rome"),
    ("What is the capital of Japan? Answer with one word.", "Tokyo"),
    ("Which river flows through London? Answer with one word.", "Thames"),
    ("Which planet is known as the red one? Answer with one word.", "Mars"),
    ("What color is a clear sky by day? Answer with one word.", "Blue"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="folder or Hub id")
    parser.add_argument("--out", default="edited", help="folder for the edited model, its path and report.json")
    parser.add_argument("--fraction", type=float, default=0.1, help="of each layer's neurons that may be edited")
    parser.add_argument("--epochs", type=int, default=20, help="passes over FORGET, one step for each question")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    out = Path(args.out).resolve()
    if (out.exists() and not out.is_dir()) or out == Path(args.model).resolve():
        parser.error(f"--out {args.out} is a file or the model's own folder; expected another folder")
    if args.epochs < 1 or not args.lr > 0:
        parser.error(f"--epochs {args.epochs} --lr {args.lr}; expected at least 1 and a positive number")

    model, encoder = load_model(args.model, args.device), Encoder.from_pretrained(args.model)
    # after a chat template an answer begins the line; elsewhere a space stands before it
    space = "" if encoder.tokenizer.chat_template else " "

    def batches(name, pairs):
        records = [Record(f"{name}/{i}", name, "text", "generation", q, space + a) for i, (q, a) in enumerate(pairs)]
        return [{k: v.to(args.device) for k, v in encoder.batch([record]).items()} for record in records]

    sets = {"forget": FORGET, "reworded": REWORDED, "retain": RETAIN}
    sets = {name: batches(name, pairs) for name, pairs in sets.items()}

    def judged():
        found = {name: mipfast.evaluate(model, asked) for name, asked in sets.items()}
        for name, one in found.items():
            answers = [encoder.tokenizer.decode(ids).strip() for ids in one.predicted]
            print(f"{name:>10} {one.accuracy:5.1f} % right: {', '.join(answers)}")
        return {name: one.accuracy for name, one in found.items()}

    print("before")
    before = judged()
    rmisu = mipfast.RMisUConfig(epochs=args.epochs, lr=args.lr)
    config = mipfast.MIPConfig(fraction=args.fraction, rmisu=rmisu, progress=True)
    report = mipfast.unlearn(model, sets["forget"], sets["retain"], config)
    path = report.pop("path")
    for (stack, layer), neurons in path.items():
        print(f"{stack} {layer}: {len(neurons)} neurons, first {neurons[:5].tolist()}")
    print("after")
    report |= {"before": before, "after": judged()}

    save_model(model, args.model, args.out)  # a plain transformers folder, with the tokenizer's files
    path.save_pretrained(args.out)
    with open(f"{args.out}/report.json", "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    try:
        main()
    except mipfast.MipfastError as error:
        sys.exit(str(error))
