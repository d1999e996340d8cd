"""What kernels a run of the library compiles and binds on a GPU that is not there, printed as json.

A script of its own, as Triton interprets kernels in the process of the tests.
"""

import json
from collections import Counter
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch

import vptm
from bench import bench_host_time
from vptm_kernels import RelativePositionBias, prompted_attention
from vptm_kernels.prompted_attention import api, ops
from vptm_kernels.prototype_cosine import api as cosine_api
from vptm_kernels.prototype_cosine import ops as cosine_ops
from vptm_kernels.readout_attention import api as readout_api
from vptm_kernels.readout_attention import ops as readout_ops
from vptm_kernels.testing.pretend_gpu import pretend_gpu

LAST_BATCHES = (1, 2, 3, 16, 17, 63)
CHECKS = [(api, "_check_qkv"), (readout_api, "_check"), (cosine_api, "_check_head"), (cosine_api, "_check")]
REGISTERED = [
    (api, "prompted_attention_op"),
    (ops, "prompted_attention_backward_op"),
    (readout_api, "readout_attention_op"),
    (readout_ops, "readout_attention_backward_op"),
    (cosine_ops, "token_readout_op"),
    (cosine_ops, "token_readout_backward_op"),
    (cosine_ops, "prototype_similarity_op"),
    (cosine_ops, "prototype_similarity_backward_op"),
]


def counted(seen, run):
    """How often `run` binds a launch, checks arguments and calls a registered op."""
    counts = Counter()

    def counting(name, original):
        def call(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    with ExitStack() as patches:
        for name, places in (("checks", CHECKS), ("registered", REGISTERED)):
            for module, function in places:
                original = getattr(module, function)
                patches.enter_context(patch.object(module, function, counting(name, original)))
        seen.clear()
        run()
    return {"bound": len(seen.bound), "checks": counts["checks"], "registered": counts["registered"]}


def attention(batch=4, dtype=torch.bfloat16, offset=0, grad=False):
    width = 3 * 2 * 16
    storage = torch.zeros(batch * 9 * width + offset, dtype=dtype)
    qkv = storage[offset:].view(batch, 9, width).requires_grad_(grad)
    prompts = torch.zeros(5, 2 * 2 * 16, dtype=dtype, requires_grad=grad)
    bias = torch.zeros(2, 9, 16).half()[..., :9]

    def run():
        out = prompted_attention(qkv, prompts, num_heads=2, bias=bias, impl="triton")
        if grad:
            torch.autograd.grad(out, [qkv, prompts], torch.zeros_like(out))

    return run


def of_one_op():
    with pretend_gpu() as seen:
        return calls_by_signature(seen)


def calls_by_signature(seen):
    found = {}
    for grad in (False, True):
        for name, options in (
            ("first", {}),
            ("batch", {"batch": 3}),
            ("dtype", {"dtype": torch.float16}),
            ("alignment", {"offset": 1}),
        ):
            run = attention(grad=grad, **options)
            calls = [counted(seen, run) for _ in range(3)]
            found[f"{name}{' with gradients' if grad else ''}"] = calls
    return found


def epoch_of_attention():
    heads, dim, found = 2, 16, {}
    for kind in ("shared", "image", "queries", "pool", "learned bias", "learned table"):
        tokens, width = 10, heads * dim

        def step(batch, kind=kind, tokens=tokens, width=width):
            qkv = torch.zeros(batch, tokens, 3 * width).bfloat16().requires_grad_()
            leaves, call = [qkv], {"num_heads": heads, "impl": "triton"}
            shapes = {"image": (batch, 4, 2 * width), "queries": (4, 3 * width), "pool": (9, 2 * width)}
            prompts = torch.zeros(*shapes.get(kind, (4, 2 * width))).bfloat16().requires_grad_()
            call["prompt_qkv" if kind == "queries" else "prompt_kv"] = prompts
            leaves.append(prompts)
            if kind == "pool":
                ranges = torch.tensor([[0, 3]] * batch, dtype=torch.int32)
                call |= {"prompt_ranges": ranges, "max_prompt_length": 4}
            if kind == "learned bias":
                leaves.append(torch.zeros(heads, tokens, tokens, requires_grad=True))
                call["bias"] = leaves[-1]
            if kind == "learned table":
                leaves.append(torch.zeros(5 * 5 + 3, heads, requires_grad=True))
                call["bias"] = RelativePositionBias(leaves[-1], (3, 3))
            for wanted in (leaves, leaves[1:]):
                out = prompted_attention(qkv, **call)
                torch.autograd.grad(out, wanted, torch.zeros_like(out))
            with torch.no_grad():
                prompted_attention(qkv, **call)

        found[kind] = epoch(step)
    return found


def epoch(step):
    """Kernels that a batch of 64 compiles, and those of smaller ones after it."""
    with pretend_gpu() as seen:
        step(64)
        first = list(seen.compiled)
        later = {}
        for batch in LAST_BATCHES:
            seen.clear()
            step(batch)
            later[batch] = list(seen.compiled)
    return {"first": first, "later": later}


MODELS = {
    "VPTM": {"prompt_mode": "shallow"},
    "VPTM on softmax": {"prompt_mode": "shallow", "token_activation": "softmax"},
    "VPTM on log-softmax": {"prompt_mode": "deep", "token_activation": "log_softmax"},
    "VPT deep": {"prompt_mode": "deep", "readout": "cls", "token_activation": "hidden", "verbalizer": "linear"},
    "mean": {"prompt_mode": "deep", "readout": "mean", "token_activation": "hidden", "verbalizer": "linear"},
}


def model_of(name):
    torch.manual_seed(0)
    return vptm.PromptedBEiT("builtin", 7, prompt_length=5, impl="triton", **MODELS[name])


def epoch_of_model(name):
    model = model_of(name)
    learned = [t for t in model.trainable_parameters() if t.numel()]

    def step(batch):
        images, labels = torch.zeros(batch, 1, 28, 28), torch.zeros(batch, dtype=torch.long)
        model.train()
        torch.autograd.grad(torch.nn.functional.cross_entropy(model(images).float(), labels), learned)
        model.eval()
        with torch.inference_mode():
            model(images)

    return epoch(step)


def forward_of_model(name):
    model, images = model_of(name).eval(), torch.zeros(2, 1, 28, 28)

    def run():
        with torch.inference_mode():
            model(images)

    with pretend_gpu() as seen:
        return [counted(seen, run) for _ in range(4)]


def benched():
    for mode in bench_host_time.MODES:
        yield mode, partial(bench_host_time.of_model, mode)
    for op, runs in bench_host_time.OPS.items():
        for direction in bench_host_time.DIRECTIONS:
            yield f"{op}, {direction}", partial(runs, direction)


def names_and_kernels(name, make):
    """Who is timed, and how often one of our calls binds a launch when it is warm."""
    with pretend_gpu() as seen:
        runs = make()
        for run in [*runs.values(), runs["vptm"], runs["vptm"]]:
            run()
        compiled = len(seen.compiled)
        seen.clear()
        runs["vptm"]()
        return {"timed": list(runs), "compiled": compiled, "bound": len(seen.bound)}


def main():
    torch.set_num_threads(1)
    found = {"op": of_one_op(), "epoch of the op": epoch_of_attention()}
    found["forward"] = {name: forward_of_model(name) for name in MODELS}
    found["epoch"] = {name: epoch_of_model(name) for name in MODELS}
    found["bench"] = {name: names_and_kernels(name, make) for name, make in benched()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
