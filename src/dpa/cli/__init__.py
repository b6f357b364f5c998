"""The `dpa` command."""
