"""`vptm env`."""

from __future__ import annotations

from vptm.terminal import print_columns


def env() -> None:
    """Show versions, devices and what runs where.

    For every operation: the implementation it will use here, and why.

    \b
    Example:
      vptm env
    """
    from vptm.inspection.environment import machine_rows
    from vptm.training.facts import package_versions

    versions = [(name, found or "not installed") for name, found in package_versions().items()]
    print_columns([*versions, *machine_rows()])
