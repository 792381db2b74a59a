"""SmolLM2-135M-Instruct as a plain transformers folder, for `make real`; whoever runs it asked for the download."""

import argparse
import logging
from pathlib import Path

from mipfast.demo import smollm2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made; left alone where it holds a model already")
    folder = parser.parse_args().folder
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(smollm2.WHAT)
    smollm2.fetch(folder)


if __name__ == "__main__":
    main()
