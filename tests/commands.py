"""The `mipfast` command inside this process."""

import io
import re
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

from mipfast import cli


def invoke(arguments):
    """(exit_code, output without colours) of a command line as a shell has them."""
    output, code = io.StringIO(), 0
    with redirect_stdout(output), redirect_stderr(output), mock.patch("sys.argv", ["mipfast", *map(str, arguments)]):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(exit_code=code, output=re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue()))
