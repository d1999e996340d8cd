"""Every setting once: its name, type, choices, default, and what it does.

The keywords of `vptm.PromptedBEiT`, `vptm.PromptedViT`, `vptm.PromptBank` and `vptm.fit`, the options of `vptm train`,
the keys of recipes and what an adapter and a run keep follow from the dataclasses here. An instance is checked: its
choices are in their set, its switches are True or False. Nothing that takes time is imported, so that the command line
can show its help at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cache
from inspect import get_annotations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints, overload

from vptm.messages import check_integer, check_range, one_line, one_of

Implementation = Literal["auto", "triton", "torch", "reference"]
PromptMode = Literal["shallow", "deep", "progressive"]
Placement = Literal["prepend", "add"]
PromptKind = Literal["tokens", "kv", "cross"]
ProjectionPer = Literal["model", "block"]
AddedTo = Literal["patches", "class_and_patches"]
AfterPrompts = Literal["carry", "drop"]
DropoutPer = Literal["sample", "batch"]
GatePer = Literal["prompt", "head"]
Readout = Literal["mask", "cls", "mean", "map", "mean_with_prompts"]
BEiTReadout = Literal["mask", "cls", "mean"]
ViTReadout = Literal["cls", "mean", "map", "mean_with_prompts", "mask"]
MaskMode = Literal["insert", "replace"]
VerbalizerName = Literal["prototypical", "linear", "class_embeddings"]
TokenActivation = Literal["hidden", "logits", "softmax", "log_softmax"]
Schedule = Literal["cosine", "tanh", "none", "vpt", "spt", "provp"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
LearnedGroup = Literal["prompts", "gate", "alpha", "verbalizer", "temperature", "mask_token", "lm_head", "backbone"]
PromptStart = Literal["uniform", "random", "mean", "max", "kmeans", "vipamin"]
PrototypeStart = Literal["xavier", "class_means", "whitened"]
OnBadImage = Literal["error", "skip"]
ExportFormat = Literal["pt2", "aoti", "onnx", "safetensors"]
RowFormat = Literal["csv", "jsonl"]
Split = Literal["test", "val", "train"]
MappingMethod = Literal["semantic", "random", "flm", "ilm", "blm"]
Assignment = Literal["argmax", "hungarian", "greedy", "round_robin", "top", "threshold"]
Aggregation = Literal["mean", "max", "logsumexp", "mean_prob"]
PixelPrompt = Literal["expansive", "additive"]

PROMPT_LOCATION = (
    "prompt_location is ignored and will be refused: the place of prompts among the rows cannot change what attention "
    "computes"
)
FREE_ON_RESUME = frozenset(
    {"device", "impl", "log", "workers", "grad_checkpointing"}
)  # these change nothing of what a run learns
WHITENED_LR, RANDOM_LR = 0.0005, 0.002
MUTED_GATE = -4.0  # 50 prompts then weigh less than one key
EVALUATION_BATCH = 256  # images per step where nothing is learned
THRESHOLD = 0.5  # least probability of a label where an image has several, unless another is asked for
_GROUPS = ", ".join(get_args(LearnedGroup))

Group = TypeVar("Group", bound="SettingsGroup")


@dataclass(frozen=True)
class Help:
    """What the command line says of a setting.

    command: its default in `vptm train`, where that is not the one in Python. option: its name there, where it is
    another; None for a setting that is no option. switch: it can only be turned on. within: the range of a number, in
    words that `check_range` knows; none: what None means beside it, where it may be None. follows: its default in `vptm
    train` in words, where that depends on other options, as `_following` says.
    """

    text: str = ""
    command: Any = None
    follows: str = ""
    option: str | None = ""
    switch: bool = False
    within: str = ""
    none: str = "or None"


NO_OPTION = Help(option=None)


_READ: dict[type, tuple[dict[str, Any], dict[str, Help]]] = {}


def _read(group: type[SettingsGroup]) -> tuple[dict[str, Any], dict[str, Help]]:
    """{name of a setting: its type} and {name: what the command line says of it}, read once for a class; a class that
    changes a default keeps the help."""
    if group not in _READ:
        inherited = _read(group.__base__) if group.__base__ is not object else ({}, {})  # type: ignore[arg-type]
        kinds, found = map(dict, inherited)
        for name, kind in get_type_hints(group, include_extras=True).items():
            if name in get_annotations(group) and get_origin(kind) is not ClassVar:
                marks = [mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, Help)]
                kinds[name] = get_args(kind)[0] if marks else kind
                found[name] = marks[0] if marks else found.get(name, Help())
        _READ[group] = kinds, found
    return _READ[group]


def _types(group: type[SettingsGroup]) -> dict[str, Any]:
    return _read(group)[0]


def _help(group: type[SettingsGroup]) -> dict[str, Help]:
    return _read(group)[1]


def _allowed(kind: Any) -> tuple[str, ...]:
    """The words of a Literal, alone or beside None; nothing of another type."""
    found = next((part for part in (kind, *get_args(kind)) if get_origin(part) is Literal), None)
    return get_args(found)


@dataclass(frozen=True)
class SettingsGroup:
    """Settings that go together, checked when they are made."""

    def __post_init__(self) -> None:
        for name, kind in _types(type(self)).items():
            value = getattr(self, name)
            if (allowed := _allowed(kind)) and not (value is None and type(None) in get_args(kind)):
                one_of(self._label(name), value, allowed)
            elif kind is bool and not isinstance(value, bool):
                raise TypeError(f"{self._label(name)} must be True or False, got {value!r}")
            if (told := _help(type(self))[name]).within:
                several = isinstance(value, list | tuple) and Sequence[float] in get_args(kind)
                none = told.none if type(None) in get_args(kind) else None
                for one in value if several else [value]:
                    check_range(self._label(name), one, told.within, optional=none)

    @staticmethod
    def _label(name: str) -> str:
        """What messages call a setting."""
        return name

    @classmethod
    def options_of(cls) -> dict[str, Option]:
        """The options that stand for this group's settings, by name; those that others have, too, come last."""
        inherited = {name for one in cls.__mro__[1:] for name in get_annotations(one)}
        found = sorted(_options_of(cls).items(), key=lambda option: option[1] in inherited)
        return {option: _option(option, name, cls) for option, name in found}

    @classmethod
    def of(cls: type[Group], values: Mapping[str, Any]) -> Group:
        """Those of `values` that are settings of this group, such as the `locals()` of a function that takes them."""
        return cls(**{name: values[name] for name in names(cls) if name in values})

    def keywords(self) -> dict[str, Any]:
        """The settings by name, as keywords of what takes them."""
        return {name: getattr(self, name) for name in names(type(self))}


@dataclass(frozen=True)
class PromptSettings(SettingsGroup):
    """What `prompt_options` may hold: further arguments of `vptm.PromptBank`."""

    blocks: Annotated[
        int | None,
        Help("Only the first N blocks have prompts, or the last -N; all by default.", option="prompt_blocks"),
    ] = None
    after: Annotated[
        AfterPrompts, Help("What blocks after the first N do with the prompts.", option="prompt_after")
    ] = "carry"
    shared: Annotated[bool, Help("One prompt for all blocks.", option="prompt_shared")] = False
    prompt_dim: Annotated[int | None, Help("Width of prompts that a learned projection maps to tokens.")] = None
    projection_per: Annotated[
        ProjectionPer,
        Help(
            "What has a projection of its own: the model, with a bias, or every block, without (BPT).",
            option="prompt_projection_per",
        ),
    ] = "model"
    kind: Annotated[
        PromptKind,
        Help(
            "What is learned: tokens, which a block projects to keys and values, kv, these themselves, or cross, "
            "tokens in a cross-attention of their own.",
            option="prompt_kind",
        ),
    ] = "tokens"
    placement: Annotated[
        Placement, Help("Prompts have rows of their own, or are added to the patch tokens.", option="prompt_placement")
    ] = "prepend"
    added_to: Annotated[
        AddedTo,
        Help("Rows that added prompts are added to; VPT's code has the class row, too.", option="prompt_added_to"),
    ] = "patches"
    dropout_per: Annotated[DropoutPer, Help("What has a dropout mask of its own.", option="prompt_dropout_per")] = (
        "sample"
    )
    gate_per: Annotated[
        GatePer, Help("What has a gate of its own: each prompt in each head, or each head.", option="prompt_gate_per")
    ] = "prompt"
    train_alpha: Annotated[
        bool, Help("Also learn --progressive-alpha, for every block that mixes.", option="train_alpha")
    ] = False
    patch_values: Annotated[int | None, NO_OPTION] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("prompt_dim", self.prompt_dim, 1, optional=True)
        check_integer("patch_values", self.patch_values, 1, optional=True)


@dataclass(frozen=True)
class ModelSettings(SettingsGroup):
    """Keywords that every prompted model takes; `MODEL_SETTINGS` has those of each kind, with its defaults."""

    whom: ClassVar[str]

    prompt_length: Annotated[int, Help("Prompts per layer.")] = 10
    prompt_mode: Annotated[
        PromptMode,
        Help(
            "Where prompts enter.",
            follows="deep; shallow for a BEiT without a mask token, or with a recipe that does not say",
        ),
    ] = "shallow"
    prompt_dropout: Annotated[float, Help("Dropout of prompts.", within="in [0, 1)")] = 0.0
    progressive_alpha: Annotated[float | Sequence[float], Help("Alpha of progressive prompts.", within="in [0, 1]")] = (
        0.01
    )
    prompt_gate: Annotated[
        float | None,
        Help(
            "Start of learned gates that add to what attention scores with prompts, or none.",
            follows="-4 for a BEiT with a mask token, prompts among the keys and no recipe, else none",
            within="finite",
            none="or None for no gate",
        ),
    ] = None
    prompt_options: Annotated[Mapping[str, Any] | None, NO_OPTION] = None
    readout: Annotated[Readout, Help("Row that the verbalizer reads.")] = "mask"
    train_lm_head: Annotated[bool, Help("Also learn the visual-token head.")] = False
    verbalizer: Annotated[VerbalizerName, Help("What maps the read-out to labels.")] = "prototypical"
    prototype_dim: Annotated[int | None, Help("Dimension of the prototypes.")] = 128
    token_activation: Annotated[TokenActivation, Help("What the verbalizer reads.")] = "logits"
    projection_bias: Annotated[
        bool, Help("Bias in the prototype projection.", follows="on where prototypes start whitened, else off")
    ] = False
    temperature: Annotated[
        float | None,
        Help("Fixed temperature; learned from 0.1 by default.", within="finite and > 0", none="or None to learn it"),
    ] = None
    img_size: Annotated[int | tuple[int, int] | None, Help("Pixels; the model's own by default.")] = None
    dynamic_img_size: Annotated[bool, NO_OPTION] = False
    pretrained: Annotated[bool, NO_OPTION] = False
    multi_label: Annotated[
        bool,
        Help("An image has any number of labels: sigmoid, binary cross-entropy, mean average precision.", switch=True),
    ] = False
    impl: Annotated[Implementation, Help("What computes.")] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("prompt_length", self.prompt_length, 0)
        if not isinstance(self.prompt_options, Mapping | None):
            raise TypeError(f"prompt_options must be a mapping or None, got {self.prompt_options!r}")
        check_integer("prototype_dim", self.prototype_dim, 1, optional=True)

    def config(self) -> dict[str, Any]:
        """What an adapter keeps, with values that JSON has: every setting but the implementation."""
        return {name: _plain(value) for name, value in self.keywords().items() if name != "impl"}


@dataclass(frozen=True)
class BEiTSettings(ModelSettings):
    """Keywords of `vptm.PromptedBEiT`: the read-out is the mask row of masked-modelling weights."""

    whom: ClassVar[str] = "a BEiT"

    readout: BEiTReadout = "mask"
    mask_mode: Annotated[MaskMode, Help("A row of its own, or in place of a patch.")] = "insert"
    train_mask_token: Annotated[bool, Help("Also learn the mask token.")] = False
    extra_bias: Annotated[str, Help("Position bias of prompts and mask: zero, cls, neutral, grid:y,x or learned.")] = (
        "zero"
    )
    vocab_size: Annotated[int, NO_OPTION] = 8192


@dataclass(frozen=True)
class ClassifierBEiTSettings(BEiTSettings):
    """`vptm.open_model`'s defaults for a BEiT without mask token and token head: VPT on its class row."""

    whom: ClassVar[str] = "a BEiT without a mask token"

    readout: BEiTReadout = "cls"
    verbalizer: VerbalizerName = "linear"
    token_activation: TokenActivation = "hidden"


@dataclass(frozen=True)
class ViTSettings(ModelSettings):
    """Keywords of `vptm.PromptedViT`: VPT-deep."""

    whom: ClassVar[str] = "a ViT"

    prompt_mode: PromptMode = "deep"
    readout: ViTReadout = "cls"
    verbalizer: VerbalizerName = "linear"
    token_activation: TokenActivation = "hidden"
    architecture: Annotated[
        str | None,
        Help("timm name of what a file of a ViT holds, where it does not tell its heads, eps or activation."),
    ] = None
    codebook: Annotated[
        Any | None,
        Help("File of the (V, C) visual tokens that --token-activation reads, where the weights have no token head."),
    ] = None


@dataclass(frozen=True)
class PooledViTSettings(ViTSettings):
    """`vptm.open_model`'s defaults for a ViT that its source reads by attention pooling: SigLIP."""

    whom: ClassVar[str] = "a ViT with attention pooling"

    readout: ViTReadout = "map"


@dataclass(frozen=True)
class ClasslessViTSettings(ViTSettings):
    """`vptm.open_model`'s defaults for a ViT without a class token: the mean of its patches."""

    whom: ClassVar[str] = "a ViT without a class token"

    readout: ViTReadout = "mean"


MODEL_SETTINGS: dict[str, type[ModelSettings]] = {
    "beit": BEiTSettings,
    "classifier_beit": ClassifierBEiTSettings,
    "vit": ViTSettings,
    "pooled_vit": PooledViTSettings,
    "classless_vit": ClasslessViTSettings,
}


@dataclass(frozen=True)
class TrainSettings(SettingsGroup):
    """Keywords of `vptm.fit` that decide what is learned."""

    epochs: Annotated[int, Help("Passes over the training images.", command=80)]
    lr: Annotated[
        float,
        Help(
            "Peak learning rate.",
            follows=f"{WHITENED_LR} where prototypes start whitened, else {RANDOM_LR}",
            within="finite and > 0",
        ),
    ]
    weight_decay: Annotated[float, Help("Weight decay of matrices.", command=0.1, within="finite and >= 0")] = 0.0
    optimizer: Annotated[str, Help("A timm optimiser.")] = "adamw"
    schedule: Annotated[Schedule, Help("Of the learning rate.")] = "cosine"
    warmup_epochs: Annotated[int, Help("Epochs of linear warm-up, part of --epochs.")] = 0
    label_smoothing: Annotated[float, Help("In [0, 1).", within="in [0, 1)")] = 0.0
    class_weights: Annotated[
        str | Sequence[float] | None,
        Help("Weight of each class in the loss: balanced, or a number for each with commas; all alike by default."),
    ] = None
    protoverb_weight: Annotated[
        float, Help("Of ProtoVerb's contrast losses in every step.", within="finite and >= 0")
    ] = 0.0
    reformation: Annotated[
        float, Help("Of ProVP-Ref's contrast with the features of the frozen model.", within="finite and >= 0")
    ] = 0.0
    reformation_temperature: Annotated[float, Help("Of that contrast.", within="finite and > 0")] = 1.0
    prompt_weight_decay: Annotated[
        float | None, Help("Weight decay of prompts; none by default.", within="finite and >= 0")
    ] = None
    head_weight_decay: Annotated[
        float | None, Help("Of the verbalizer's matrices; --weight-decay by default.", within="finite and >= 0")
    ] = None
    relative_prompt_lr: Annotated[
        bool, Help("Multiply the rate of prompts by how much longer they start than uniform ones, as tokens do.")
    ] = False
    lr_of: Annotated[
        Mapping[str, float] | None,
        Help(f"Peak learning rates of their own, as prompts=0.1,temperature=0: of {_GROUPS}; --lr by default."),
    ] = None
    weight_decay_of: Annotated[
        Mapping[str, float] | None, Help("Weight decays of their own, of those groups; see --weight-decay.")
    ] = None
    precision: Annotated[
        Precision | None,
        Help(
            "What computes in: auto is bf16 on a GPU that has it, else fp32; learned values are fp32.", command="auto"
        ),
    ] = None
    compile: Annotated[bool, Help("Compile the model; the first steps then take long.", switch=True)] = False
    cuda_graph: Annotated[
        bool, Help("Record what a batch launches on a GPU once, and replay it as one launch.", switch=True)
    ] = False
    accumulate: Annotated[int, Help("Parts that a batch is computed in, one after the other, to save memory.")] = 1
    grad_checkpointing: Annotated[
        bool, Help("Compute the blocks again in backward rather than keep what they made.", switch=True)
    ] = False
    clip_norm: Annotated[
        float | None,
        Help("Longest gradient of a step, longer ones are scaled; any by default.", within="finite and > 0"),
    ] = None
    ema: Annotated[
        float | None,
        Help(
            "Decay of an average of what is learned, which answers in its place; none by default.", within="in (0, 1)"
        ),
    ] = None
    early_stopping: Annotated[
        int | None, Help("Stop after so many epochs in a row that are not better on validation images.")
    ] = None
    val_every: Annotated[
        int, Help("Epochs from one look at validation images to the next; there is one after the last.")
    ] = 1
    seed: Annotated[int, Help("Of initialisation, drawn shots, order and augmentation.")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr_of", "weight_decay_of"):
            object.__setattr__(self, name, _of_groups(name, getattr(self, name)))
        for name, lowest in (
            ("epochs", 1),
            ("warmup_epochs", None),
            ("accumulate", 1),
            ("early_stopping", 1),
            ("val_every", 1),
        ):
            value, none = getattr(self, name), ", or None" if name == "early_stopping" else ""
            if none and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer{none}, got {value!r}")
            if lowest is not None and value < lowest:
                raise ValueError(f"{name} must be >= {lowest}{none}, got {value}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs must be >= 0 and < epochs={self.epochs}, got {self.warmup_epochs}")
        if self.relative_prompt_lr and (self.lr_of or {}).get("prompts") == 0:
            raise ValueError("relative_prompt_lr needs a rate of prompts above 0, got lr_of with prompts=0")
        for name, group in (("prompt_weight_decay", "prompts"), ("head_weight_decay", "verbalizer")):
            if getattr(self, name) is not None and group in (self.weight_decay_of or {}):
                raise ValueError(f"weight_decay_of must leave {group} out where {name} is given, got both")


@dataclass(frozen=True)
class CommandSettings(SettingsGroup):
    """What a command is told; messages name a setting as its option."""

    @staticmethod
    def _label(name: str) -> str:
        return option_name(name)

    def _at_least(self, lowest: int, *found: str) -> None:
        for name in found:
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{self._label(name)} must be >= {lowest}, got {value}")


@dataclass(frozen=True)
class PictureSettings(CommandSettings):
    """How pictures are read, and where they are computed on."""

    background: Annotated[str, Help("Colour under what is transparent in a picture, by name or as #rrggbb.")] = "white"
    value_range: Annotated[
        str | None,
        Help(
            "LOW,HIGH: darkest and brightest value of pictures of more than 8 bits; by default the file's depth, which "
            "signed, 32-bit and floating-point files lack."
        ),
    ] = None
    device: Annotated[str, Help("auto, cpu, cuda or cuda:N; auto is a GPU where there is one.")] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_range(self.value_range)

    def reading(self) -> dict[str, Any]:
        """The keywords of `vptm.load_data` for them."""
        return {"background": self.background, "value_range": parse_range(self.value_range)}


@dataclass(frozen=True)
class RunSettings(PictureSettings):
    """Everything that `vptm train` is told about a run: what to learn, from which images, and how.

    In files and on the command line a run's settings are flat, see `options` and `from_options`.
    """

    model: Annotated[
        str,
        Help(
            "builtin, a .pth, .safetensors or .npz file of a BEiT or ViT, a Hugging Face folder or id, or a timm name."
        ),
    ] = "builtin"
    data: Annotated[
        str,
        Help(
            "builtin, fashion-mnist, digits, mnist5k, stamps, a folder of class folders, a .csv of "
            "path,label[,split], a published list (train800.txt, train.json, split_zhou_NAME.json), a .jsonl for "
            "--multi-label, "
            "hf:NAME_OR_FOLDER of datasets, wds/SHARDS, or torch/NAME:FOLDER."
        ),
    ] = "builtin"
    recipe: Annotated[
        str | None,
        Help(
            "Settings of a published method, by name (any unknown name lists them) or from a .yaml file; options given "
            "here go before it, and --epochs scales its warm-up."
        ),
    ] = None
    shots: Annotated[str, Help("Training images per class, or all.")] = "16"
    batch_size: Annotated[int, Help("Images per step.")] = 32
    balanced_sampler: Annotated[
        bool, Help("Draw training images, with replacement, so that every class is as likely.", switch=True)
    ] = False
    augment: Annotated[bool, Help("Random shift or crop, and mirror, of training images.")] = True
    flip: Annotated[bool | None, Help("Mirror training images; by default not for digits.")] = None
    prompt_init: Annotated[
        PromptStart, Help("Where prompts start: uniform, at tokens of the model (SPT), or by VIPAMIN.")
    ] = "uniform"
    init_images: Annotated[
        int | None, Help("Images such tokens are drawn from; all training images by default, 256 for vipamin.")
    ] = None
    init_neighbours: Annotated[int, Help("Patches that a prompt of vipamin starts as the mean of.")] = 8
    init_orthogonal: Annotated[
        float, Help("Share of what self-attention does not span in a prompt of vipamin, in [0, 1].", within="in [0, 1]")
    ] = 0.5
    init_rescale: Annotated[
        bool, Help("Scale such tokens to the size of a uniform start, about a tenth of theirs.")
    ] = False
    prototype_init: Annotated[
        PrototypeStart,
        Help(
            "Where prototypes start: at random, at the class means of the images, or at those in a space where classes "
            "are round.",
            follows="whitened, or class_means where the verbalizer cannot be, for a prototypical verbalizer, one label "
            "an image and no recipe, else xavier",
        ),
    ] = "whitened"
    prototype_steps: Annotated[
        int, Help("Steps on projection and prototypes alone after training, by ProtoVerb's losses.")
    ] = 0
    prototype_lr: Annotated[float, Help("Learning rate of --prototype-steps.", within="finite and > 0")] = 0.001
    finetune: Annotated[bool, Help("Also train every weight of the backbone.", switch=True)] = False
    shuffle_labels: Annotated[
        bool, Help("A control: permute train and val labels; test falls to chance.", switch=True)
    ] = False
    on_bad_image: Annotated[
        OnBadImage, Help("Broken image files among those that are read: stop and name the file, or report and go on.")
    ] = "error"
    test: Annotated[bool, Help("Read the test images, once, at the end.")] = True
    workers: Annotated[
        int | None, Help("Processes that read images; by default up to 8 where a GPU computes, else none.")
    ] = None
    log: Annotated[
        str | None,
        Help(
            "Also show curves in tensorboard, in the run folder, or in a tracker that Accelerate knows: wandb, mlflow, "
            "comet_ml, aim, clearml, dvclive, swanlab or trackio."
        ),
    ] = None
    model_settings: Annotated[ModelSettings, NO_OPTION] = field(
        default_factory=lambda: RunSettings.from_options({}, "beit").model_settings
    )
    train_settings: Annotated[TrainSettings, NO_OPTION] = field(
        default_factory=lambda: RunSettings.from_options({}, "beit").train_settings
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_shots(self.shots)
        self._at_least(1, "batch_size")
        self._at_least(0, "workers", "prototype_steps")
        self._at_least(1, "init_images", "init_neighbours")
        for name, default in (("init_neighbours", 8), ("init_orthogonal", 0.5)):
            if getattr(self, name) != default and self.prompt_init != "vipamin":
                raise ValueError(f"{self._label(name)} needs --prompt-init vipamin, got {self.prompt_init}")
        relative = self.train_settings.relative_prompt_lr
        for name, given in (("init_rescale", self.init_rescale), ("relative_prompt_lr", relative)):
            if given and self.prompt_init == "uniform":
                raise ValueError(f"{self._label(name)} needs a --prompt-init from tokens, got uniform")
        if self.init_rescale and relative:
            raise ValueError("--init-rescale and --relative-prompt-lr exclude each other: either does it all")
        if not 0 <= self.train_settings.seed < 2**32:
            raise ValueError(f"--seed must be in 0..2^32-1, got {self.train_settings.seed}")
        if parse_weights(self.train_settings.class_weights) == "balanced" and self.balanced_sampler:
            raise ValueError("--balanced-sampler and --class-weights balanced exclude each other: each does it all")
        if self.model_settings.multi_label:
            only = {"shots": "all", "balanced_sampler": False, "prototype_steps": 0, "prototype_init": "xavier"}
            for name, value in only.items():
                if (given := getattr(self, name)) != value:
                    raise ValueError(f"{self._label(name)} must be {value} with --multi-label, got {given}")
        verbalizer = self.model_settings.verbalizer
        if verbalizer == "class_embeddings":
            raise ValueError(
                "--verbalizer must be prototypical or linear in a run, got class_embeddings: those are given to "
                "`vptm protocol`"
            )
        for name, unused in (("prototype_steps", 0), ("prototype_init", "xavier")):
            if getattr(self, name) != unused and verbalizer != "prototypical":
                raise ValueError(f"{self._label(name)} needs --verbalizer prototypical, got {verbalizer}")
        model = self.model_settings
        needed = _needed_to_whiten(model.token_activation, model.prototype_dim, model.projection_bias)
        if self.prototype_init == "whitened" and needed is not None:
            raise ValueError(f"--prototype-init whitened needs {needed}")

    def options(self) -> dict[str, Any]:
        """Every setting by the name of its option, as `run.json` keeps them."""
        prompts = PromptSettings(**(self.model_settings.prompt_options or {}))
        flat: dict[str, Any] = {}
        for group in (self, self.model_settings, prompts, self.train_settings):
            flat |= {option: getattr(group, name) for option, name in _options_of(type(group)).items()}
        return {name: numbers_text(value) if isinstance(value, Mapping) else value for name, value in flat.items()}

    @classmethod
    def from_options(cls, values: Mapping[str, Any], kind: str) -> RunSettings:
        """The settings that options describe for a kind of model, a key of `MODEL_SETTINGS`.

        Of the options that are not there, and of those that are None where None says nothing, the defaults count.

        Raises:
            ValueError: an option that this kind of model does not take and that is not at its default.
        """
        known = train_options()
        given = {name: value for name, value in values.items() if value is not None or known[name].optional}
        for name, value in given.items():
            if known[name].numbers and isinstance(value, str):
                given[name] = parse_numbers(name, value)
        group = MODEL_SETTINGS[kind]
        for name, option in known.items():
            elsewhere = option.defaults.keys() and kind not in option.defaults
            if elsewhere and name in given and given[name] not in option.defaults.values():
                raise ValueError(
                    f"{option_name(name)} is for {'ViT' if 'vit' in option.defaults else 'BEiT'} models, "
                    f"{values.get('model', 'builtin')} is {group.whom}"
                )

        values = {name: option.default_for(kind) for name, option in known.items()} | given
        values |= _following(given, values, kind) | given

        def part(one: type[SettingsGroup]) -> dict[str, Any]:
            return {name: values[option] for option, name in _options_of(one).items()}

        prompts = PromptSettings(**part(PromptSettings))
        unlike = {name: value for name, value in prompts.keywords().items() if value != getattr(PromptSettings, name)}
        model = group(**part(group), prompt_options=unlike or None, pretrained=True)
        return cls(**part(cls), model_settings=model, train_settings=TrainSettings(**part(TrainSettings)))


def _following(given: Mapping[str, Any], values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Defaults of a run that follow from its other options, chosen on validation images: default_recipe.json in
    studies/results. A recipe says itself what its method starts with. values: of all options, `given` or not."""
    found: dict[str, Any] = {"prototype_init": "xavier"}
    if values["recipe"] is None:
        found["prototype_init"] = _prototype_start(given, values)
        if kind == "beit":
            found["prompt_mode"] = "deep"
            among_keys = values["prompt_placement"] == "prepend" and values["prompt_kind"] != "cross"
            if values["prompt_length"] > 0 and among_keys:
                found["prompt_gate"] = MUTED_GATE
    whitened = given.get("prototype_init", found["prototype_init"]) == "whitened"
    # with prompts both rates do as well from a whitened start; without, the lower one does better
    return found | {"projection_bias": whitened, "lr": WHITENED_LR if whitened else RANDOM_LR}


def _prototype_start(given: Mapping[str, Any], values: Mapping[str, Any]) -> PrototypeStart:
    """The best start that a verbalizer can have."""
    if values["verbalizer"] != "prototypical" or values["multi_label"]:
        return "xavier"
    bias = given.get("projection_bias", True)
    needed = _needed_to_whiten(values["token_activation"], values["prototype_dim"], bias)
    return "whitened" if needed is None else "class_means"


def _needed_to_whiten(token_activation: str, prototype_dim: int | None, projection_bias: bool) -> str | None:
    """What a prototypical verbalizer lacks for prototypes that start whitened, as options; None where nothing."""
    if token_activation not in ("logits", "hidden"):
        return f"--token-activation logits or hidden, got {token_activation}"
    if prototype_dim is None:
        return "a --prototype-dim, got none"
    return None if projection_bias else "--projection-bias, got --no-projection-bias"


@dataclass(frozen=True)
class ComputeSettings(PictureSettings):
    """What computes, of commands that train several runs."""

    precision: Annotated[Precision, Help("As in `vptm train`.")] = "auto"
    compile: Annotated[bool, Help("As in `vptm train`.", switch=True)] = False
    cuda_graph: Annotated[bool, Help("As in `vptm train`.", switch=True)] = False


@dataclass(frozen=True)
class CompareSettings(ComputeSettings):
    """What `vptm compare` is told."""

    methods: Annotated[str, Help("Recipes to compare, with commas between them; any unknown name lists them.")] = (
        "vptm,vpt-shallow,vpt-deep,spt,provp,linear,finetune"
    )
    data: Annotated[str, Help("As in `vptm train`.")] = "builtin"
    shots: Annotated[str, Help("Training images per class, or all.")] = "16"
    seeds: Annotated[int, Help("Runs of each method.")] = 3
    epochs: Annotated[int, Help("Passes over the training images, for every method.")] = 20
    search: Annotated[bool, Help("First choose each recipe's search settings on validation images.", switch=True)] = (
        False
    )
    out: Annotated[Path, Help("Folder of the comparison; runs in it are kept.")] = Path("runs/comparison")
    model: Annotated[str, Help("As in `vptm train`.")] = "builtin"
    jobs: Annotated[int, Help("Runs at a time; more than one disturbs images/s.")] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_shots(self.shots)


@dataclass(frozen=True)
class ProtocolSettings(ComputeSettings):
    """What `vptm protocol` is told beside the protocol; None stands for what was published with it."""

    data: Annotated[str, Help("As in `vptm train`.")] = "builtin"
    model: Annotated[str, Help("As in `vptm train`; CLIP's visual weights by their timm name.")] = "builtin"
    class_embeddings: Annotated[
        Path | None,
        Help(
            "Safetensors file with embeddings (K, D), class_names in its metadata, optionally projection (D, C); by "
            "default the names go through --text-encoder."
        ),
    ] = None
    text_encoder: Annotated[str, Help("sentence or open_clip.")] = "sentence"
    template: Annotated[str, Help("Around a class name, with {} for it.")] = "a photo of a {}."
    shots: Annotated[
        str | None,
        Help("Training images per class, with commas between several; 1,2,4,8,16 for few-shot, else 16."),
    ] = None
    seeds: Annotated[int, Help("Runs for each number of shots.")] = 3
    prompt_length: Annotated[int | None, Help("Prompts per layer; as published, 50 for few-shot, else 16.")] = None
    alpha: Annotated[float, Help("Of progressive prompts.", within="in [0, 1]")] = 0.01
    reformation: Annotated[
        float, Help("Lambda of the contrast with the frozen features.", within="finite and >= 0")
    ] = 1.0
    temperature: Annotated[float, Help("Of that contrast.", within="finite and > 0")] = 1.0
    ridge: Annotated[float, Help("Strength of the projection fitted where none is given.", within="finite and > 0")] = (
        0.01
    )
    logit_scale: Annotated[
        float | None,
        Help(
            "Factor of the cosines; 100 with a given projection, 10 with a fitted one.",
            within="finite and > 0",
            none="or left out",
        ),
    ] = None
    epochs: Annotated[
        int | None,
        Help(
            "Passes over the training images; as published, 50, 100 or 200 from 1, 2 or 8 shots on for few-shot, else "
            "100."
        ),
    ] = None
    lr: Annotated[float, Help("Peak learning rate.", within="finite and > 0")] = 0.1
    weight_decay: Annotated[
        float | None,
        Help("As published, 0.0005 for few-shot, else 0.001.", within="finite and >= 0", none="or left out"),
    ] = None
    augment: Annotated[bool, Help("Random changes of training images.")] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "seeds", "epochs")
        self._at_least(0, "prompt_length")
        self.counts()

    def counts(self) -> list[int] | None:
        """Numbers of training images per class, None where the protocol's own count."""
        if self.shots is None:
            return None
        found = [parse_shots(count) for count in self.shots.split(",")]
        given = [count for count in found if count is not None]
        if len(given) < len(found):
            raise ValueError(f"--shots must be integers >= 1 in a protocol, got {self.shots!r}")
        return given


@dataclass(frozen=True)
class MapSettings(PictureSettings):
    """What `vptm map` is told: `assignment`, `threshold`, `template` and `text_encoder` are of method "semantic"."""

    data: Annotated[str, Help("As in `vptm train`; its class names are mapped.")] = "builtin"
    classifier: Annotated[str, Help("A timm classifier.")] = "tf_efficientnet_lite0"
    weights: Annotated[Path | None, Help("Its weights, .safetensors or .pth; timm's by default.")] = None
    source_labels: Annotated[Path | None, Help("Text file with its labels, one a line; ImageNet's by default.")] = None
    method: Annotated[MappingMethod, Help("By meaning (SeMap), random, or by training images: flm, ilm or blm.")] = (
        "semantic"
    )
    assignment: Annotated[
        Assignment,
        Help("Of --method semantic; top shares source labels between labels, as suits --m above 1."),
    ] = "hungarian"
    m: Annotated[int, Help("Source labels of a label; not of --method blm.")] = 1
    threshold: Annotated[float, Help("Of --assignment threshold.", within="finite")] = 0.5
    aggregation: Annotated[Aggregation, Help("What source labels become one label by.")] = "mean"
    template: Annotated[
        tuple[str, ...],
        Help("Around a name, with {} for it; repeated, the mean of the embeddings counts."),
    ] = ("This is a photo of a {}.",)
    text_encoder: Annotated[
        str,
        Help("sentence, or open_clip (CLIP ViT-B/32), open_clip:ViT-B-16-quickgelu or open_clip:ViT-L-14-quickgelu."),
    ] = "sentence"
    prompt: Annotated[PixelPrompt | None, Help("Train a pixel border first; none by default.")] = None
    image_size: Annotated[int, Help("Pixels of the image inside an expansive border.")] = 128
    border: Annotated[int, Help("Pixels of an additive border.")] = 30
    shots: Annotated[str, Help("Training images per class, or all; for flm, ilm, blm, --prompt.")] = "16"
    epochs: Annotated[int, Help("Of training the border.")] = 20
    lr: Annotated[float, Help("Of the border.", within="finite and > 0")] = 0.01
    batch_size: Annotated[int, Help("Images per step.")] = 64
    evaluate: Annotated[bool, Help("Read the test images, once, at the end.")] = True
    seed: Annotated[int, Help("Of random mappings, shots and order.")] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "batch_size", "m", "epochs", "image_size", "border")
        parse_shots(self.shots)
        if self.method == "ilm" and self.prompt is None:
            raise ValueError(
                "--method ilm counts again after every epoch of a pixel prompt: pass --prompt, or --method flm"
            )
        if self.aggregation != "mean" and self.method == "blm":
            raise ValueError(f"--aggregation must be mean for the soft mapping of --method blm, got {self.aggregation}")


@dataclass(frozen=True)
class Option:
    """A setting as the command line, recipes and runs have it.

    default: None where it depends on the kind of model. defaults: by kind, for a setting of the model. type: int,
    float, str, bool or Path. optional: whether None is a value. several: it can be repeated. numbers: the text of
    several by name, as prompts=0.1,temperature=0. follows: the default in words, where it depends on other options; it
    is None then.
    """

    name: str
    type: type
    optional: bool
    several: bool
    default: Any
    defaults: Mapping[str, Any]
    choices: tuple[str, ...]
    help: str
    switch: bool
    numbers: bool = False
    follows: str = ""

    @property
    def says_none(self) -> bool:
        """Whether the word none is a value: what is left out is something else."""
        return bool(self.follows) and self.optional

    def default_for(self, kind: str) -> Any:
        """The default for a kind of model, a key of `MODEL_SETTINGS`."""
        return self.defaults.get(kind, self.default)

    def shown_default(self) -> str | bool:
        """What help says where the default depends on other options; whether it says the default elsewhere."""
        if self.follows:
            return self.follows
        if len(set(self.defaults.values())) < 2:
            return self.default is not None
        first, *_ = self.defaults.values()
        by_value: dict[Any, list[str]] = {}
        for kind, value in self.defaults.items():
            by_value.setdefault(value, []).append(MODEL_SETTINGS[kind].whom)
        others = [f"{value} for {' or '.join(whom)}" for value, whom in by_value.items() if value != first]
        return "; ".join([str(first), *others])

    def read(self, value: Any) -> Any:
        """`value` from a YAML file with the type of the option; ValueError, without the name, where it has another."""
        if self.numbers and isinstance(value, Mapping):
            value = numbers_text(value)
        if self.says_none and value == "none":
            return None
        if self.type is float and isinstance(value, int | str) and not isinstance(value, bool):
            with suppress(ValueError, OverflowError):
                value = float(value)  # YAML reads 5e-2 as text
        elif self.type is str and isinstance(value, int | float) and not self.choices:
            value = str(value)
        if type(value) is not self.type and not (value is None and self.optional):
            raise ValueError(f"must be {self.type.__name__}{' or NoneType' * self.optional}, got {value!r}")
        return value


@cache
def train_options() -> dict[str, Option]:
    """The options of `vptm train` that are settings of a run, by name."""
    found: dict[str, Option] = {}
    groups: list[type[SettingsGroup]] = [RunSettings, TrainSettings, ModelSettings, *MODEL_SETTINGS.values()]
    groups.append(PromptSettings)
    for group in groups:
        for name, option in group.options_of().items():
            found.setdefault(name, option)
    return found


def without_prompt_location(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of an older version without `prompt_location`, with a DeprecationWarning where it was there."""
    rest = {name: value for name, value in values.items() if name != "prompt_location"}
    if len(rest) < len(values):
        warnings.warn(PROMPT_LOCATION, DeprecationWarning, stacklevel=2)
    return rest


def option_name(name: str) -> str:
    """A setting's name on the command line: --batch-size of batch_size."""
    return f"--{name.replace('_', '-')}"


def option_value(value: Any) -> str:
    """A setting's value on the command line, where None is none.

    Example:
        >>> option_value(None), option_value({"prompts": 0.1}), option_value(8)
        ('none', 'prompts=0.1', '8')
    """
    if isinstance(value, Mapping):
        return numbers_text(value)
    return "none" if value is None else str(value)


def parse_shots(text: str) -> int | None:
    """Training images per class, None for all; ValueError naming --shots."""
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"--shots must be an integer >= 1 or all, got {text!r}")
    return int(text)


def parse_range(text: str | None) -> tuple[float, float] | None:
    """LOW,HIGH as two numbers, None where nothing is said; ValueError naming --value-range."""
    if text is None:
        return None
    with suppress(ValueError):
        low, high = (float(number) for number in text.split(","))
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return low, high
    raise ValueError(f"--value-range must be LOW,HIGH, two finite numbers, the lower first, got {text!r}")


def parse_numbers(name: str, text: str) -> dict[str, float]:
    """Numbers by name, from NAME=NUMBER with commas between; ValueError naming the option `name`.

    Example:
        >>> parse_numbers("lr_of", "prompts=0.1,temperature=0")
        {'prompts': 0.1, 'temperature': 0.0}
    """
    parts = [part.partition("=") for part in text.split(",")]
    with suppress(ValueError):
        found = {key.strip(): float(value) for key, _, value in parts}
        if len(found) == len(parts):
            return found
    raise ValueError(
        f"{option_name(name)} must be NAME=NUMBER, with commas between several of other names, got {text!r}"
    )


def numbers_text(values: Mapping[str, float]) -> str:
    """What `parse_numbers` reads."""
    return ",".join(f"{name}={value}" for name, value in values.items())


def _of_groups(argument: str, values: Any) -> dict[str, float] | None:
    """Numbers of groups of learned tensors, in the order of the groups; None where there are none."""
    if not values:
        return None
    if not isinstance(values, Mapping):
        raise TypeError(f"{argument} must be a mapping of groups to numbers, got {values!r}")
    groups = get_args(LearnedGroup)
    for name, value in values.items():
        one_of(argument, name, groups)
        check_range(f"{argument}[{name!r}]", value, "finite and >= 0")
    return {name: float(values[name]) for name in groups if name in values}


@overload
def parse_weights(given: None) -> None: ...
@overload
def parse_weights(given: str | Sequence[float]) -> str | tuple[float, ...]: ...
def parse_weights(given: str | Sequence[float] | None) -> str | tuple[float, ...] | None:
    """Weights of classes: "balanced", or their numbers; ValueError naming class_weights."""
    if given is None or (isinstance(given, str) and given == "balanced"):
        return given
    if isinstance(given, Sequence):
        with suppress(ValueError, TypeError, OverflowError):
            found = tuple(float(weight) for weight in (given.split(",") if isinstance(given, str) else given))
            if all(0 < weight < math.inf for weight in found):
                return found
    shown = one_line(repr(given), 200)
    raise ValueError(f"class_weights must be balanced, or a list of finite numbers > 0, got {shown}")


def names(group: type[SettingsGroup]) -> tuple[str, ...]:
    """Names of a group's settings, in their order."""
    return tuple(one.name for one in fields(group))


def choices(group: type[SettingsGroup], name: str) -> tuple[str, ...]:
    """What a setting may be; empty where it is no choice.

    Example:
        >>> choices(ViTSettings, "readout")
        ('cls', 'mean', 'map', 'mean_with_prompts', 'mask')
    """
    return _allowed(_types(group)[name])


def _plain(value: Any) -> Any:
    """A copy that JSON has."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _options_of(group: type[SettingsGroup]) -> dict[str, str]:
    """{name of the option: name of the setting}, without settings that are no option."""
    found = _help(group)
    return {found[name].option or name: name for name in names(group) if found[name].option is not None}


def _option(option: str, name: str, group: type[SettingsGroup]) -> Option:
    kind, own = _types(group)[name], _help(group)[name]
    parts = (kind,) if isinstance(kind, type) or get_origin(kind) is Literal else get_args(kind)
    default = next(one.default for one in fields(group) if one.name == name) if own.command is None else own.command
    default = None if own.follows else default
    defaults = {}
    if issubclass(group, ModelSettings):
        defaults = {key: getattr(each, name) for key, each in MODEL_SETTINGS.items() if name in _types(each)}
    return Option(
        name=option,
        type=next((part for part in parts if part in (bool, int, float, Path)), str),
        several=get_origin(kind) is tuple,
        optional=type(None) in parts,
        default=default if len(set(defaults.values())) < 2 else None,
        defaults=defaults,
        choices=choices(group, name),
        help=own.text,
        switch=own.switch,
        numbers=any(get_origin(part) is Mapping for part in parts),
        follows=own.follows,
    )
