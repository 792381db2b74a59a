"""Another name for `mipfast.judge.metrics`."""

from mipfast.judge.metrics import *  # noqa: F403
