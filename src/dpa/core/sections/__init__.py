"""A file for each section of the configuration. Fields are documented once, here, for docs/configuration.md."""
