"""The `vptm` command: thin readings of options around public functions."""
