"""Kernels compiled on a machine without a GPU, packed for one that has little time: Triton finds them in its cache.

    python -m bench.kernel_cache pack kernels/sm90.tar.xz --jobs 2      # needs no GPU, and its time
    python -m bench.kernel_cache pack kernels/sm90.tar.xz --parts tuning
    python -m bench.kernel_cache unpack kernels/sm90.tar.xz FOLDER      # there; then TRITON_CACHE_DIR=FOLDER

What `pytest -m gpu` launches, what the headline benches launch, and every candidate of the block-size search is called
with CPU tensors, bound and specialised as on a GPU, and compiled for `--target`. Binaries and what Triton says of them
are kept. Triton accepts an entry if its own files, the kernel's source and the options are the same, so pack with the
versions that run there: the same Triton wheel, thus the same Python. `unpack` and `bench.gpu_check` say in one line
what does not fit; kernels that are not found are compiled when they are first launched.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench import timing
from vptm.messages import error_line
from vptm.weights.files import replacing

ROOT = Path(__file__).parent.parent
TARGET = "sm90"
MANIFEST = "manifest.json"
# Part of Triton's keys: the same where kernels are compiled and where they are looked up.
ENVIRONMENT = {"TRITON_DEFAULT_FP_FUSION": "1"}
# Named so that `tests/conftest.py` leaves the interpreter alone and compares nothing.
COMPILE_FOR = "VPTM_COMPILE_FOR"
KEPT = (".cubin", ".json")

# ------------------------------------------------------------------ compiling without a GPU


@contextlib.contextmanager
def compiling(target: str) -> Iterator[None]:
    """Inside, kernels take CPU tensors, are compiled for `target` into Triton's cache, and nothing is launched: results
    hold whatever memory held.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, and there is nothing to compile.
    """
    from triton.runtime.jit import JITFunction

    from vptm_kernels.testing.pretend_gpu import pretend_gpu

    compiled, warmed = JITFunction._do_compile, _warmed(JITFunction.run)
    with (
        pretend_gpu(target),
        patch.object(JITFunction, "_do_compile", compiled),
        patch.object(JITFunction, "run", warmed),
    ):
        yield


def _warmed(run: Any) -> Any:
    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        # nothing is returned that a later call could launch
        run(self, *args, grid=grid, warmup=True, **options)

    return compile_only


class WithoutProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Matrix products and convolutions give memory of the right shape: a whole model passes by in a second."""

    PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__.rstrip("_") not in self.PRODUCTS:
            return func(*args, **kwargs)
        out = kwargs.get("out")
        if out is not None:
            return out
        shapes = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        result = func(*shapes[0], **shapes[1])
        return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype)


# ------------------------------------------------------------------ what is compiled


def probe(device: str) -> None:
    """One small kernel: whether it is found says whether the cache is accepted."""
    from vptm_kernels.residual_norm.api import residual_norm

    x = torch.zeros(16, 768, device=device, dtype=torch.bfloat16)
    residual_norm(x, x, eps=1e-6, impl="triton")


def _tests(share: slice) -> None:
    """All that `-m gpu` selects on a GPU. Whatever is compared there is right here: no kernel has run."""
    import pytest

    from bench import gpu_check

    class Shared:
        @pytest.hookimpl(trylast=True)  # after -m has selected
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            items[:] = items[share]

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(self) -> Iterator[None]:
            with contextlib.suppress(AssertionError):
                yield

    quiet = ("-q", "--no-header", "--tb=line", "-p", "no:cacheprovider")
    files = [str(ROOT / name) for name in gpu_check.TESTS]
    with (
        patch.object(torch.testing, "assert_close", lambda *arguments, **options: None),
        patch.object(torch, "equal", lambda *arguments: True),
    ):
        status = pytest.main([*files, "-m", "gpu", "--hypothesis-profile", "quick", *quiet], plugins=[Shared()])
    if status:
        raise SystemExit(status)


def _tuning(share: slice) -> None:
    """Every candidate of every table, as `bench.autotune --exhaustive` asks for them."""
    from bench import autotune

    for call in autotune.calls():
        package = f"vptm_kernels.{call.op}"
        module, configs = (importlib.import_module(f"{package}.{name}") for name in ("triton_impl", "configs"))
        run = call.make(autotune.Place("cpu"))
        with autotune.answering(module, {}) as asked:
            run()
        for setting, table in asked.items():
            found = [*autotune.candidates(configs, setting), *autotune.block_sizes(table, setting[1][0])]
            for candidate in found[share] if call.exhaustive else ():
                try:
                    with autotune.answering(module, {setting: candidate}):
                        run()
                except Exception as error:  # a tile that the compiler refuses is refused there as well
                    print(f"{call.op} {setting[0]} {candidate}: {error_line(error, 100, first=True)}", flush=True)


def _headlines(share: slice) -> None:
    """What the benches of `bench.gpu_check` call: attention, and models in a forward pass and a training step."""
    from bench import gpu_check

    half, full = torch.float16, torch.bfloat16
    labels = [(label, full) for label in (*gpu_check.ATTENTION, *gpu_check.MODELS, *gpu_check.OTHER_BATCHES)]
    for label, dtype in [*labels, *((label, half) for label in gpu_check.HALF)][share]:
        if "=" in label:
            _attention(label, dtype)
        else:
            _model(label, dtype)


FEW = 4


def _attention(label: str, dtype: torch.dtype) -> None:
    from bench.bench_prompted_attention import Shape, _inputs
    from vptm_kernels import prompted_attention

    said = dict(word.split("=") for word in label.split())
    x = _inputs(Shape(min(FEW, int(said["B"])), int(said["P"])), dtype)
    bias = x.bias.dense(torch.float16)
    options = {"num_heads": int(said["H"]), "bias": bias, "impl": "triton"}
    with torch.no_grad():
        prompted_attention(x.qkv, x.prompts, **options)
    out = prompted_attention(x.qkv, x.prompts, **options)
    torch.autograd.grad(out, [x.qkv, x.prompts], x.grad, allow_unused=True)


def _model(label: str, dtype: torch.dtype) -> None:
    from bench import bench_model

    mode, length, batch, *readout = label.split("-")
    # what a kernel is compiled for does not depend on the batch
    few = min(FEW, int(batch))
    setting = bench_model.Setting(mode, int(length), few, readout=readout[0] if readout else "cls")
    images = bench_model._images(setting.batch, setting.side, dtype)
    labels = torch.arange(setting.batch) % bench_model.CLASSES
    with WithoutProducts():
        model = bench_model.prompted(setting, dtype)
        model.impl = "triton"
        with torch.inference_mode():
            bench_model._read(setting, model, images)
        model.train()
        learned = [parameter for parameter in model.trainable_parameters() if parameter.numel()]
        torch.autograd.grad(torch.nn.functional.cross_entropy(model(images).float(), labels), learned)


def _small(share: slice) -> None:
    """What the sanitizer watches."""
    from bench import autotune

    for call in autotune.calls()[share]:
        call.make(autotune.Place("cpu", tiny=True))()


def _probe(share: slice) -> None:
    probe("cpu")


PARTS = {"probe": _probe, "headlines": _headlines, "tests": _tests, "small": _small, "tuning": _tuning}
"""What is compiled, by name; a share of each at a time."""


def _part(name: str, target: str, folder: Path, jobs: int) -> int:
    """The largest exit status of the processes that compile the shares of a part into `folder`."""
    children = []
    for first in range(jobs if name != "probe" else 1):
        call = f"k.PARTS[{name!r}](slice({first}, None, {jobs}))"
        code = f"from bench import kernel_cache as k\nwith k.compiling({target!r}): {call}"
        children.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(folder, target)))
    return max(abs(child.wait()) for child in children)


def environment(folder: Path, compile_for: str | None = None) -> dict[str, str]:
    """Of a process that finds its kernels in `folder`, or compiles them into it for another machine."""
    dropped = ("TRITON_INTERPRET", COMPILE_FOR)
    found = {name: value for name, value in os.environ.items() if name not in dropped}
    found |= ENVIRONMENT | {"TRITON_CACHE_DIR": str(folder)}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), found.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    if compile_for is not None:
        found |= {COMPILE_FOR: compile_for, "TRITON_STORE_BINARY_ONLY": "1"}
    return found


# ------------------------------------------------------------------ the archive


def kernels(folder: Path) -> set[str]:
    """Keys of the compiled kernels in a cache folder."""
    return {path.parent.name for path in folder.glob("*/*.cubin")}


def versions() -> dict[str, str]:
    """What must be the same for Triton to accept the entries; more than these can differ, and `probe` finds out."""
    return {"triton": str(timing.versions()["triton"]), "python": ".".join(platform.python_version_tuple()[:2])}


def pack(archive: Path, target: str, parts: Sequence[str], folder: Path, jobs: int = 1) -> dict[str, Any]:
    """Compile `parts` into `folder`, which may hold kernels already, by so many processes, and write it; returns the
    manifest."""
    seconds, failed = {}, []
    for part in dict.fromkeys(("probe", *parts)):
        before, started = len(kernels(folder)), time.monotonic()
        if status := _part(part, target, folder, jobs):
            failed.append(part)
        seconds[part] = round(time.monotonic() - started, 1)
        how = f", FAILED with exit status {status}" if status else ""
        print(f"{part}: {len(kernels(folder)) - before} kernels in {seconds[part]:.0f} s{how}", flush=True)
    found = sorted(kernels(folder))
    if not found:
        raise RuntimeError("nothing was compiled: run `python -m vptm_kernels.aot --targets sm90 --ci` for the reason")
    manifest = {
        "target": target,
        **versions(),
        "kernels": len(found),
        "seconds": seconds,
        "failed": failed,
        "commit": timing.commit(),
    }
    archive.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(archive) as temporary,
        tarfile.open(temporary, "w:xz") as file,
        tempfile.TemporaryDirectory() as scratch,
    ):
        (Path(scratch) / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        file.add(Path(scratch) / MANIFEST, MANIFEST)
        for key in found:
            for path in sorted((folder / key).iterdir()):
                if path.suffix in KEPT:
                    file.add(path, f"{key}/{path.name}")
    return manifest


def unpack(archive: Path, folder: Path) -> dict[str, Any]:
    """The manifest of an archive, whose kernels now lie in `folder`.

    Raises:
        ValueError: the file cannot be read, or is no archive of `pack`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive, "r:xz") as file:
            file.extractall(folder, filter="data")
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        (folder / MANIFEST).unlink()
        for group in folder.glob("*/__grp__*.json"):
            content = json.loads(group.read_text(encoding="utf-8"))
            names = [name for name in content["child_paths"] if (group.parent / name).is_file()]
            # paths of the machine that compiled them
            content["child_paths"] = {name: str(group.parent.resolve() / name) for name in names}
            group.write_text(json.dumps(content), encoding="utf-8")
    except (OSError, tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"kernels must be an archive of bench.kernel_cache pack, got {archive}: {error}") from None
    return manifest


def misfit(manifest: dict[str, Any], card: str | None) -> str | None:
    """Why the kernels of an archive are of no use here, in one line; None if nothing is known against them.

    card: what kernels are compiled for here ("sm90"), or None without a GPU.
    """
    here, then = versions(), "they are compiled when first launched"
    packed = {name: str(manifest.get(name)) for name in here}
    if packed != here:
        theirs, ours = (", ".join(f"{name} {value}" for name, value in found.items()) for found in (packed, here))
        return f"the packed kernels are of {theirs}, here is {ours}: {then}"
    if card is not None and manifest.get("target") != card:
        return f"the packed kernels are for {manifest.get('target')}, this card is {card}: {then}"
    return None


def accepted(folder: Path, target: str | None) -> bool:
    """Whether Triton itself finds a packed kernel in `folder`: on the GPU, or without one compiling for `target`."""
    before = kernels(folder)
    call = f"from bench import kernel_cache as k; k.probe('{'cuda' if target is None else 'cpu'}')"
    if target is not None:
        call = f"from bench import kernel_cache as k\nwith k.compiling({target!r}): k.probe('cpu')"
    subprocess.run([sys.executable, "-c", call], cwd=ROOT, env=environment(folder, target), check=True)
    return kernels(folder) == before and bool(before)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernel_cache", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("pack", help="compile kernels and write them to an archive")
    making.add_argument("archive", type=Path)
    making.add_argument("--target", default=TARGET, help=f"of which GPU (default: {TARGET})")
    making.add_argument("--parts", default=",".join(PARTS), help=f"comma separated, of {', '.join(PARTS)}")
    making.add_argument("--jobs", type=int, default=1, help="processes that compile (default: 1)")
    making.add_argument("--folder", type=Path, help="compile there, and keep it: a second run compiles what is new")
    taking = commands.add_parser("unpack", help="make a cache folder of an archive")
    taking.add_argument("archive", type=Path)
    taking.add_argument("folder", type=Path)
    options = parser.parse_args(argv)
    try:
        if options.command == "unpack":
            manifest = unpack(options.archive, options.folder)
            card = None
            if torch.cuda.is_available():
                from vptm_kernels._runtime.triton_support import architecture

                card = architecture(torch.device("cuda"))
            print(misfit(manifest, card) or f"{manifest['kernels']} kernels in {options.folder}")
            return 0
        parts = [part.strip() for part in options.parts.split(",")]
        if unknown := set(parts) - set(PARTS):
            parser.error(f"--parts must be of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
        if options.jobs < 1:
            parser.error(f"--jobs must be at least 1, got {options.jobs}")
        with contextlib.ExitStack() as stack:
            folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            manifest = pack(options.archive, options.target, parts, folder.resolve(), options.jobs)
        size = options.archive.stat().st_size / 2**20
        print(f"wrote {options.archive}: {manifest['kernels']} kernels, {size:.1f} MiB")
        return int(bool(manifest["failed"]))
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
