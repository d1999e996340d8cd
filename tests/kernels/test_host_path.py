"""What calls cost the host on a GPU, by counting what they do instead of timing it, and what an epoch compiles.

A pretended GPU shows both without one, in a process in which Triton does not interpret kernels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parents[1]
NOTHING = {"bound": 0, "checks": 0, "registered": 0}


@pytest.fixture(scope="module")
def seen():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / "pretended.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ["first", "batch", "dtype", "alignment"])
def test_a_signature_is_checked_and_bound_once(what, seen):
    """Were plans kept by less than this, an unaligned tensor would be read 16 bytes at a time; were they not kept,
    every call would take ten times as long on the host."""
    first, *others = seen["op"][what]
    assert first == {"bound": 1, "checks": 1, "registered": 0}
    assert others == [NOTHING] * len(others)


@pytest.mark.parametrize("what", ["first", "batch", "dtype", "alignment"])
def test_forward_and_backward_of_a_signature_are_bound_once(what, seen):
    """Forward, query gradients, key gradients of tokens and of prompts: four kernels, and none ever again."""
    first, *others = seen["op"][f"{what} with gradients"]
    assert first["bound"] == 4 and first["registered"] == 0
    assert others == [NOTHING] * len(others)


def test_a_warm_model_binds_checks_and_dispatches_nothing(seen):
    """A forward that went through the binder, the argument checks or the registered op would cost a GPU its time."""
    for name, (first, _, *warm) in seen["forward"].items():
        assert first["checks"] > 0, name
        assert warm == [NOTHING] * len(warm), name


def test_the_bench_times_warm_calls_of_the_gpu_path(seen):
    """A bench of the CPU path, or of calls that still bind, would report another cost than a GPU waits for."""
    for name, found in seen["bench"].items():
        assert found["timed"][0] == "vptm" and len(found["timed"]) > 1, name
        assert found["compiled"] > 0 and found["bound"] == 0, name


def later(epoch):
    return {batch: names for batch, names in epoch["later"].items() if names}


def test_no_last_batch_of_attention_compiles_anything(seen):
    """A batch that is no multiple of 16, or one image, compiled seconds at the end of every first epoch."""
    for kind, epoch in seen["epoch of the op"].items():
        assert epoch["first"] and not later(epoch), kind


def test_no_last_batch_of_a_model_compiles_anything(seen):
    """The same of whole models, training and inference: attention, read-out and verbalizers."""
    for name, epoch in seen["epoch"].items():
        assert epoch["first"] and not later(epoch), name
    kernels = {kernel for epoch in seen["epoch"].values() for kernel in epoch["first"]}
    wanted = {
        "prompted_attention_forward_kernel",
        "readout_attention_split_kernel",
        "readout_attention_grad_kernel",
        "prototype_cosine_readout_kernel",
        "prototype_cosine_hidden_grad_kernel",
        "prototype_cosine_cosine_kernel",
    }
    assert wanted <= kernels
