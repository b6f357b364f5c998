"""From rated files to a configuration that runs: what `dpa init` does."""
