"""What every bench shares: versions in the json, and the interleaved ratios printed below pytest-benchmark's tables."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    versions = {}
    for name in ("torch", "triton", "timm", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    machine_info["versions"] = versions
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    lines = []
    for bench in getattr(session, "benchmarks", []):
        ratios = {name: value for name, value in bench.extra_info.items() if name.startswith("speed-up over ")}
        if ratios:
            found = ", ".join(f"{value:.2f}x {name.removeprefix('speed-up ')}" for name, value in ratios.items())
            lines.append(f"{bench.group}: {found}")
    if lines:
        terminalreporter.section("interleaved ratios, medians")
        for line in lines:
            terminalreporter.line(line)
