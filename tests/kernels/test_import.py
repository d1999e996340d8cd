"""`import vptm_kernels` needs torch alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHILD = """
import importlib.machinery, importlib.metadata as metadata, json, os, re, sys, time
import torch

def needs(name, found):
    if name not in found and name != "triton":
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            required = []
        for line in required:
            if "extra ==" not in line:
                needs(re.match(r"[\\w.-]+", line)[0].lower().replace("_", "-"), found)
    return found

of_torch = needs("torch", set())
blocked = {
    module
    for module, names in metadata.packages_distributions().items()
    if not any(name.lower().replace("_", "-") in of_torch for name in names)
} - {"vptm", "vptm_kernels"} | {"vptm", "numpy"}

path_finder, find_spec = importlib.machinery.PathFinder, importlib.machinery.PathFinder.find_spec
path_finder.find_spec = lambda name, *rest: None if name.partition(".")[0] in blocked else find_spec(name, *rest)

for name in [name for name in sys.modules if name.partition(".")[0] in blocked]:
    del sys.modules[name]
before, modules = dict(os.environ), set(sys.modules)
started = time.process_time()
import vptm_kernels
taken = time.process_time() - started
assert {"triton", "timm"} <= blocked
print(json.dumps({
    "cuda": torch.cuda.is_initialized(),
    "environment": dict(os.environ) == before,
    "strangers": sorted(n for n in set(sys.modules) - modules if n.partition(".")[0] in blocked),
    "seconds": taken,
    "heads": list(vptm_kernels.prompted_attention(torch.zeros(1, 2, 96), num_heads=2).shape),
}))
"""


def test_it_imports_and_runs_with_torch_alone():
    """Were Triton, numpy or a model library imported, the kernels could not be installed without them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["heads"] == [1, 2, 32]
    assert not found["cuda"] and found["environment"] and found["strangers"] == []
    assert found["seconds"] < 1, "0.1 s on a machine that does nothing else"
