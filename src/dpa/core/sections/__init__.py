"""A file each section of the configuration. Fields are documented once, here; docs/configuration.md is made of it."""
