"""`python -m mipfast` is the `mipfast` command."""

from mipfast.cli import main

main()
