"""`python -m dpa` is `dpa`."""

from dpa.cli import main

main()
