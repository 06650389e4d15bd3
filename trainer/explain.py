"""`python -m trainer.explain`: why a model says what it says, as one PNG or HTML page.

For each image: the image as the model sees it, the places that its score comes from, the scores of the classes against
the threshold, and the training images it is most like.

The attribution map is LayerCAM (Jiang et al. 2021; eqs. 6-7 of the GradMix paper) with the gradient of the image's own
score, the sum of the k largest similarities to its nearest class: it shows what makes the image look known. (In
training the gradient is that of the loss.)
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from rich.console import Console
from torch import Tensor

from data_pipeline import cli
from data_pipeline.beton import find_split
from data_pipeline.errors import InputError
from data_pipeline.files import replacing
from data_pipeline.loader import Partitions
from data_pipeline.protocols import UNKNOWN, Protocol
from trainer.config import Layer
from trainer.evaluate import device_by_default
from trainer.gradmix import activation_map
from trainer.predict import find_images, printable, read_squares
from trainer.registry import Neighbour, OpenSetModel, load_model

if TYPE_CHECKING:  # imported where something is drawn
    from matplotlib.figure import Figure

LAYERS: tuple[Layer, ...] = ("conv3_2", "conv4_2", "conv5_2")
SUFFIXES = (".png", ".html")
_SHOWN_CLASSES = 6


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What there is to see about one image."""

    name: str
    image: np.ndarray
    """(S, S, C) uint8, as the model sees it."""
    attribution: np.ndarray
    """(S, S) float32 in [0, 1]: where the score comes from, the largest being 1; all 0 where nothing speaks for it."""
    label: str
    nearest_class: str
    score: float
    threshold: float
    class_scores: dict[str, float]
    neighbours: list[Neighbour]
    pictures: list[np.ndarray]
    """The neighbours themselves, (S, S, C) uint8 each; empty where the training images are not at hand."""

    @property
    def known(self) -> bool:
        return self.label != UNKNOWN

    @property
    def verdict(self) -> str:
        if self.known:
            return f"{self.label}: score {self.score:.3f} ≥ threshold {self.threshold:.3f}"
        return f"unknown: score {self.score:.3f} < threshold {self.threshold:.3f} (nearest class {self.nearest_class})"

    @property
    def best_classes(self) -> list[tuple[str, float]]:
        """The few classes of the largest scores, the largest first."""
        return sorted(self.class_scores.items(), key=lambda item: -item[1])[:_SHOWN_CLASSES]


def attribution_maps(model: OpenSetModel, images: Tensor, layers: Sequence[Layer] = LAYERS) -> Tensor:
    """Where each image's score comes from: (M, S, S) float32 in [0, 1].

    Args:
        images: uint8 (M, H, W, C), M ≥ 1.
        layers: whose maps are used; several are normalised, resized to the finest and added.
    """
    with torch.enable_grad():
        encoded = model.encoder(model.render(images.to(model.device)), layers)
        similarities = encoded.embeddings @ F.normalize(model.gallery, dim=1).T
        classes = range(len(model.card.class_names))
        of_classes = [
            similarities[:, model.gallery_labels == label].topk(model.card.k).values.sum(dim=1) for label in classes
        ]
        # Images do not influence each other: the gradient of the sum is that of each one's own score.
        score = torch.stack(of_classes).amax(dim=0).sum()
        maps = list(encoded.maps.values())
        gradients = torch.autograd.grad(score, maps)
    found = activation_map([a.detach() for a in maps], list(gradients), "layercam", 1)
    size = model.card.image_size
    found = F.interpolate(found.unsqueeze(1), (size, size), mode="bilinear", align_corners=False).squeeze(1)
    return found / found.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)


def training_images(model: OpenSetModel, data: Path) -> Tensor | None:
    """The images of the gallery, (N, S, S, C) uint8, from the build in `data`; None if they are not there.

    A folder of one's own may hold other images than when the model was trained, though as many: their names tell.
    """
    try:
        build = find_split(data, Protocol.from_dict(model.card.protocol))
    except InputError:
        return None
    if build.names("train") != list(model.gallery_ids):
        return None
    return Partitions(build, torch.device("cpu"))["train"].images


def explain(
    model: OpenSetModel,
    names: Sequence[str],
    squares: np.ndarray,
    training: Tensor | None,
    *,
    num_neighbours: int = 5,
    layers: Sequence[Layer] = LAYERS,
) -> list[Explanation]:
    """Explanations of the images `squares` (M, S, S, C) uint8 called `names`."""
    images = torch.from_numpy(squares)
    answer = model.recognise(images, min(num_neighbours, len(model.gallery)))
    maps = attribution_maps(model, images, layers).cpu().numpy()
    near = model.name_neighbours(answer)
    return [
        Explanation(
            name=name,
            image=squares[row],
            attribution=maps[row],
            label=str(answer.labels[row]),
            nearest_class=str(answer.classes[row]),
            score=float(answer.scores[row]),
            threshold=model.card.threshold,
            class_scores=dict(zip(model.card.class_names, answer.class_scores[row].tolist())),
            neighbours=near[row],
            pictures=[] if training is None else [training[each.row].numpy() for each in near[row]],
        )
        for row, name in enumerate(names)
    ]


def overlay(image: np.ndarray, attribution: np.ndarray) -> np.ndarray:
    """(S, S, 3) uint8: the image in grey, coloured where the attribution is high."""
    from matplotlib import colormaps

    grey = image.astype(np.float32).mean(axis=2, keepdims=True) / 255
    colour = colormaps["inferno"](attribution)[..., :3]
    strength = 0.2 + 0.6 * attribution[..., None]
    return np.rint(255 * ((1 - strength) * grey + strength * colour)).astype(np.uint8)


def draw(explanations: Sequence[Explanation]) -> Figure:
    """One row for each image: the image, its attribution, the class scores, its neighbours."""
    from matplotlib.figure import Figure

    most = max(len(each.neighbours) if each.pictures else 1 for each in explanations)
    figure = Figure(figsize=(2.2 * (most + 4), 2.6 * len(explanations)), dpi=100, layout="constrained")
    grid = figure.subplots(
        len(explanations), 3 + most, squeeze=False, gridspec_kw={"width_ratios": [1, 1, 1.8, *[1] * most]}
    )
    for axes, each in zip(grid, explanations):
        for axis in (*axes[:2], *axes[3:]):
            axis.set_axis_off()
        _picture(axes[0], each.image, f"{Path(each.name).name}\n{each.label}", "tab:green" if each.known else "tab:red")
        _picture(axes[1], overlay(each.image, each.attribution), "where the score\ncomes from")
        _bars(axes[2], each)
        if not each.pictures:
            lines = [f"{near.similarity:.3f}  {near.class_name}  {near.id}" for near in each.neighbours]
            axes[3].text(0, 1, "\n".join(["nearest training images", *lines]), va="top", fontsize=7)
        for axis, near, picture in zip(axes[3:], each.neighbours, each.pictures):
            _picture(axis, picture, f"{near.class_name}, {near.similarity:.3f}\n{_shortened(near.id)}")
    return figure


def _picture(axis, image: np.ndarray, title: str, colour: str = "black") -> None:
    axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
    axis.set_title(title, fontsize=8, color=colour)


def _bars(axis, each: Explanation) -> None:
    names, scores = zip(*reversed(each.best_classes))
    colours = ["tab:green" if score >= each.threshold else "tab:gray" for score in scores]
    axis.barh(range(len(names)), scores, color=colours)
    axis.set_yticks(range(len(names)), [_shortened(name, 14) for name in names])
    axis.axvline(each.threshold, color="tab:red", linestyle="--", linewidth=1)
    axis.set_title(f"score {each.score:.3f}, threshold {each.threshold:.3f}", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _shortened(text: str, length: int = 26) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #222 }
section { border-top: 1px solid #ccc; padding: 1rem 0; display: flex; flex-wrap: wrap; gap: 1.2rem }
section > header { width: 100% } h2 { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere }
.known { color: #1a7f37 } .unknown { color: #b42318 }
figure { margin: 0; width: 8rem } figcaption { font-size: .8rem; overflow-wrap: anywhere }
img { width: 8rem; height: 8rem; image-rendering: pixelated; display: block }
table { border-collapse: collapse; font-size: .85rem } td { padding: .05rem .4rem }
</style></head><body><h1>{{ title }}</h1>
{% for each in explanations %}<section><header><h2>{{ each.name }}</h2>
<strong class="{{ 'known' if each.known else 'unknown' }}">{{ each.verdict }}</strong></header>
<figure><img src="{{ png(each.image) }}" alt="the image"><figcaption>as the model sees it</figcaption></figure>
<figure><img src="{{ png(overlay(each.image, each.attribution)) }}" alt="its attribution map">
<figcaption>where the score comes from</figcaption></figure>
<table>{% for name, score in each.best_classes %}<tr><td>{{ name }}</td>
<td><meter min="{{ -k }}" max="{{ k }}" value="{{ score }}"></meter></td><td>{{ '%.3f' | format(score) }}</td></tr>
{% endfor %}<tr><td>threshold</td><td><meter min="{{ -k }}" max="{{ k }}" value="{{ each.threshold }}"></meter></td>
<td>{{ '%.3f' | format(each.threshold) }}</td></tr></table>
{% for near in each.neighbours %}<figure>
{% if each.pictures %}<img src="{{ png(each.pictures[loop.index0]) }}" alt="a training image">{% endif %}
<figcaption>{{ near.class_name }}, {{ '%.3f' | format(near.similarity) }}<br>{{ near.id }}</figcaption></figure>
{% endfor %}</section>
{% endfor %}</body></html>
"""


def render_html(explanations: Sequence[Explanation], title: str, k: int) -> str:
    """One page that needs no other file; `k` bounds the scores."""
    import jinja2

    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    return template.render(explanations=explanations, title=title, k=k, png=data_uri, overlay=overlay)


def data_uri(image: np.ndarray) -> str:
    """Uint8 (S, S, C) as something that an <img> shows."""
    file = io.BytesIO()
    Image.fromarray(image.squeeze() if image.shape[2] == 1 else image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Which model, which images, and what is drawn of them."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders (all images below them) or quoted globs."""
    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a folder such as runs/demo/model."""
    out: Path = Path("explanation.png")
    """What to write; .png or .html says which kind. What is there is replaced."""
    neighbours: int = 5
    """How many of the nearest training images to show; 0 to 20."""
    layers: tuple[Layer, ...] = LAYERS
    """Layers whose maps are used; several are normalised, resized to the finest and added."""
    limit: int = 50
    """Explain at most so many images; 1 or more."""
    data: Path = Path("data")
    """Data folder with the files the model was trained on, for pictures of the neighbours; without them their names."""
    tracking_uri: str | None = None
    """MLflow store of models:/ names. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise InputError("no image is named: give files, folders or quoted globs")
        if self.out.suffix not in SUFFIXES:
            raise InputError(f"out is {self.out}; let it end with .png or .html")
        if not 0 <= self.neighbours <= 20:
            raise InputError(f"neighbours is {self.neighbours}; set it within 0 to 20")
        if not self.layers:
            raise InputError("no layer is named: leave out --layers, or name one or more")
        if self.limit < 1:
            raise InputError(f"limit is {self.limit}; set it to 1 or more")


def run(config: ExplainConfig, console: Console) -> list[Explanation]:
    """Explain the images and write the page."""
    paths = find_images(config.paths)
    model = load_model(config.model, config.tracking_uri, device_by_default())
    card, training = model.card, training_images(model, config.data)
    if training is None:
        console.print(
            f"the training images are not in {config.data}: neighbours are named, not shown (--data FOLDER)",
            highlight=False,
        )
    names, squares = [], []
    for path, square in zip(paths, read_squares(paths[: config.limit], card.image_size, card.channels)):
        if isinstance(square, InputError):
            console.print(f"{printable(path)} is left out: the image is {square}", markup=False, highlight=False)
        else:
            names.append(printable(path))
            squares.append(square)
    if not squares:
        raise InputError("none of the files is a readable image: name others")
    found = explain(model, names, np.stack(squares), training, num_neighbours=config.neighbours, layers=config.layers)
    with replacing(config.out) as partial:
        if config.out.suffix == ".html":
            partial.write_text(render_html(found, f"What {config.model} says, and why", card.k), encoding="utf-8")
        else:
            draw(found).savefig(partial, format="png")
    more = f"; {len(paths) - config.limit:,} more were left out (--limit)" if len(paths) > config.limit else ""
    console.print(f"{len(found)} explained in {config.out}{more}", highlight=False)
    return found


def main() -> None:
    config = cli.parse(
        ExplainConfig,
        prog="python -m trainer.explain",
        description="Show why a model says what it says: attribution, class scores, nearest training images.",
    )
    run(config, cli.console())


if __name__ == "__main__":
    cli.run(main)
