"""The Gluon experiment: it compiles, and refuses what its kernel cannot take. Nothing here executes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

from bench import gluon_attention


@pytest.mark.skipif("torch.cuda.is_available()", reason="compiles where there is no GPU")
def test_it_compiles_for_sm90_with_the_tensor_core_and_two_programs_a_multiprocessor():
    """On a borrowed card there is no time to find out that an experiment does not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gluon_attention"],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "wgmma" in done.stdout and "blocks/SM  2" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "name,change",
    [
        ("qkv", lambda qkv, prompts, bias: (qkv.float(), prompts, bias)),
        ("prompt_kv must be contiguous", lambda qkv, prompts, bias: (qkv, prompts[:, ::2], bias)),
        ("bias", lambda qkv, prompts, bias: (qkv, prompts, bias.float())),
        ("prompt_kv must have from 1 to 59", lambda qkv, prompts, bias: (qkv, torch.cat([prompts] * 2), bias)),
    ],
    ids=["dtype", "strides", "bias", "length"],
)
def test_what_the_kernel_cannot_take_is_refused_by_name(name, change):
    arguments = change(*gluon_attention.inputs(batch=1, heads=1))
    with pytest.raises(ValueError, match=name):
        gluon_attention.gluon_attention(*arguments, num_heads=1)
