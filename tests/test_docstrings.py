"""The examples of docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import vptm
import vptm_kernels

MODULES = [
    module.name
    for package in (vptm, vptm_kernels)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]
NAMES = {"torch": torch, "np": np, "vptm": vptm, "vptm_kernels": vptm_kernels, "Image": Image, "DataLoader": DataLoader}


def examples(module: str) -> list[doctest.DocTest]:
    found = importlib.import_module(module)
    names = {**NAMES, **vars(vptm), **vars(found)}
    return [test for test in doctest.DocTestFinder().find(found, globs=names) if test.examples]


@pytest.mark.parametrize("module", [name for name in MODULES if examples(name)])
@pytest.mark.filterwarnings("ignore")
def test_examples_run_and_print_what_they_say(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user copies them first."""
    monkeypatch.chdir(tmp_path)  # some write files
    torch.manual_seed(0)
    printed: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in examples(module):
        runner.run(test, out=printed.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(printed)
