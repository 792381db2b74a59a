"""Train what the demo ships: the base, and one retrained reference for each of the forget sets 0-2.

python bench/train_demo.py [--out mipfast/demo/weights]      about 5 minutes a model on one core
"""

import argparse
from pathlib import Path

import torch

from mipfast.demo import model as tiny
from mipfast.demo import people, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=run.WEIGHTS)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    world = people.build(seed=0)
    encoder = tiny.Encoder(world, tiny.build_tokenizer(world), tiny.image_processor_class()())
    splits = {"base": None} | {f"retrained-{s}": world.split(s, run.REFERENCE_RATIO) for s in run.REFERENCE_SEEDS}
    for name, split in splits.items():
        model = tiny.build_model(len(encoder.tokenizer))
        tiny.train(model, encoder, split)
        tiny.save(model, encoder, out / name)


if __name__ == "__main__":
    main()
