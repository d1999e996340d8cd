"""Every check of the sources in one command: `python -m tools.check` (needs `pip install ".[dev]"`).

Lint, format, types and the API reference, whose warnings are errors. All are run; the status is 1 if any failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# typing forgets the module of a named tuple's annotations, which are then shown as they are written
WARNINGS = ("-W", "error::UserWarning", "-W", "ignore:Error parsing type annotation ForwardRef")


def commands(reference: Path) -> list[list[str]]:
    """What is run; the API reference is written into the folder `reference`."""
    return [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
        [
            *WARNINGS,
            "-m",
            "pdoc",
            "--docformat",
            "google",
            "vptm",
            "vptm_kernels",
            "--output-directory",
            str(reference),
        ],
    ]


def main() -> int:
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for command in commands(Path(folder)):
            print("+ python", *command, flush=True)
            if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
                failed.append(command[command.index("-m") + 1])
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
