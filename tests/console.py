"""The `vptm` command, run in the process of a test."""

from __future__ import annotations

from typing import Any

import pytest

from vptm.commands.app import main

Outcome = tuple[int, str, str]


class Console:
    """Runs the command in this process and returns (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: Any) -> Outcome:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        printed = self.capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    def refused(self, *arguments: Any) -> tuple[int, str]:
        """Exit code and the one line on stderr that gives the reason."""
        code, out, err = self(*arguments)
        assert out == "", "a refused command must print no result"
        lines = [line for line in err.splitlines() if line.startswith("vptm: ")]
        assert len(lines) == 1 and err.endswith(lines[0] + "\n") and "Traceback" not in err, err
        return code, lines[0]
