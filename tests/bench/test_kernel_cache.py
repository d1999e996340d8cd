"""Kernels compiled where there is no GPU: Triton finds them in another folder, and what does not fit is said in one
line."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile

import pytest
import torch

from bench import kernel_cache

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The archive of one small kernel, and its manifest."""
    folder = tmp_path_factory.mktemp("packed")
    archive = folder / "kernels.tar.xz"
    return archive, kernel_cache.pack(archive, kernel_cache.TARGET, ["probe"], folder / "cache")


@pytest.mark.slow
def test_triton_takes_unpacked_kernels_and_compiles_what_is_not_there(packed, tmp_path):
    """Their group files name the folder in which they were compiled, which is gone: read as they are, nothing would be
    found and a GPU's time go to compiling."""
    archive, manifest = packed
    assert kernel_cache.unpack(archive, tmp_path / "cache") == manifest and manifest["kernels"] == 1
    [key] = kernel_cache.kernels(tmp_path / "cache")
    files = {path.suffix for path in (tmp_path / "cache" / key).iterdir()}
    assert files == {".cubin", ".json"}, "what no launch reads would fill the archive"
    assert kernel_cache.accepted(tmp_path / "cache", kernel_cache.TARGET)
    # another target is another kernel
    assert not kernel_cache.accepted(tmp_path / "cache", "sm80")
    assert len(kernel_cache.kernels(tmp_path / "cache")) == 2


def test_what_does_not_fit_is_one_line(packed):
    _, manifest = packed
    then = "they are compiled when first launched"
    here = kernel_cache.versions()
    ours = f"here is triton {here['triton']}, python {here['python']}: {then}"
    assert kernel_cache.misfit(manifest, "sm90") is None and kernel_cache.misfit(manifest, None) is None
    other = kernel_cache.misfit({**manifest, "triton": "3.0.0"}, "sm90")
    assert other == f"the packed kernels are of triton 3.0.0, python {here['python']}, {ours}"
    assert kernel_cache.misfit(manifest, "sm100") == f"the packed kernels are for sm90, this card is sm100: {then}"


def test_what_is_no_archive_is_one_line(tmp_path, capsys):
    text, foreign = tmp_path / "text.tar.xz", tmp_path / "foreign.tar.xz"
    text.write_text("no archive")
    with tarfile.open(foreign, "w:xz") as file:
        file.add(text, "something")
    for archive in (text, foreign, tmp_path / "nowhere"):
        with pytest.raises(SystemExit):
            kernel_cache.main(["unpack", str(archive), str(tmp_path / "cache")])
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"kernels must be an archive of bench.kernel_cache pack, got {archive}: " in error
    with pytest.raises(SystemExit):
        kernel_cache.main(["pack", str(text), "--parts", "probe,test"])
    assert "--parts must be of probe, headlines, tests, small, tuning, got test" in capsys.readouterr().err


CALLS = """
import contextlib, json, sys, torch
from bench import autotune, kernel_cache, timing
from triton.runtime.jit import JITFunction
with kernel_cache.compiling("sm90"):
    seen = []
    compile_only = JITFunction.run
    JITFunction.run = lambda self, *a, grid, **o: (seen.append((self.fn.__name__, o.get("BLOCK_M"))), None)[1]
    from vptm_kernels.prompted_attention import configs, triton_impl
    call = next(call for call in autotune.calls() if call.exhaustive)
    run = call.make(autotune.Place("cpu", tiny=True))
    with autotune.answering(triton_impl, {}) as asked:
        run()
    [(setting, table)] = [item for item in asked.items() if item[0][0] == "forward_config"]
    tried = [*autotune.candidates(configs, setting), *autotune.block_sizes(table)]
    for candidate in tried:
        with autotune.answering(triton_impl, {setting: candidate}):
            run()
    tuned, seen = seen, []
    timing.select(timing.Selection("cpu", (torch.bfloat16,), (), True, True))
    kernel_cache.PARTS["headlines"](slice(None, None, 3))
    models, seen = seen, []
    with contextlib.redirect_stdout(sys.stderr):
        kernel_cache.PARTS["tests"](slice(None, None, 9))
    JITFunction.run = compile_only
print(json.dumps([len(tried), tuned, *(sorted({name for name, _ in names}) for names in (models, seen))]))
"""


@pytest.mark.slow
def test_every_candidate_and_every_model_is_called(tmp_path):
    """A plan kept from the candidate before would be compiled again instead of the next, and the search would wait; a
    model on another path would compile nothing."""
    run = [sys.executable, "-c", CALLS]
    environment = kernel_cache.environment(tmp_path, kernel_cache.TARGET)
    done = subprocess.run(run, env=environment, cwd=kernel_cache.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tried, seen, models, tests = json.loads(done.stdout)
    # no comparison may end a test before its backward pass is compiled
    assert {"residual_norm_backward_kernel", "readout_attention_grad_kernel"} <= set(tests) and len(tests) >= 15
    assert len(seen) == tried + 1 and {name for name, _ in seen} == {"prompted_attention_forward_kernel"}
    assert {rows for _, rows in seen} == {32, 64, 128}
    wanted = {
        "prompted_attention_forward_kernel",
        "prompted_attention_query_grad_kernel",
        "prompted_attention_key_grad_kernel",
        "readout_attention_split_kernel",
        "readout_attention_merge_kernel",
    }
    assert wanted <= set(models) and any("cosine" in name for name in models), models


def test_a_model_passes_by_without_its_products():
    """Shapes and dtypes are those of the products that are left out; everything else is computed."""
    x, weight, bias = torch.ones(2, 5, 8), torch.ones(6, 8), torch.zeros(6)
    with kernel_cache.WithoutProducts():
        found = torch.nn.functional.linear(x, weight, bias)
        patches = torch.nn.functional.conv2d(torch.ones(2, 3, 8, 8), torch.ones(4, 3, 4, 4))
        total = (x + 1).sum()
    assert found.shape == (2, 5, 6) and patches.shape == (2, 4, 5, 5) and total == 160
