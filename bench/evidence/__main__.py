"""What docs/evidence shows: every method, control, attack and ablation on the demo's model.

    python bench/evidence                      forget sets 0-2 into ./evidence-report, as in docs/evidence
    python bench/evidence --seeds 0 --out DIR  one forget set elsewhere

Half an hour on two cores, one thread, and some minutes more for each forget set's retrained reference. OUT/README.md
has every table and picture, OUT/report.html the same in one file, OUT/report.json the numbers; OUT/cells holds what is
finished, OUT/references the models that were trained from nothing without the forget people. Killed at any moment, the
same command goes on. Changed settings make only their own cells again; after a change of code remove OUT. Needs
pip install '.[data,eval]'. The short form is `mipfast demo`.
"""

import argparse
import logging
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from mipfast.errors import MipfastError


def main() -> None:
    parser = argparse.ArgumentParser(
        "python bench/evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="forget sets, by number; 0 1 2")
    parser.add_argument(
        "--out", type=Path, default=Path("evidence-report"), help="folder for all of it; evidence-report"
    )
    args = parser.parse_args()
    if missing := [module for module in ("PIL", "matplotlib") if find_spec(module) is None]:
        raise MipfastError(f"{' and '.join(missing)} not found; run: pip install '.[data,eval]'")
    import page
    from cells import SEEDS, run_full
    from transformers.utils import logging as notices

    from mipfast.demo.report import accuracy_table
    from mipfast.experiment.page import Bullets, terminal

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("mipfast").setLevel(logging.INFO)
    notices.set_verbosity_error()
    notices.disable_progress_bar()
    torch.set_num_threads(1)  # two threads on shared cores were up to ten times slower than one
    results = run_full(args.seeds or SEEDS, args.out, progress=sys.stderr.isatty())
    written = page.write(results, args.out)
    console = Console()
    console.print(terminal([accuracy_table(results), Bullets(results["limits"])]))
    console.print(f"{results['seconds']['all']:.0f} s. Tables and pictures: {written}", markup=False)


if __name__ == "__main__":
    try:
        main()
    except MipfastError as error:
        sys.exit(f"error: {error}")
