"""bench/evidence as its tests import it, and the demo's base with few test questions."""

import sys
from dataclasses import replace
from pathlib import Path

from mipfast.demo import run

sys.path.append(str(Path(__file__).parents[1] / "bench" / "evidence"))

import cells  # noqa: E402
import findings  # noqa: E402
import page  # noqa: E402
import probes  # noqa: E402

__all__ = ["cells", "findings", "page", "probes", "small_base"]
LOAD = run.load_base


def small_base():
    """`run.load_base` whose test questions are those about forget set 0's people and every thirtieth other one."""
    base, encoder = LOAD()
    world = encoder.world
    forget = world.split(0).forget_people
    asked = [q for i, q in enumerate(world.questions) if not q.test or q.subject in forget or i % 30 == 0]
    encoder.world = replace(world, questions=asked)
    return base, encoder
