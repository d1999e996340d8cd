"""Peers of whole models compute what they claim, and are absent by name."""

from __future__ import annotations

import pytest
import torch

from bench import bench_model, bench_training_step, peers, timing


@pytest.fixture
def gpu_selected():
    """As on a machine with a GPU where every compiled peer is asked for. Nothing is compiled for one."""
    before = timing.selection
    timing.select(timing.Selection(device="cuda", peers=("torch.compile", "torch.compile max-autotune")))
    yield
    timing.select(before)


@pytest.fixture
def selected():
    """`timing.select`, undone afterwards."""
    before = timing.selection
    yield timing.select
    timing.select(before)


@pytest.fixture(autouse=True)
def limits():
    """torch's own, whatever was imported before, and put back as they were."""
    from torch._dynamo import config

    with config.patch(fail_on_recompile_limit_hit=False, recompile_limit=8):
        yield


def test_compiled_peers_are_one_graph_of_the_eager_form(gpu_selected):
    x = torch.randn(3, 4)
    runs = peers.compiled({"concatenation": lambda: (x @ x.mT).softmax(-1)}, backend="eager")
    assert set(runs) == {"torch.compile", "torch.compile max-autotune"}
    for run in runs.values():
        torch.testing.assert_close(run(), (x @ x.mT).softmax(-1))


def test_a_peer_with_a_graph_break_is_refused(gpu_selected):
    """Half compiled it would be slower, and its name would promise more than it is."""
    x = torch.ones(2)

    def broken():
        torch._dynamo.graph_break()
        return x + 1

    runs = {"vptm": lambda: x + 1} | peers.compiled({"concatenation": broken}, backend="eager")
    found = timing.compare(runs, check=lambda name, value: None, clock=lambda run: 1.0)
    assert set(found.refused) == {"torch.compile", "torch.compile max-autotune"}


@pytest.fixture
def graphs():
    """Sizes that a backend got a graph for; every call of what it made is kept as well."""

    class Counting(list):
        called = 0

        def __call__(self, module, inputs):
            self.append(tuple(value.shape for value in inputs if isinstance(value, torch.Tensor)))

            def run(*arguments):
                self.called += 1
                return module(*arguments)

            return run

    return Counting()


SHAPES = range(2, 2 + 9)  # one more than the forms that torch.compile keeps of a function


def test_every_bench_gets_a_compiled_peer_of_its_own(graphs):
    """Beyond its limit of eight forms torch.compile runs eagerly without a word: ratios over "compiled" would be ratios
    over eager from the ninth shape on."""
    for size in SHAPES:
        timing.one_graph(torch.sin, backend=graphs)(torch.ones(size))
    assert graphs == [(torch.Size([size]),) for size in SHAPES] and graphs.called == len(SHAPES)


def test_a_form_that_is_used_for_too_many_shapes_is_an_error(graphs):
    """A bench that keeps one form for all its shapes must fail, not time eager code."""
    form = timing.one_graph(torch.sin, backend=graphs)
    with pytest.raises(Exception, match="Hard failure"):
        for size in SHAPES:
            form(torch.ones(size))
    assert graphs.called == len(graphs) == len(SHAPES) - 1


def test_a_compiled_peer_is_made_once_for_all_rows_of_a_group(monkeypatch):
    """Compiling takes longer than timing: a row of the table takes the form that was compared. The next group must not
    get it."""
    made = []
    monkeypatch.setattr(timing, "one_graph", lambda function, mode: made.append(mode) or (lambda *a: function(*a)))
    peer, other = timing.compiled(torch.sin).values()
    first = peer.form("a")
    assert (
        peer.form("a") is first
        and other.form("a") is not first
        and made == [timing.MODES[""], timing.MODES[" max-autotune"]]
    )
    assert peer.form("b") is not first and len(made) == 3
    assert timing.Peer(torch.sin).form("a") is torch.sin


def test_what_takes_minutes_is_timed_when_named_and_listed_otherwise(gpu_selected):
    """A default run that compiled with max-autotune would not end; one that left it out unsaid would look complete."""
    named = timing.compiled(torch.sin, "absorbed compiled")
    assert timing.absent(named)["absorbed compiled max-autotune"].startswith("takes minutes")
    assert timing.rows(named) == ["vptm", "absorbed compiled"]
    timing.select(timing.Selection(device="cuda", peers=("absorbed compiled max-autotune",)))
    assert timing.absent(named) == {} and list(timing.present(named)) == ["absorbed compiled max-autotune"]
    assert timing.rows(named) == ["vptm", *named]


@pytest.mark.parametrize("grid", ["small", "full"])
def test_on_a_cpu_compiled_peers_are_timed_on_the_full_grid_and_named_on_the_small_one(grid, selected):
    """Compiling runs on a CPU too: left out in silence, a reader would take the eager peer for the strongest."""
    selected(timing.Selection("cpu", full=grid == "full"))
    left = timing.absent(peers.compiled_peers("concatenation"))
    assert left.pop("torch.compile max-autotune").startswith("takes minutes")
    assert left == (
        {}
        if grid == "full"
        else {"torch.compile": 'takes long on a CPU, timed with --grid full or --peers "torch.compile"'}
    )
    assert set(peers.compiled({"concatenation": lambda: None}, backend="eager")) == (
        {"torch.compile"} if grid == "full" else set()
    )


def test_a_package_inside_of_an_absent_one_is_absent_by_name():
    """flash-attn-4 is a part of flash_attn, which may not be there at all."""
    assert timing.Peer(print, needs=("no_such_package.part",)).missing().startswith("needs the package no_such_package")
    assert timing.Peer(print, needs=("torch.nn",)).missing() is None


def test_every_form_is_checked_against_the_function_of_its_eager_form():
    """Checked against another function's float64, a right peer would be refused."""
    for eager in peers.EAGER:
        function = peers.TIMM if eager == peers.TIMM else "vptm"
        forms = (eager, peers.compiled_name(eager), peers.graphed_name(eager))
        assert {peers.declared(name).function for name in forms} == {function}
    assert {peers.declared(name).function for name in peers.RUNTIMES} == {"vptm"}
    assert peers.declared(peers.TRANSFORMERS).function == peers.TRANSFORMERS


@pytest.mark.parametrize("bench", [bench_model, bench_training_step])
def test_whole_models_meet_declared_peers_alone(bench):
    """One that a bench makes up has no title, no look, and is checked against what it may not compute."""
    assert all(peers.PEERS[name] == peer for name, peer in bench.PEERS.items())


def test_graphs_are_captured_when_first_called(monkeypatch, selected):
    """A capture that fails must refuse that form alone."""
    selected(timing.Selection("cuda"))

    def captured(run):
        if run is broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: 2 * run()

    monkeypatch.setattr(timing, "captured", captured)
    broken, fine = (lambda: 1), (lambda: 3)
    runs = peers.graphed({"vptm": fine, "concatenation": broken})
    assert set(runs) == {"vptm graphed", "concatenation graphed"} and runs["vptm graphed"]() == 6
    found = timing.compare({"vptm": fine} | runs, check=None, clock=lambda run: run() and 1.0)
    assert found.refused == {"concatenation graphed": "operation not permitted when stream is capturing"}


@pytest.mark.parametrize("runtime", ["OpenVINO", "ONNX Runtime"])
def test_other_runtimes_compute_what_pytorch_does(runtime, selected):
    """An exporter that lost a part would be fast."""
    for package in peers._NEEDS[runtime][1:]:
        pytest.importorskip(package)
    selected(timing.Selection("cpu", full=True))
    model, images = torch.nn.Linear(4, 3), torch.randn(2, 4)
    functions = {"prefix": lambda model, images: model(images).relu()}
    run = peers.by_runtimes(functions, model, images)[f"{runtime} prefix"]
    torch.testing.assert_close(run(), model(images).relu().detach())


def test_transformers_beit_is_checked_against_its_own_float64():
    """Its fused attention with a position bias must be right here, and a wrong result must not pass for it."""
    pytest.importorskip("transformers")
    images = torch.randn(3, 3, 32, 32)
    run, check = peers.hugging_face(images, "tiny"), peers.hugging_face_check(images, "tiny")
    with torch.inference_mode():
        features = run()
    assert features.shape == (3, 32)
    check("transformers", features)
    late = features.clone()
    late[2] = float("nan")
    for wrong in (features + 1e-4, features.flip(0), late):
        with pytest.raises(AssertionError, match=r"transformers: (error .* exceeds the budget|not finite)"):
            check("transformers", wrong)
