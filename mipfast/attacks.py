"""Another name for `mipfast.judge.attacks`."""

from mipfast.judge.attacks import *  # noqa: F403
