"""A bank of tasks: what it answers is what each task's own model answers, whatever stands beside it in the batch."""

from __future__ import annotations

import copy
import re
import threading

import pytest
import torch
from beit_factory import tiny_beit
from tiny_models import build, build_vit, images, pictures, relative_error, tiny_vit

from vptm import PromptedBEiT, predict, save_adapter
from vptm.frozen import folded
from vptm.serving.pool import Pool
from vptm.serving.task_bank import TaskBank
from vptm_kernels import prompted_attention
from vptm_kernels._runtime.triton_support import has_triton

DEEP = {"prompt_mode": "deep"}
# Every form of prompts, read-outs and verbalizers: what runs from the pool, as rows, and task by task.
TASKS = {
    "deep": DEEP,
    "deep of another length": DEEP | {"prompt_length": 5, "num_classes": 3},
    "no prompts": {"prompt_length": 0, "num_classes": 7},
    "shared deep prompts with a projection": DEEP | {"prompt_options": {"shared": True, "prompt_dim": 4}},
    "shallow": {"num_classes": 2},
    "another shallow": {},
    "shallow of another length": {"prompt_length": 1},
    "progressive": {"prompt_mode": "progressive", "progressive_alpha": 0.3},
    "progressive of another alpha": {"prompt_mode": "progressive", "progressive_alpha": 0.6},
    "progressive of learned alphas": {"prompt_mode": "progressive", "prompt_options": {"train_alpha": True}},
    "the first block alone, carried": DEEP | {"prompt_options": {"blocks": 1}},
    "the last block alone": DEEP | {"prompt_options": {"blocks": -1}},
    "dropped after one block": DEEP | {"prompt_options": {"blocks": 1, "after": "drop"}},
    "added to patches": {"prompt_options": {"placement": "add"}, "prompt_length": 1},
    "bilinear prompts": DEEP | {"prompt_options": {"prompt_dim": 4, "projection_per": "block"}},
    "learned keys and values": DEEP | {"prompt_options": {"kind": "kv"}, "prompt_length": 4},
    "a cross-attention": DEEP | {"prompt_options": {"kind": "cross"}},
    "learned keys and values of one block": DEEP | {"prompt_options": {"kind": "kv", "blocks": 1}},
    "gates": DEEP | {"prompt_gate": -1.0},
    "gates of heads, of another length": DEEP
    | {"prompt_gate": -1.0, "prompt_length": 5, "prompt_options": {"gate_per": "head"}},
    "gates of learned keys and values": DEEP | {"prompt_gate": -1.0, "prompt_options": {"kind": "kv"}},
    "rows with gates": {"prompt_gate": -1.0},
    "gates and the mean": DEEP | {"prompt_gate": -1.0, "readout": "mean"},
    "prompts with a learned bias": DEEP | {"extra_bias": "learned"},
    "prompts with the bias of the class row": {"extra_bias": "cls"},
    "a mask row at a place": DEEP | {"extra_bias": "grid:1,1"},
    "a patch replaced": DEEP | {"mask_mode": "replace"},
    "a learned mask token": DEEP | {"train_mask_token": True},
    "a learned token head": DEEP | {"train_lm_head": True},
    "the class row": DEEP | {"readout": "cls"},
    "the mean": DEEP | {"readout": "mean"},
    "prototypes of another size": DEEP | {"prototype_dim": 4},
    "prototypes in token space": {"prototype_dim": None},
    "prototypes of softmax tokens": DEEP | {"token_activation": "softmax"},
    "prototypes of the hidden state": DEEP | {"token_activation": "hidden"},
    "prototypes in hidden space": {"token_activation": "hidden", "prototype_dim": None},
    "a bias in the projection, a fixed temperature": DEEP | {"projection_bias": True, "temperature": 0.3},
    "linear on the hidden state": DEEP | {"verbalizer": "linear", "token_activation": "hidden"},
    "linear on tokens": {"verbalizer": "linear"},
    "linear on log-softmax tokens": DEEP | {"verbalizer": "linear", "token_activation": "log_softmax"},
    "several labels": DEEP | {"multi_label": True, "num_classes": 6},
    "several labels, shallow": {"multi_label": True, "num_classes": 1},
    "several labels, added to patches": {
        "multi_label": True,
        "prompt_options": {"placement": "add"},
        "prompt_length": 1,
        "verbalizer": "linear",
    },
}


def models(beit: torch.nn.Module | None = None, tasks: dict | None = None) -> dict[str, PromptedBEiT]:
    """A model of each task, all on one backbone, with one mask token and one token head."""
    beit = tiny_beit() if beit is None else beit
    found = {
        name: build(copy.deepcopy(beit), seed=i + 1, **options)
        for i, (name, options) in enumerate((tasks or TASKS).items())
    }
    first = next(iter(found.values()))
    for model in found.values():
        with torch.no_grad():
            if model.mask_token is not None and not model.config["train_mask_token"]:
                model.mask_token.copy_(first.mask_token)
            if model.lm_head is not None and not model.config["train_lm_head"]:
                model.lm_head.load_state_dict(first.lm_head.state_dict())
    return found


def bank_of(tasks: dict[str, PromptedBEiT], **options) -> TaskBank:
    bank = TaskBank(next(iter(tasks.values())), **options)
    for name, model in tasks.items():
        bank.add(name, model)
    return bank


def check(bank: TaskBank, tasks: dict[str, PromptedBEiT], names: list[str], at_most: float = 1e-12) -> None:
    x = images(next(iter(tasks.values())), len(names))
    scores = bank.predict(x, names)
    assert scores.shape == (len(names), max(tasks[name].num_classes for name in names))
    for i, name in enumerate(names):
        with torch.no_grad():
            own = tasks[name](x[i : i + 1])[0]
        assert relative_error(scores[i, : len(own)], own) <= at_most, name
        assert (scores[i, len(own) :] == float("-inf")).all(), name


@pytest.mark.parametrize("beit", [{}, {"use_shared_rel_pos_bias": False, "use_abs_pos_emb": True}], ids=str)
def test_every_image_gets_the_scores_of_its_own_model(beit):
    """A mixed batch of every kind of task, in an order that mixes them, twice each."""
    options = {name: o for name, o in TASKS.items() if not beit or o.get("extra_bias") != "cls"}
    tasks = models(tiny_beit(**beit), options)
    names = list(tasks)
    check(bank_of(tasks), tasks, names[::2] + names[::-1] + names[1::2])


def test_tasks_run_in_as_few_groups_as_their_kinds_allow():
    """Deep tasks of any length run together from the pool, tasks of one schedule as rows; only what must runs alone."""
    tasks = models()
    snapshot = bank_of(tasks)._snapshot
    form = {name: "alone" if task.model is not None else task.group[0] for name, task in snapshot.tasks.items()}
    assert sorted(name for name in form if form[name] == "alone") == [
        "a cross-attention",
        "a learned mask token",
        "added to patches",
        "learned keys and values of one block",
        "prompts with a learned bias",
        "prompts with the bias of the class row",
        "rows with gates",
        "several labels, added to patches",
    ]
    rows = ["another shallow", "dropped after one block", "progressive", "shallow", "shallow of another length"]
    assert set(rows) <= {name for name in form if form[name] == "rows"}
    deep = ["deep", "deep of another length", "no prompts", "linear on tokens", "prototypes of another size"]
    deep += ["several labels", "learned keys and values"]
    groups = {name: snapshot.tasks[name].group for name in tasks}
    lengths = {name: task.info.prompt_length for name, task in snapshot.tasks.items()}
    assert lengths == {name: model.config["prompt_length"] for name, model in tasks.items()}
    assert len({groups[name] for name in deep if name != "linear on tokens"}) == 1
    assert groups["shallow"] == groups["another shallow"] != groups["progressive"]
    assert groups["shallow"] == groups["several labels, shallow"]
    assert groups["gates"] == groups["gates of heads, of another length"] != groups["deep"]
    for name in ("progressive of another alpha", "progressive of learned alphas"):
        assert groups["progressive"] == groups[name], "alpha is each image's own"


@pytest.mark.parametrize("options", [{}, {"readout": "mean"}, {"readout": "mean_with_prompts"}], ids=str)
def test_vision_transformers_too(options):
    vit = tiny_vit(num_classes=0)
    kinds = [DEEP, {"prompt_length": 1}, DEEP | {"prompt_length": 2, "num_classes": 2}, {"prompt_mode": "progressive"}]
    kinds += [kind | {"prompt_gate": -1.0} for kind in kinds]
    tasks = {str(i): build_vit(copy.deepcopy(vit), seed=i, **options, **kind) for i, kind in enumerate(kinds)}
    bank, names = bank_of(tasks), ["2", "0", "3", "1", "0", *"47656"]
    x = pictures(tasks["0"], len(names))
    scores = bank.predict(x, names)
    for i, name in enumerate(names):
        with torch.no_grad():
            own = tasks[name](x[i : i + 1])[0]
        assert relative_error(scores[i, : len(own)], own) <= 1e-12, name


@pytest.mark.skipif(not has_triton(), reason="the triton package is not installed")
def test_kernels_read_each_image_s_rows_of_the_pool(monkeypatch):
    """With impl="triton" a mixed deep batch is one call per block, on the pool itself."""
    names = ("deep", "deep of another length", "no prompts", "gates", "gates of heads, of another length")
    tasks = models(tiny_beit(dim=32), {name: TASKS[name] for name in names})
    bank, calls = bank_of(tasks, impl="triton"), []

    def counted(qkv, *args, **kwargs):
        calls.append((len(qkv), kwargs["prompt_kv"]))
        return prompted_attention(qkv, *args, **kwargs)

    monkeypatch.setattr(folded, "prompted_attention", counted)
    check(bank, tasks, ["no prompts", "deep of another length", "deep", "deep"])
    mixed = [prompts for images, prompts in calls if images == 4]
    assert [prompts.data_ptr() for prompts in mixed] == [
        t.data_ptr() for t in bank._snapshot.pools["keys and values"][:2]
    ]
    calls.clear()
    check(bank, tasks, ["gates", "gates of heads, of another length", "gates of heads, of another length"])
    assert len([images for images, _ in calls if images == 3]) == 2


def test_low_precision_stays_within_the_error_of_each_model():
    names = ("deep", "deep of another length", "shallow", "progressive", "linear on tokens")
    exact = models(tasks={name: TASKS[name] for name in names})
    x = images(exact["deep"], len(names))
    for dtype in (torch.float32, torch.bfloat16):
        tasks = {name: copy.deepcopy(model).to(dtype) for name, model in exact.items()}
        found = bank_of(tasks).predict(x.to(dtype), list(names))
        for i, name in enumerate(names):
            with torch.no_grad():
                want, eager = exact[name](x[i : i + 1])[0], copy.deepcopy(tasks[name])
                eager.impl = "reference"
                eager = eager(x[i : i + 1].to(dtype))[0]
            budget = 2 * (eager.double() - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
            assert (found[i, : len(want)].double() - want).abs().max() <= budget, (name, dtype)


def test_a_task_is_what_was_added():
    """Training the model that was added, or adding another under its name after removal, changes no other answer."""
    tasks = models(tasks={"a": DEEP, "b": {}, "c": {"train_mask_token": True}})
    learned = [parameter for model in tasks.values() for parameter in model.trainable_parameters()]
    bank, x = bank_of(tasks), images(tasks["a"], 3)
    before = bank.predict(x, ["a", "b", "c"])
    with torch.no_grad():
        for parameter in learned:
            parameter.add_(1)
    assert torch.equal(bank.predict(x, ["a", "b", "c"]), before)
    bank.remove("a")
    bank.add("a", tasks["a"])
    changed = bank.predict(x, ["a", "b", "c"])
    assert not torch.equal(changed[0], before[0]) and torch.equal(changed[1:], before[1:])


def test_an_edited_backbone_is_refused():
    """Keys and values in the pool are those of the weights before: they must not be mixed with others."""
    tasks = models(tasks={"a": DEEP})
    bank = bank_of(tasks)
    with torch.no_grad():
        tasks["a"].backbone.blocks[1].attn.qkv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights of the backbone must stay as they were"):
        bank.predict(images(tasks["a"]), ["a", "a"])


def test_memory_is_that_of_the_tasks():
    """What 100 deep tasks reserve is their keys, values, heads and prototypes within 5 %, and is given back."""
    model = build(prompt_mode="deep", prompt_length=4)
    bank = TaskBank(model)
    for i in range(100):
        bank.add(f"task {i}", model)
    each = 8 * (3 * 4 * 2 * 16 + 6 * (16 + 1) + 5 * 6)
    assert bank.info("task 7").memory == each
    assert 100 * each <= bank.memory <= 1.05 * 100 * each
    gated = build(prompt_mode="deep", prompt_length=4, prompt_gate=-1.0)
    assert bank_of({"gates": gated}).info("gates").memory == each + 8 * 3 * 4 * 2
    for i in range(99):
        bank.remove(f"task {i}")
    bank.memory_limit = 2 * each
    bank.add("another", model)
    assert bank.names == ["task 99", "another"] and bank.memory == 2 * each


def test_a_full_bank_refuses_or_evicts():
    tasks = models(
        tasks={"a": DEEP, "b": DEEP | {"prompt_length": 1}, "c": DEEP, "large": DEEP | {"prompt_length": 30}}
    )
    each = [bank_of({name: model}).memory for name, model in tasks.items()]
    full = bank_of({name: tasks[name] for name in "ab"}, memory_limit=sum(each[:2]) + 8)
    with pytest.raises(MemoryError, match=rf"^'c' takes {each[2]:,} bytes, the bank's 2 tasks take .* of memory_limit"):
        full.add("c", tasks["c"])
    check(full, tasks, ["b", "a"])

    evicting = bank_of({name: tasks[name] for name in "ab"}, memory_limit=sum(each[:2]) + 8, when_full="evict")
    check(evicting, tasks, ["a"])
    evicting.add("c", tasks["c"])  # b was used before a, and leaves too little: then a goes too
    assert "b" not in evicting and "c" in evicting
    check(evicting, tasks, evicting.names)
    with pytest.raises(MemoryError, match="the bank's 0 tasks take 0"):
        evicting.add("large", tasks["large"])


def test_threads_add_remove_and_predict_at_once():
    """Every answer is right while tasks come and go under it, in a bank that is always full and reuses rows."""
    lengths = {f"t{i}": DEEP | {"prompt_length": 1 + i % 4} for i in range(6)} | {"kept": DEEP, "rows": {}}
    tasks = models(tasks=lengths)
    bank = bank_of(tasks)
    bank.memory_limit = bank.memory
    stop, failures = threading.Event(), []

    def churn(offset: int) -> None:
        for step in range(40):
            name = f"t{(step * 5 + offset) % 6}"
            try:
                bank.remove(name)
                bank.add(name, tasks[name])
            except (ValueError, MemoryError):  # the other thread has it at the moment, or took its place
                pass

    def ask(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        while not stop.is_set():
            names = [list(lengths)[i] for i in torch.randint(len(lengths), (4,), generator=generator).tolist()]
            try:
                check(bank, tasks, names)
            except ValueError as error:
                if "must be one of the bank's" not in str(error):
                    failures.append(error)
            except BaseException as error:
                failures.append(error)

    asking = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
    churning = [threading.Thread(target=churn, args=(offset,)) for offset in range(2)]
    for thread in asking + churning:
        thread.start()
    for thread in churning:
        thread.join()
    stop.set()
    for thread in asking:
        thread.join()
    assert not failures, failures[0]
    assert not bank._readers


def test_rows_are_not_reused_while_they_are_read():
    """A prediction that began before a task was removed reads that task's rows to its end."""
    tasks = models(tasks={"old": DEEP, "new": DEEP})
    bank = bank_of({"old": tasks["old"]})
    x = images(tasks["old"], 1)
    with bank._reading(["old"]) as snapshot:
        bank.remove("old")
        bank.add("new", tasks["new"])
        with torch.no_grad():
            scores = bank._predict(snapshot, x, [snapshot.tasks["old"]])
            assert relative_error(scores, tasks["old"](x)) <= 1e-12
    capacity = bank._pools["keys and values"].capacity
    bank.remove("new")
    bank.add("third", tasks["old"])
    assert bank._pools["keys and values"].capacity == capacity


def test_a_pool_gives_out_every_row_once():
    pool = Pool([(2,), (3, 1)], torch.float32, torch.device("cpu"))
    pool.grow(10)
    starts = [pool.take(length) for length in (3, 4, 3)]
    assert starts == [0, 3, 7] and pool.find(1) is None and pool.used == 10
    for tensor in pool.tensors:
        tensor[3:7] = 5
    pool.give_back(0, 3)
    pool.give_back(7, 3)
    assert pool.find(4) is None and pool.grown(4) == 11 and pool.row_bytes == 4 * 5
    assert pool.pack([(3, 4)]) == [0] and pool.capacity == 4 and all(bool((t == 5).all()) for t in pool.tensors)


def test_labels_are_each_task_s_own():
    """In a bank of tasks of one label and of several: the softmax of some, of others all sigmoids that reach their own
    threshold, as `predict` of each model alone; one threshold for a call replaces those of the tasks."""
    tasks = models(tasks={name: TASKS[name] for name in ("deep", "several labels", "several labels, shallow")})
    tasks["all"] = tasks["several labels"]
    bank = TaskBank(next(iter(tasks.values())), threshold=0.45)
    for name, least in (("deep", None), ("several labels", 0.55), ("several labels, shallow", None), ("all", 0)):
        bank.add(name, tasks[name], threshold=least)
    assert [bank.info(name).threshold for name in bank.names] == [None, 0.55, 0.45, 0.0]
    x = images(tasks["deep"], 4)
    for asked in (None, 0.6):
        found = predict(bank, x, threshold=asked)
        for name, own in tasks.items():
            given = {} if name == "deep" else {"threshold": bank.info(name).threshold if asked is None else asked}
            alone = predict(own, x, **given)
            for mixed, single in zip([each for each in found if each.task == name], alone, strict=True):
                assert [label for label, _ in mixed.top] == [label for label, _ in single.top], name
                assert [share for _, share in mixed.top] == pytest.approx([share for _, share in single.top], rel=1e-6)
    counts = {name: {len(each.top) for each in predict(bank, x) if each.task == name} for name in tasks}
    assert counts["all"] == {6} and counts["deep"] == {5}, "all labels, where five are the most of a task of one label"
    assert len(counts["several labels"]) > 1, "a threshold that all labels or none of every image reach proves nothing"
    assert {len(each.top) for each in predict(tasks["all"], x, top=2, threshold=0)} == {2}


def test_empty_batches_have_empty_results():
    bank = bank_of(models(tasks={"a": DEEP}))
    assert bank.predict(torch.zeros(0, 3, 8, 12, dtype=torch.float64), []).shape == (0, 0)


BAD = {
    "task must be one of the bank's 1, got 'clothe', did you mean 'clothes'?": lambda b, m: b.predict(
        images(m), ["clothes", "clothe"]
    ),
    "tasks must be a name for each of 2 images, got 1": lambda b, m: b.predict(images(m), ["clothes"]),
    "tasks must be a name for each image, got str": lambda b, m: b.predict(images(m), "clothes"),
    "images must be (B, 3, 8, 12), got (2, 3, 8, 8)": lambda b, m: b.predict(images(m)[..., :8], ["clothes"] * 2),
    "name must not be in use, got 'clothes'": lambda b, m: b.add("clothes", m),
    "name must be a string that is not empty, got ''": lambda b, m: b.add("", m),
    "task must be one of the bank's 1, got 'shoes'": lambda b, m: b.remove("shoes"),
    "backbone must be the bank's, of weight hash sha256:": lambda b, m: b.add("x", build(tiny_beit(seed=3))),
    "images must be (channels, height, width) (3, 8, 12), the bank's, got (3, 12, 12)": lambda b, m: b.add(
        "x", build(tiny_beit((3, 3)))
    ),
    "must be a PromptedBEiT, as the backbone of the bank is, got a PromptedViT": lambda b, m: b.add("x", build_vit()),
    "x: threshold must be left out for a model of one label an image, got 0.5": lambda b, m: b.add(
        "x", m, threshold=0.5
    ),
    "threshold must be in [0, 1], got 1.5": lambda b, m: TaskBank(m, threshold=1.5),
    "threshold must be left out for a model of one label an image, got 0.3": lambda b, m: predict(
        b, images(m), threshold=0.3
    ),
    "a TaskBank needs the original weights, freeze_for_inference dropped them": lambda b, m: TaskBank(
        copy.deepcopy(m).freeze_for_inference()
    ),
    "when_full must be one of refuse, evict, got 'lru'": lambda b, m: TaskBank(m, when_full="lru"),
    "memory_limit must be bytes >= 1 or None, got 0": lambda b, m: TaskBank(m, memory_limit=0),
    "impl must be one of auto, triton, torch for a TaskBank": lambda b, m: TaskBank(m, impl="reference"),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_calls_are_one_clear_line(message):
    model = build()
    bank = bank_of({"clothes": model})
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(message)) as error:
        BAD[message](bank, model)
    assert "\n" not in str(error.value) and bank.names == ["clothes"]


def test_adapter_folders_share_the_backbone(tmp_path):
    """A folder is read onto the weights that are there; what is damaged, or of other weights, changes nothing."""
    tasks = {}
    for i, options in enumerate([DEEP | {"train_lm_head": True}, {}]):
        torch.manual_seed(i)
        tasks[str(i)] = PromptedBEiT("builtin", 3 + i, prompt_length=2, **options).eval()
        tasks[str(i)].class_names = [f"kind {k}" for k in range(3 + i)]
        save_adapter(tasks[str(i)], tmp_path / str(i))
    bank = TaskBank("builtin")
    head = bank._model.lm_head.weight.clone()
    for name in tasks:
        bank.add(name, tmp_path / name)
    assert torch.equal(bank._model.lm_head.weight, head)
    assert bank.info("1").class_names == ("kind 0", "kind 1", "kind 2", "kind 3")
    x = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        for i, name in enumerate(tasks):
            found = bank.predict(x, ["0", "1"])[i, : 3 + i]
            torch.testing.assert_close(found, tasks[name](x)[i], rtol=0, atol=2e-5)
    weights = {id(task.model.backbone) for task in bank._snapshot.tasks.values() if task.model is not None}
    assert weights <= {id(bank._model.backbone)}

    with torch.no_grad():
        tasks["1"].backbone.blocks[0].norm1.weight.mul_(2)
    save_adapter(tasks["1"], tmp_path / "edited")
    (tmp_path / "1" / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    for folder, message in (
        ("edited", "backbone must be the bank's, of weight hash sha256:"),
        ("1", "must be a safetensors file"),
        ("nowhere", "adapter folder not found"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            bank.add("another", tmp_path / folder)
    assert bank.names == ["0", "1"]


def test_a_bank_of_another_type_checks_adapters_as_they_were_saved(tmp_path):
    """Weights in bfloat16 have another hash than those an adapter was trained on: they are compared before the cast."""
    model = PromptedBEiT("builtin", 3, prompt_mode="deep").eval()
    save_adapter(model, tmp_path)
    bank = TaskBank("builtin", dtype=torch.bfloat16)
    bank.add("folder", tmp_path)
    bank.add("model", model)
    x = torch.randn(1, 1, 28, 28)
    scores = bank.predict(torch.cat([x, x]).bfloat16(), ["folder", "model"])
    assert scores.dtype == torch.bfloat16 and torch.equal(scores[0], scores[1])
    with torch.no_grad():
        assert (scores[0].float() - model(x)[0]).abs().max() < 0.5


def test_values_beyond_the_type_of_the_bank_are_refused():
    """70000 is infinite in float16, and every score of the task would be NaN."""
    bank = TaskBank("builtin", dtype=torch.float16)
    model = PromptedBEiT("builtin", 3).eval()
    model.prompts.weight.data[0, 1, 2] = 70000.0
    with pytest.raises(
        ValueError, match=r"^shoes: prompts\.weight must be finite as torch\.float16, got 70000\.0 at \[0, 1, 2\]$"
    ):
        bank.add("shoes", model)
    assert bank.names == []
