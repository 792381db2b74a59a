"""The arithmetic: one file an op, with its checks, its four backends, its torch.library registration and its gradient.

`mipfast.ops.reference` has every op in plain torch. Nothing else in mipfast calls `mipfast_kernels` or `mipfast._C`.
"""

# All of them here, and now: an op bears the name of its file, and whoever imports that file first binds the name to it.
from mipfast.ops.backends import backend
from mipfast.ops.misdirection_loss import misdirection_loss
from mipfast.ops.project_accumulate import project_accumulate
from mipfast.ops.riemann_accumulate import riemann_accumulate
from mipfast.ops.riemann_interpolate import riemann_interpolate
from mipfast.ops.riemann_project import riemann_project
from mipfast.ops.swiglu import swiglu

__all__ = [
    "backend",
    "misdirection_loss",
    "project_accumulate",
    "riemann_accumulate",
    "riemann_interpolate",
    "riemann_project",
    "swiglu",
]
