"""A file for each section of the configuration. Fields are documented here alone; docs/configuration.md is generated."""
