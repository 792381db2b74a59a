"""Another name for `mipfast.judge.accuracy` and `mipfast.judge.records`."""

from mipfast.judge.accuracy import *  # noqa: F403
from mipfast.judge.records import *  # noqa: F403
