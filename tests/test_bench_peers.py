"""Peers of whole models compute what they claim, and are absent by name."""

from __future__ import annotations

import pytest
import torch

from bench import peers, timing


@pytest.fixture
def gpu_selected():
    """As on a machine with a GPU: the compiled peers are there. Nothing is compiled for one."""
    before = timing.selection
    timing.select(timing.Selection(device="cuda"))
    yield
    timing.select(before)


def test_compiled_peers_are_one_graph_of_the_eager_form(gpu_selected):
    x = torch.randn(3, 4)
    runs = peers.compiled(lambda: (x @ x.mT).softmax(-1), backend="eager")
    assert set(runs) == {"torch.compile", "torch.compile max-autotune"}
    for run in runs.values():
        torch.testing.assert_close(run(), (x @ x.mT).softmax(-1))


def test_a_peer_with_a_graph_break_is_refused(gpu_selected):
    """Half compiled it would be slower, and its name would promise more than it is."""
    x = torch.ones(2)

    def broken():
        torch._dynamo.graph_break()
        return x + 1

    runs = {"vptm": lambda: x + 1} | peers.compiled(broken, backend="eager")
    found = timing.compare(runs, check=lambda name, value: None, clock=lambda run: 1.0)
    assert set(found.refused) == {"torch.compile", "torch.compile max-autotune"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_compiled_peers_are_absent_by_name():
    assert peers.compiled(lambda: None) == {}
    assert peers.PEERS["torch.compile"].missing() == "needs a GPU"


def test_transformers_beit_is_checked_against_its_own_float64():
    """Its fused attention with a position bias must be right here, and a wrong result must not pass for it."""
    pytest.importorskip("transformers")
    images = torch.randn(3, 3, 32, 32)
    run, check = peers.hugging_face(images, "tiny"), peers.hugging_face_check(images, 1e-4, "tiny")
    with torch.inference_mode():
        features = run()
    assert features.shape == (3, 32)
    check("transformers", features)
    for wrong in (features + 1e-2, features * float("nan"), features.flip(0)):
        with pytest.raises(AssertionError, match="transformers differs"):
            check("transformers", wrong)
