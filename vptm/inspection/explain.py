"""What a prompted BEiT sees in one image: the visual tokens it predicts, the prototypes it finds near, where it
looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vptm.data.decoding import read_image
from vptm.data.labels import class_labels
from vptm.data.transforms import picture_options, transforms
from vptm.frozen.modes import eval_mode
from vptm.inspection.figures import new_figure, write_png
from vptm.messages import one_line
from vptm.models.prompted_beit import PromptedBEiT
from vptm.models.prompted_model import PromptedModel
from vptm.models.verbalizers import PrototypicalVerbalizer


class ClassScore(NamedTuple):
    """One class: its name, probability (softmax, or sigmoid of a multi-label model), and cosine to its prototype (None
    with a linear verbalizer)."""

    name: str
    probability: float
    similarity: float | None


@dataclass(frozen=True)
class TokenReport:
    """What `inspect_tokens` found.

    Attributes:
        tokens: (visual token, probability), most probable first; empty for a model without a token head.
        classes: best first, which is nearest prototype first.
        attention: (heads, grid rows, grid columns): how much of the read-out row's attention goes to each patch.
        shares: how much goes to patches, prompts, class row and the mask row itself, mean over heads, largest
            first; sums to 1.
        picture: (channels, height, width) in 0..1, the image as the model gets it.
        row: the row that is read: "mask", "class" or "mean patch".
        layer: block whose attention this is, from 1, and how many there are.
    """

    tokens: list[tuple[int, float]]
    classes: list[ClassScore]
    attention: Tensor
    shares: dict[str, float]
    picture: Tensor
    row: str
    layer: tuple[int, int]

    def draw(self, path: str | Path) -> None:
        """Write the picture, the attention over it, the tokens and the prototypes as a PNG, replaced by a rename."""
        write_png(_figure(self), path)


@torch.no_grad()
def inspect_tokens(
    model: PromptedModel, image: Image.Image | str | Path | Tensor, *, top: int = 5, layer: int = -1
) -> TokenReport:
    """Why the model says what it says about one image.

    Tokens and classes come from the path the model runs on. The attention is that of the textbook path
    (`vptm.frozen.reference`), the only one that stores it.

    Args:
        model: a `PromptedBEiT`, looked at in eval mode.
        image: a PIL image or a file, which `vptm.transforms(model)` prepares, or a tensor (channels, height, width)
            that is prepared already.
        top: at most so many tokens and classes, >= 1.
        layer: block whose attention is reported, counted from 0 or, negative, from the end.

    Raises:
        ValueError, TypeError: another model, a tensor of another size, or an argument out of range.
        FileNotFoundError, vptm.data.decoding.BadImageError: a file that is not there or no image.

    Example:
        >>> import vptm
        >>> report = inspect_tokens(vptm.PromptedBEiT("builtin", num_classes=10), Image.new("L", (28, 28)), top=3)
        >>> len(report.tokens), tuple(report.attention.shape), round(sum(report.shares.values()), 3)
        (3, (6, 4, 4), 1.0)
    """
    if not isinstance(model, PromptedBEiT):
        raise TypeError(f"model must be a PromptedBEiT, got {type(model).__name__}")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ValueError(f"top must be an integer >= 1, got {top!r}")
    depth = len(model.backbone.blocks)
    if isinstance(layer, bool) or not isinstance(layer, int) or not -depth <= layer < depth:
        raise ValueError(f"layer must be an integer in {-depth} .. {depth - 1}, got {layer!r}")
    place = model.backbone.patch_embed.proj.weight
    if not isinstance(image, Tensor):
        if not isinstance(image, Image.Image):
            image = read_image(image, **picture_options(model))
        image = transforms(model)(image)
    elif not image.is_floating_point():
        raise TypeError(f"image must be floating point, normalised as vptm.transforms does, got {image.dtype}")
    pixels = image.to(place)[None]
    with eval_mode(model):
        model = model.of_size(pixels)
        assert isinstance(model, PromptedBEiT)
        hidden = model.forward_hidden(pixels)
        scores = model.forward_scores(hidden)[0]
        probabilities = scores.sigmoid() if model.multi_label else scores.softmax(-1)
        similarities = None
        if isinstance(model.verbalizer, PrototypicalVerbalizer):
            similarities = model.verbalizer.cosine(hidden, model.lm_head, model.impl)[0].tolist()
        tokens: list[tuple[int, float]] = []
        if model.lm_head is not None:
            found = model.lm_head(hidden)[0].softmax(-1).topk(min(top, model.lm_head.out_features))
            tokens = list(zip(found.indices.tolist(), found.values.tolist()))
        weights = readout_attention_weights(model, pixels, layer)[0]
    names = class_labels(model.class_names, model.num_classes)
    best = probabilities.topk(min(top, len(names))).indices.tolist()
    rows, columns = model.backbone.patch_embed.grid_size
    end = 1 + model.num_patches
    parts = {"class": slice(0, 1), "patches": slice(1, end)}
    parts |= {"mask": slice(end, end + 1)} if model.has_mask_row else {}
    parts |= {"prompts": slice(model.num_rows - model.prompts.length, None)} if model.prompts.length else {}
    channels = range(len(pixels[0]))
    mean, std = (
        torch.tensor([model.default_cfg[name][c] for c in channels])[:, None, None] for name in ("mean", "std")
    )
    shares = {name: weights[:, part].sum(-1).mean().item() for name, part in parts.items()}
    return TokenReport(
        tokens=tokens,
        classes=[
            ClassScore(names[k], probabilities[k].item(), None if similarities is None else similarities[k])
            for k in best
        ],
        attention=weights[:, 1:end].reshape(-1, rows, columns).cpu(),
        shares=dict(sorted(shares.items(), key=lambda part: -part[1])),
        picture=(pixels[0].float().cpu() * std + mean).clamp(0, 1),
        row={"mask": "mask", "cls": "class", "mean": "mean patch"}[model.readout],
        layer=(layer % depth + 1, depth),
    )


@torch.no_grad()
def readout_attention_weights(model: PromptedModel, images: Tensor, layer: int = -1) -> Tensor:
    """Softmax weights (B, H, T) of the row that is read, over the rows `[class | patches | mask? | prompts]` of block
    `layer`; the mean over the averaged rows where a mean is read."""
    model = model.of_size(images)
    weights, row = model.attention_maps(images, [layer])[0], model._readout_row()
    return weights[:, :, model.mean_rows()].mean(2) if row is None else weights[:, :, row]


def _figure(report: TokenReport) -> Any:
    from matplotlib.ticker import PercentFormatter

    best = report.classes[0]
    figure = new_figure(13, 3.9)
    figure.suptitle(
        one_line(f"{best.name}, probability {best.probability:.1%}"), fontsize=14, fontweight="bold", parse_math=False
    )
    panels = 3 + bool(report.tokens)
    axes = list(figure.subplots(1, panels, width_ratios=[1, 1.15, *[0.95] * (panels - 2)]))

    height, width = report.picture.shape[1:]
    grey = len(report.picture) == 1
    shown = report.picture[0] if grey else report.picture.permute(1, 2, 0)
    place: dict[str, Any] = {"extent": (0, width, height, 0), "interpolation": "nearest"}
    axes[0].imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1, **place)
    axes[0].set_title("picture as the model gets it", fontsize=10)
    attention = report.attention.mean(0).numpy()
    drawn = axes[1].imshow(attention, cmap="viridis", vmin=0, **place)
    # in the colours of the bar, with the picture as their brightness: blended, they would be on no bar
    tall, wide = height // len(attention), width // attention.shape[1]
    colours = drawn.to_rgba(attention)[..., :3].repeat(tall, 0).repeat(wide, 1)
    lightness = 0.7 + 0.3 * report.picture.mean(0).numpy()
    axes[1].imshow(colours * lightness[: len(colours), : colours.shape[1], None], **place)
    bar = figure.colorbar(drawn, ax=axes[1], fraction=0.046, pad=0.03)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    layer, depth = report.layer
    axes[1].set_title(
        f"attention of the {report.row} row\nblock {layer} of {depth}, mean of {len(report.attention)} heads",
        fontsize=10,
    )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in report.shares.items())
    axes[1].set_xlabel(f"in all: {shares}", fontsize=8)
    for image_axes in axes[:2]:
        image_axes.set(xticks=[], yticks=[])

    if report.tokens:
        _bars(axes[2], [f"token {token}" for token, _ in report.tokens], [p for _, p in report.tokens], _percent)
        axes[2].set_title("visual tokens predicted", fontsize=10)
        axes[2].set_xlabel("probability", fontsize=9)
    similar = [score.similarity for score in report.classes if score.similarity is not None]
    values = similar or [score.probability for score in report.classes]
    _bars(axes[-1], [score.name for score in report.classes], values, "{:.3f}".format if similar else _percent)
    axes[-1].set_title("nearest prototypes" if similar else "classes", fontsize=10)
    axes[-1].set_xlabel("cosine similarity" if similar else "probability", fontsize=9)
    return figure


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _bars(axes: Any, names: list[str], values: list[float], write: Callable[[float], str]) -> None:
    """Horizontal bars, the first on top, every one with its value."""
    from matplotlib.ticker import MaxNLocator

    places = range(len(values))
    axes.barh(places, values, color=["#1f6f8b", *["#9fbfca"] * (len(values) - 1)])
    # a class may be called $x$, or by bytes that are no text
    axes.set_yticks(places, [one_line(name) for name in names], parse_math=False)
    axes.invert_yaxis()
    low, high = min(0.0, *values), max(0.0, *values)
    axes.set_xlim(1.05 * low, high + 0.35 * ((high - low) or 1.0))  # the numbers stand beside the bars
    for place, value in zip(places, values):
        beside = (max(value, 0.0), place)
        axes.annotate(write(value), beside, (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.axvline(0, color="black", linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
