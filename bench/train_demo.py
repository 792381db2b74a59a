"""Train the base that the demo ships.

python bench/train_demo.py [--out mipfast/demo/weights]      about 5 minutes on one core
"""

import argparse
from pathlib import Path

import torch

from mipfast.demo import model as tiny
from mipfast.demo import people, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=run.WEIGHTS, help="folder for base/")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    world = people.build(seed=0)
    tiny.trained(tiny.Encoder(world, tiny.build_tokenizer(world), tiny.image_processor_class()()), None, out / "base")


if __name__ == "__main__":
    main()
