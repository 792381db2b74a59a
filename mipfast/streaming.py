"""Another name for `mipfast.experiment.locate_file`."""

from mipfast.experiment.locate_file import *  # noqa: F403
