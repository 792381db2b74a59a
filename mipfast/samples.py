"""Another name for `mipfast.data.checkpoint` and `mipfast.data.encoder`."""

from mipfast.data.checkpoint import *  # noqa: F403
from mipfast.data.encoder import *  # noqa: F403
