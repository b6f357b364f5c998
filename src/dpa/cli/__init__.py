"""The doors: the `dpa` command."""
