"""`python -m trainer.page`: a web page on which a model recognises the images that are dropped on it, and says why."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from torch import Tensor

from data_pipeline import cli, images
from data_pipeline.errors import InputError
from trainer.evaluate import device_by_default
from trainer.explain import Explanation, data_uri, explain, overlay, training_images
from trainer.registry import OpenSetModel, load_model

if TYPE_CHECKING:  # imported where the page is made: it is an optional package
    from nicegui import events

MAX_FILE_BYTES = 20_000_000
_SHOWN = 30


class Explainer:
    """Explanations of encoded images, for several visitors at a time."""

    def __init__(self, model: OpenSetModel, training: Tensor | None, num_neighbours: int) -> None:
        self.model, self._training, self._num_neighbours = model, training, num_neighbours
        # One at a time: gradients are computed on all cores.
        self._lock = threading.Lock()

    def __call__(self, name: str, encoded: bytes) -> Explanation:
        """Raises `InputError` if it is no image."""
        card = self.model.card
        square = images.decode(encoded, card.channels, card.image_size)
        with self._lock:
            (found,) = explain(self.model, [name], square[None], self._training, num_neighbours=self._num_neighbours)
        return found


def make_page(explainer: Explainer, title: str) -> None:
    """Declare the page; `nicegui.ui.run` serves it."""
    from nicegui import run, ui

    card = explainer.model.card

    @ui.page("/", title=title)
    def page() -> None:
        ui.add_css(".q-uploader__list { display: none }")  # the answers show every file already
        with ui.column().classes("w-full max-w-5xl mx-auto"):
            ui.label(title).classes("text-2xl")
            ui.label(f"It knows {', '.join(card.class_names)}. To anything else it should say “unknown”.")
            upload = ui.upload(
                label="Drop images here, or press +",
                multiple=True,
                auto_upload=True,
                max_file_size=MAX_FILE_BYTES,
                max_files=200,
                on_rejected=lambda: ui.notify(f"a file of more than {MAX_FILE_BYTES / 1e6:g} MB is not taken"),
            )
            upload.classes("w-full").props("accept=image/* flat bordered")
            results = ui.column().classes("w-full")

        async def show(event: events.UploadEventArguments) -> None:
            name = event.file.name
            try:
                found = await run.io_bound(explainer, name, await event.file.read())
            except InputError as error:
                with results, ui.card().classes("w-full"):
                    ui.label(f"{name}: the image is {error}").classes("text-red-700")
            else:
                with results:
                    _show(found, card.k)
            shown = list(results.default_slot.children)
            shown[-1].move(target_index=0)  # the newest on top
            if len(shown) > _SHOWN:
                shown[-2].delete()

        upload.on_upload(show)


def _show(found: Explanation, k: int) -> None:
    from nicegui import ui

    with ui.card().classes("w-full"):
        colour = "text-green-700" if found.known else "text-red-700"
        with ui.row().classes("items-baseline"):
            ui.label(found.label).classes(f"text-xl font-bold {colour}")
            ui.label(found.name).classes("text-gray-500")
        _score_bar(found, k)
        with ui.row():
            _picture(data_uri(found.image), "as the model sees it")
            _picture(data_uri(overlay(found.image, found.attribution)), "where the score comes from")
            ui.separator().props("vertical")
            for near, picture in zip(found.neighbours, found.pictures):
                _picture(data_uri(picture), f"{near.class_name}, {near.similarity:.3f}", near.id)
            if not found.pictures:
                with ui.column().classes("gap-0"):
                    ui.label("nearest training images").classes("text-sm text-gray-500")
                    for near in found.neighbours:
                        ui.label(f"{near.class_name}, {near.similarity:.3f}: {near.id}").classes("text-sm")


def _score_bar(found: Explanation, k: int) -> None:
    """The score on its way from −k to k, and a mark where the threshold is."""
    from nicegui import ui

    def place(value: float) -> float:
        return 100 * min(max((value + k) / (2 * k), 0.0), 1.0)

    colour = "#1a7f37" if found.known else "#b42318"
    ui.label(found.verdict).classes("text-sm")
    with ui.element("div").classes("w-full rounded").style("position: relative; height: 12px; background: #e5e7eb"):
        ui.element("div").classes("rounded").style(
            f"width: {place(found.score):.2f}%; height: 100%; background: {colour}"
        )
        ui.element("div").style(
            f"position: absolute; left: {place(found.threshold):.2f}%; top: -4px; width: 2px; height: 20px; "
            "background: black"
        ).tooltip(f"threshold {found.threshold:.3f}")


def _picture(source: str, caption: str, tooltip: str = "") -> None:
    from nicegui import ui

    with ui.column().classes("gap-0 w-24"):
        image = ui.image(source).classes("w-24 h-24").props("no-spinner no-transition")
        image.style("image-rendering: pixelated")
        if tooltip:
            image.tooltip(tooltip)
        ui.label(caption).classes("text-xs text-gray-600")


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """Which model the page shows, and where."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a folder such as runs/demo/model."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in, without a password."""
    port: int = 8080
    """Port to listen at, 1 to 65535."""
    neighbours: int = 5
    """How many of the nearest training images to show; 0 to 20."""
    data: Path = Path("data")
    """Data folder with the files the model was trained on, for pictures of the neighbours; without them their names."""
    tracking_uri: str | None = None
    """MLflow store of models:/ names. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise InputError(f"port is {self.port}; set it within 1 to 65535")
        if not 0 <= self.neighbours <= 20:
            raise InputError(f"neighbours is {self.neighbours}; set it within 0 to 20")


def check_port(host: str, port: int) -> None:
    """Raise `InputError` if nothing can listen there."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise InputError(f"{host}:{port} cannot be listened at ({error.strerror}): name another --port") from error


def serve(config: PageConfig, console: Console) -> None:
    """Serve the page until the process is ended."""
    try:
        from nicegui import ui
    except ImportError as error:
        raise InputError("the page needs nicegui: pip install -c constraints.txt 'gradmix-osr[page]'") from error
    check_port(config.host, config.port)
    model = load_model(config.model, config.tracking_uri, device_by_default())
    training = training_images(model, config.data)
    if training is None:
        console.print(
            f"the training images are not in {config.data}: neighbours are named, not shown (--data FOLDER)",
            highlight=False,
        )
    make_page(Explainer(model, training, config.neighbours), f"What {config.model} says")
    console.print(f"http://{config.host}:{config.port}  (Ctrl-C ends it)", highlight=False)
    ui.run(host=config.host, port=config.port, show=False, reload=False, show_welcome_message=False)


def main() -> None:
    config = cli.parse(
        PageConfig,
        prog="python -m trainer.page",
        description="A web page on which a model recognises the images that are dropped on it, and says why.",
    )
    serve(config, cli.console())


if __name__ == "__main__":
    cli.run(main)
