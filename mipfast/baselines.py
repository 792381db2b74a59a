"""Another name for `mipfast.edit.baselines`."""

from mipfast.edit.baselines import *  # noqa: F403
