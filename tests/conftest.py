"""Test set-up: one thread, Triton's interpreter where there is no GPU, a bounded number of property-test examples.

`pytest -m gpu` selects what runs kernels, or models on them: what a GPU is worth waiting for.
"""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

sys.path.append(str(Path(__file__).parent.parent))  # for `bench`; last, so that an installed vptm is what is tested

# Kernels are compiled for a GPU elsewhere and not run (`python -m bench.kernel_cache`): nothing is compared.
COMPILING = "VPTM_COMPILE_FOR" in os.environ
if COMPILING:
    from vptm_kernels import testing

    testing.assert_close_to_exact = lambda *arguments, **options: None

# Triton reads TRITON_INTERPRET when it is first imported, so this must stand before anything that imports it.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available() and not COMPILING:
    os.environ["TRITON_INTERPRET"] = "1"
    from interpreter import install

    install()

_HEALTH = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", max_examples=25, deadline=None, suppress_health_check=_HEALTH)
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=_HEALTH)
# for a GPU whose time is short: every example of another shape compiles kernels of its own
settings.register_profile("quick", max_examples=4, deadline=None, derandomize=True, suppress_health_check=_HEALTH)
settings.load_profile("ci" if os.environ.get("CI") else "default")

AOT_BASELINE = Path(__file__).parent.parent / "bench" / "results" / "aot_baseline.json"
_baseline_changes: list[str] = []


KERNEL_TESTS = ("test_prompted_attention", "test_readout_attention", "test_residual_norm", "test_prototype_cosine")


# How an op is traced is the same wherever it runs, and inductor compiles for longer than all other tests take.
TRACED = ("opcheck", "fullgraph_compile", "one_compile_serves", "export_keeps", "flop_counter")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Tests of an op that are asked for its kernels run them on the GPU where there is one."""
    for item in items:
        asked = getattr(item, "callspec", None) and item.callspec.params.get("impl")
        traced = any(word in item.originalname for word in TRACED)
        if asked == "triton" and not traced and item.module.__name__ in KERNEL_TESTS:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def benches_of_their_own():
    """Bench runs that tests start are no part of a parallel suite, where pytest-benchmark would time nothing."""
    os.environ.pop("PYTEST_XDIST_WORKER", None)


@pytest.fixture
def drawn():
    """For tests that look at the pictures of a run."""


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Files in place of the pictures of a run, which take longer than a tiny run: test_confusion.py and test_curves.py
    draw every kind, and so do runs in processes and in fixtures of their own."""
    if "drawn" in request.fixturenames:
        return
    for module, name in (("vptm.training.run_folder", "plot_curves"), ("vptm.methods.run", "plot_confusion")):
        if module in sys.modules:
            from vptm.weights.files import write_atomically

            monkeypatch.setattr(sys.modules[module], name, lambda *given: write_atomically(given[-1], b"undrawn"))


@pytest.fixture
def against_baseline():
    """Asserts that compiled kernels lost nothing against the committed baseline; other changes are printed at the end.

    A new one: `python -m vptm_kernels.aot --ci --targets all --write-baseline bench/results/aot_baseline.json`.
    """
    from vptm_kernels import aot

    def check(reports):
        lost, changed = aot.compare(reports, aot.read_baseline(AOT_BASELINE))
        _baseline_changes.extend(changed)
        assert not lost, lost

    return check


@pytest.fixture
def vptm(capsys, monkeypatch, tmp_path):
    from console import Console

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VPTM_DEBUG", raising=False)
    return Console(capsys)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A backbone file and a folder of 10 pictures of each of three classes."""
    from tiny_data import write_backbone, write_pictures

    root = tmp_path_factory.mktemp("material")
    write_backbone(root / "backbone.safetensors")
    write_pictures(root / "pictures", 10)
    return root


def pytest_terminal_summary(terminalreporter):
    if _baseline_changes:
        terminalreporter.section(f"compiled kernels that differ from {AOT_BASELINE.name}")
        for line in _baseline_changes:
            terminalreporter.line(line)
