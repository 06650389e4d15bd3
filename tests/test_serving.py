"""The model behind `mlflow models serve`: a real server, asked rightly and wrongly."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from data_pipeline import images
from data_pipeline.loader import load_all
from tests.cluster.ports import free_ports
from tests.test_images import encoded, png_header
from trainer.serving import MAX_IMAGES, RefusedRequest, ServedModel, SharedPasses

ROOT = Path(__file__).parents[1]


def base64_png(image: np.ndarray) -> str:
    return base64.b64encode(encoded(Image.fromarray(image.squeeze()))).decode()


@pytest.fixture(scope="module")
def test_images(digits) -> torch.Tensor:
    return load_all(digits, "test_unknown", device=torch.device("cpu")).images


class Server:
    """`mlflow models serve` on a free port, with so many kB of addresses."""

    def __init__(self, uri: str, log: Path, addresses: str = "unlimited") -> None:
        (self.port,) = free_ports(1)
        environment = {
            **os.environ, "MLFLOW_TRACKING_URI": uri, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [
            "bash", "-c", f'ulimit -v {addresses}; exec "$@"', "bash",
            sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/gradmix-digits@champion",
            "--env-manager", "local", "--port", str(self.port),
        ]  # fmt: skip
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, cwd=log.parent, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        end = time.monotonic() + 120
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.3)

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=5).close()
        except OSError:
            return False
        return True

    def ask(self, body: bytes | dict, kind: str = "application/json") -> tuple[int, str]:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations", content, {"Content-Type": kind}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def predictions(self, body: dict) -> list[dict]:
        status, text = self.ask(body)
        assert status == 200, text
        return json.loads(text)["predictions"]

    def peak(self) -> float:
        """The most memory that one of its processes has held so far, in MB."""
        most = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.getsid(int(folder.name)) == self.process.pid:
                    found = re.search(r"VmHWM:\s+(\d+)", (folder / "status").read_text())
                    most = max(most, int(found[1]) if found else 0)
        return most / 1000

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
            return
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(store, tmp_path_factory) -> Iterator[Server]:
    started = Server(store, tmp_path_factory.mktemp("server") / "log.txt")
    yield started
    started.stop()


def test_the_answer_to_arrays_and_files(server, model, test_images):
    three = test_images[:3]
    expected = model.recognise(three, model.card.k)
    as_arrays = server.predictions({"inputs": three.tolist()})
    as_grey = server.predictions({"inputs": three.squeeze(3).tolist()})
    as_files = server.predictions({"inputs": [base64_png(image) for image in three.numpy()]})
    assert as_arrays == as_grey == as_files
    for row, answer in enumerate(as_files):
        assert answer["label"] == expected.labels[row] and answer["class"] == expected.classes[row]
        assert answer["score"] == pytest.approx(expected.scores[row], abs=1e-5)
        assert answer["threshold"] == model.card.threshold
        assert list(answer["class_scores"]) == list(model.card.class_names)
        np.testing.assert_allclose(list(answer["class_scores"].values()), expected.class_scores[row], atol=1e-5)
        assert len(answer["neighbours"]) == model.card.k
        for near, place, similarity in zip(answer["neighbours"], expected.neighbours[row], expected.similarities[row]):
            assert near["id"] == model.gallery_ids[place] and near["id"].startswith("digits train image ")
            assert near["class"] == model.card.class_names[model.gallery_labels[place]]
            assert near["similarity"] == pytest.approx(similarity, abs=1e-5)


def test_images_of_any_size_in_every_form(server, model):
    generator = np.random.default_rng(0)
    large, small = (generator.integers(0, 256, shape, np.uint8) for shape in ((90, 61, 3), (5, 7, 1)))
    squares = [images.from_array(image, 1, 16) for image in (large, small)]
    expected = model.recognise(torch.from_numpy(np.stack(squares)))
    forms = [
        {"inputs": [base64_png(large), base64_png(small)]},
        {"instances": [{"image": base64_png(large)}, {"image": base64_png(small)}]},
        {"dataframe_records": [{"image": large.tolist()}, {"image": "data:image/png;base64," + base64_png(small)}]},
        {"dataframe_split": {"columns": ["image"], "data": [[large.tolist()], [small.tolist()]]}},
        {"dataframe_split": {"columns": ["any name"], "data": [[large.tolist()], [base64_png(small)]]}},
        {"dataframe_split": {"data": [[large.tolist()], [small.tolist()]]}},
    ]
    for body in forms:
        answers = server.predictions({**body, "params": {"neighbours": 0}})
        np.testing.assert_allclose([each["score"] for each in answers], expected.scores, atol=1e-5)
        assert [each["neighbours"] for each in answers] == [[], []]


def test_a_batch_of_256(server, model, test_images):
    batch = test_images[:256] if len(test_images) >= 256 else test_images.repeat(2, 1, 1, 1)[:256]
    answers = server.predictions({"inputs": [base64_png(i) for i in batch.numpy()], "params": {"neighbours": 1}})
    np.testing.assert_allclose([each["score"] for each in answers], model.recognise(batch).scores, atol=1e-5)
    assert all(len(each["neighbours"]) == 1 for each in answers)


def test_records_of_very_different_sizes_take_no_more_than_they_are(server):
    # MLflow would make "inputs" one array of strings, all as long as the longest: 4 × 200 × 1.3 MB.
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000), np.uint8)
    files = [base64_png(noise)] + [base64_png(noise[:8, :8])] * 199
    assert len(files[0]) > 1.2e6
    for body in (
        {"dataframe_records": [{"image": file} for file in files]},
        {"dataframe_split": {"columns": ["image"], "data": [[file] for file in files]}},
    ):
        before = server.peak()
        assert before > 100
        assert len(server.predictions({**body, "params": {"neighbours": 0}})) == 200
        assert server.peak() - before < 150


def test_a_server_with_limited_addresses_refuses_what_mlflow_would_blow_up(store, tmp_path):
    limited = Server(store, tmp_path / "log.txt", addresses="8000000")
    try:
        before = limited.peak()
        status, text = limited.ask({"inputs": ["A" * 500_000] + ["b"] * 3199})
        assert status == 400 and "Unable to allocate 5.96 GiB" in json.loads(text)["message"]
        assert limited.peak() - before < 100
        assert limited.predictions({"inputs": [[[0] * 9] * 9]})[0]["class"]
    finally:
        limited.stop()


def of_inputs(inputs) -> bytes:
    return json.dumps({"inputs": inputs}).encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"inputs": [[1, 2', "valid JSON formatted string"),
        (b"\xff\xfe", "valid JSON formatted string"),
        (b"[1, 2]", "must be a JSON dictionary"),
        (b'{"pictures": []}', "must be a JSON dictionary"),
        (of_inputs([]), "no image was sent"),
        (b'{"dataframe_records": []}', "no image was sent"),
        (of_inputs({}), "one column"),
        (of_inputs({"a": [1], "b": [2]}), "one column, such as .image., not 2 columns .a, b."),
        (b'{"dataframe_split": {"columns": ["image", "image"], "data": [[[[0]], [[0]]]]}}', "images must be one"),
        (b'{"dataframe_split": {"columns": ["image"], "data": [[{"a": 1}]]}}', "image is not of an image's shape"),
        (b'{"dataframe_records": [{"image": [[0]]}, {"picture": [[0]]}]}', "images must be one column"),
        (of_inputs([{"image": 1}, {"b": [[0]]}]), "image"),
        (of_inputs([[[10**30]]]), "image is not made of whole numbers"),
        (of_inputs("é"), "image is neither base64 nor numbers"),
        (of_inputs(3), "no list of images"),
        (of_inputs([1.5, 2]), "not of an image's shape"),
        (of_inputs([[[0.5, 1.0]]]), "not made of whole numbers but of float64"),
        (of_inputs([[[0, 256]]]), "numbers from 0 to 256"),
        (of_inputs([[[0, -1]]]), "numbers from -1 to 0"),
        (of_inputs([[[[0, 0]]]]), "not of an image's shape"),
        (of_inputs([[["a", "b"]]]), "not made of whole numbers"),
        (of_inputs([None]), "shape"),
        (of_inputs(["*** no base64 ***"]), "neither base64 nor numbers"),
        (of_inputs([base64.b64encode(b"no image at all").decode()]), "not an image file"),
        (of_inputs([base64.b64encode(png_header(20_000, 20_000)).decode()]), "image is too large"),
        (of_inputs([base64.b64encode(png_header(9_000, 9_000)).decode()]), "image is too large .9000 × 9000 pixels"),
        (of_inputs([base64.b64encode(png_header(2**31 - 1, 2**31 - 1)).decode()]), "too large"),
        (of_inputs([base64.b64encode(encoded(Image.new("L", (99, 99)))[:-30]).decode()]), "a damaged image"),
        (of_inputs([[[0]]] * (MAX_IMAGES + 1)), f"send at most {MAX_IMAGES}"),
        (json.dumps({"inputs": [[[0]]], "params": {"neighbours": 101}}).encode(), "ask for 0 to 100"),
        (json.dumps({"inputs": [[[0]]], "params": {"neighbours": "many"}}).encode(), "neighbours"),
    ],
)  # fmt: skip
def test_bad_requests_get_one_line_and_the_server_stays(server, body, message):
    status, text = server.ask(body)
    assert 400 <= status < 500, text
    answer = json.loads(text)
    assert re.search(message, answer["message"]), answer["message"]
    if "image" in message:  # MLflow's own parser shows the input in lines of its own
        assert "\n" not in answer["message"] and len(answer["message"]) < 300
    assert "stack_trace" not in answer
    assert server.predictions(json.loads(of_inputs([[[0] * 9] * 9])))[0]["class"]


def test_other_content_is_refused(server):
    status, text = server.ask(b"image\n1\n", "text/html")
    assert status == 415 and "content types" in text


def test_many_clients_at_once_get_each_their_own_answer(server, model, test_images):
    expected = model.recognise(test_images[:60]).scores
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(server.predictions, {"inputs": [image.tolist()]}) for image in test_images[:60]]
        scores = [each.result()[0]["score"] for each in asked]
    np.testing.assert_allclose(scores, expected, atol=1e-5)


class TestSharedPasses:
    def test_requests_that_wait_share_a_pass(self, model, test_images):
        passes: list[int] = []

        class Watched:
            def recognise(self, batch, num_neighbours):
                passes.append(len(batch))
                time.sleep(0.02)
                return model.recognise(batch, num_neighbours)

        shared = SharedPasses(Watched())
        parts = [(test_images[n : n + 1 + n % 3], n % 4) for n in range(40)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda part: shared(*part), parts))
        for (part, wanted), answer in zip(parts, answers):
            expected = model.recognise(part, wanted)
            np.testing.assert_allclose(answer.scores, expected.scores, atol=1e-5)
            np.testing.assert_array_equal(answer.neighbours, expected.neighbours)
            assert answer.similarities.shape == (len(part), wanted)
        assert len(passes) < 30 and sum(passes) == sum(len(part) for part, _ in parts)

    def test_a_pass_is_never_larger_than_a_request_may_be(self, model, test_images):
        sizes: list[int] = []

        class Watched:
            def recognise(self, batch, num_neighbours):
                sizes.append(len(batch))
                time.sleep(0.05)
                return model.recognise(batch[:0], 0)

        large = test_images[:1].expand(MAX_IMAGES - 1, -1, -1, -1)
        shared = SharedPasses(Watched())
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: shared(large, 0), range(6)))
        assert sizes == [MAX_IMAGES - 1] * 6

    def test_an_error_reaches_everybody_who_waits_and_nobody_after(self, model, test_images):
        class Fails:
            broken = True

            def recognise(self, batch, num_neighbours):
                time.sleep(0.02)
                if self.broken:
                    raise RuntimeError("out of memory")
                return model.recognise(batch, num_neighbours)

        failing = Fails()
        shared = SharedPasses(failing)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(shared, test_images[:1], 0) for _ in range(4)]
            assert all(isinstance(each.exception(), RuntimeError) for each in asked)
        failing.broken = False
        assert len(shared(test_images[:2], 0).scores) == 2


def test_python_callers_get_a_frame(model, test_images):
    served = ServedModel(model)
    frame = served.predict(test_images[:2].numpy())
    assert list(frame.columns) == ["label", "class", "score", "threshold", "class_scores", "neighbours"]
    files = [encoded(Image.fromarray(image.squeeze())) for image in test_images[:2].numpy()]
    assert served.predict(files)["score"].tolist() == frame["score"].tolist()
    with pytest.raises(RefusedRequest, match="image 1 is not an image file"):
        served.predict([files[0], b"nothing"])
    for neighbours in ("many", 2.5, [1], -1):
        with pytest.raises(RefusedRequest, match=r"neighbours is .*: ask for 0 to 100"):
            served.predict(files, {"neighbours": neighbours})


def test_whatever_a_request_holds_it_is_refused_in_one_line(model):
    class Odd:
        def __array__(self, *_, **__):
            raise TypeError("first line\n" + "x" * 1000)

    with pytest.raises(RefusedRequest, match=r"no list of images \(first line") as caught:
        ServedModel(model).predict([Odd()])
    assert "\n" not in caught.value.message and len(caught.value.message) < 300


def test_null_neighbours_are_the_default_and_base64_may_have_line_breaks(model):
    file = encoded(Image.new("L", (99, 99), 128))
    served = ServedModel(model)
    wrapped = served.predict([base64.encodebytes(file).decode()], {"neighbours": None})
    plain = served.predict([base64.b64encode(file).decode()])
    assert len(wrapped.neighbours[0]) == model.card.k
    pd.testing.assert_frame_equal(wrapped, plain)
