"""Another name for `mipfast.scoring.cost`."""

from mipfast.scoring.cost import *  # noqa: F403
