"""Open set scores against algorithm 1 written as plain loops, and the thresholds that turn them into decisions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.open_set import UNKNOWN, calibrate_threshold, class_scores, decide, neighbours, score

HALF = (torch.float16, torch.bfloat16)


def embeddings(test_rows: int, gallery_rows: int, dimension: int, classes: int, *, seed=0, dtype=torch.float32):
    """Random embeddings of varied length, and labels in random order that give every class its share."""
    generator = torch.Generator().manual_seed(seed)
    test, gallery = (torch.randn(rows, dimension, generator=generator) for rows in (test_rows, gallery_rows))
    lengths = torch.rand(gallery_rows, 1, generator=generator) * 5 + 0.1
    labels = (torch.arange(gallery_rows) % classes)[torch.randperm(gallery_rows, generator=generator)]
    return (3 * test).to(dtype), (lengths * gallery).to(dtype), labels


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b)) / lengths if lengths else 0.0


def algorithm_1(test, gallery, labels, k: int) -> np.ndarray:
    """(M, C) class scores, line by line as the paper's algorithm, in double precision."""
    test, gallery, labels = test.double().tolist(), gallery.double().tolist(), labels.tolist()
    rows = []
    for z in test:
        row = []
        for c in range(max(labels) + 1):
            similarities = [cosine(z, g) for g, label in zip(gallery, labels) if label == c]
            row.append(math.fsum(sorted(similarities, reverse=True)[:k]))
        rows.append(row)
    return np.array(rows)


def assert_equal(actual, expected):
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual.predictions, expected.predictions)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes that torch held at a time during the call, results and kernels' own temporaries included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


class HostSyncs(TorchDispatchMode):
    """Counts the operations for which a GPU would have to wait: values or sizes that the host must know."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount")
        return function(*args, **(kwargs or {}))


class TestAlgorithm:
    @pytest.mark.parametrize(
        ("test_rows", "gallery_rows", "dimension", "classes", "ks"),
        [
            (13, 101, 7, 3, (1, 2, 5, 31)),
            (1, 1, 1, 1, (1,)),
            (5, 23, 1, 2, (4, 1)),
            (11, 12, 17, 12, (1,)),
            (7, 40, 129, 1, (40, 3, 3)),
            (29, 97, 2, 6, (16, 1, 7)),
        ],
    )
    def test_equals_the_loops(self, test_rows, gallery_rows, dimension, classes, ks):
        inputs = embeddings(test_rows, gallery_rows, dimension, classes)
        result = score(*inputs, ks)
        assert result.scores.shape == result.predictions.shape == (test_rows, len(ks))
        assert result.scores.dtype == torch.float32
        assert result.predictions.dtype == torch.int64
        for j, k in enumerate(ks):
            expected = algorithm_1(*inputs, k)
            np.testing.assert_allclose(result.scores[:, j], expected.max(axis=1), rtol=1e-5, atol=1e-5)
            if dimension > 1:  # in one dimension similarities are ±1, so classes tie up to rounding
                np.testing.assert_array_equal(result.predictions[:, j], expected.argmax(axis=1))
            np.testing.assert_allclose(class_scores(*inputs, k), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("test_dtype", [torch.float64, torch.float32, *HALF])
    @pytest.mark.parametrize("gallery_dtype", [torch.float64, torch.float32, *HALF])
    def test_dtypes(self, test_dtype, gallery_dtype):
        test, gallery, labels = embeddings(5, 37, 11, 3)
        test, gallery = test.to(test_dtype), gallery.to(gallery_dtype)
        result = score(test, gallery, labels, [3])
        double = torch.float64 in (test_dtype, gallery_dtype)
        assert result.scores.dtype == (torch.float64 if double else torch.float32)
        assert class_scores(test, gallery, labels, 3).dtype == result.scores.dtype
        tolerance = 1e-13 if double else 1e-6  # half precision in the sums would err by 1e-3
        np.testing.assert_allclose(
            result.scores[:, 0], algorithm_1(test, gallery, labels, 3).max(axis=1), rtol=tolerance, atol=tolerance
        )

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
    def test_label_dtypes(self, dtype):
        test, gallery, labels = embeddings(5, 37, 11, 3)
        assert_equal(score(test, gallery, labels.to(dtype), [2]), score(test, gallery, labels, [2]))

    def test_many_ks_equal_one_k_each(self):
        inputs = embeddings(19, 211, 13, 4)
        ks = (7, 1, 50, 2, 23)
        together = score(*inputs, ks)
        for j, k in enumerate(ks):
            alone = score(*inputs, [k])
            torch.testing.assert_close(together.scores[:, j], alone.scores[:, 0])
            assert torch.equal(together.predictions[:, j], alone.predictions[:, 0])

    def test_own_neighbours(self):
        # Every class sits on an axis of its own: its members have similarity 1, all others 0.
        gallery = torch.eye(4).repeat_interleave(3, dim=0)
        labels = torch.arange(4).repeat_interleave(3)
        result = score(5 * torch.eye(4), gallery, labels, (1, 2, 3))
        torch.testing.assert_close(result.scores, torch.tensor([1.0, 2.0, 3.0]).repeat(4, 1))
        assert torch.equal(result.predictions, torch.arange(4)[:, None].repeat(1, 3))
        torch.testing.assert_close(class_scores(torch.eye(4), gallery, labels, 2), 2 * torch.eye(4))

    def test_best_class_changes_with_k(self):
        # Class 1 owns the nearest neighbour, class 0 the better pair.
        gallery = torch.tensor([[1.0, 0.3], [1.0, -0.3], [1.0, 0.0], [-1.0, 0.0]])
        result = score(torch.tensor([[1.0, 0.0]]), gallery, torch.tensor([0, 0, 1, 1]), (1, 2))
        assert result.predictions.tolist() == [[1, 0]]

    def test_all_similarities_negative(self):
        result = score(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [-1.0, 1.0]]), torch.tensor([0, 1]), [1])
        torch.testing.assert_close(result.scores, torch.tensor([[-math.sqrt(0.5)]]))
        assert result.predictions.item() == 1

    def test_no_test_images(self):
        _, gallery, labels = embeddings(1, 20, 3, 4)
        result = score(torch.empty(0, 3), gallery, labels, (1, 5))
        assert result.scores.shape == result.predictions.shape == (0, 2)
        assert class_scores(torch.empty(0, 3), gallery, labels, 1).shape == (0, 4)


class TestNumbers:
    def test_zero_vectors(self):
        test, gallery, labels = embeddings(4, 12, 5, 2)
        test[1] = 0
        gallery[labels == 1] = 0
        scores = class_scores(test, gallery, labels, 3)
        assert torch.equal(scores[1], torch.zeros(2))
        assert torch.equal(scores[:, 1], torch.zeros(4))
        assert score(test, gallery, labels, [3]).predictions[1].item() == 0

    @pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1e-12, 1e12, 1e30, 3e38])
    def test_length_does_not_matter(self, scale):
        test, gallery = torch.tensor([[1.0, 0.5]]), torch.tensor([[0.5, 1.0], [-1.0, 0.5]])
        tolerance = 0.1 if scale == 1e-44 else 1e-6  # so near zero, a float32 has only a few bits left
        for scaled in ((test * scale, gallery), (test, gallery * scale), (test * scale, gallery * scale)):
            scores = class_scores(*scaled, torch.tensor([0, 1]), 1)
            torch.testing.assert_close(scores, torch.tensor([[0.8, -0.6]]), rtol=tolerance, atol=tolerance)

    def test_ties_go_to_the_lowest_class(self):
        test, gallery, _ = embeddings(40, 30, 6, 1)
        labels = torch.arange(4).repeat_interleave(30)
        for ks in ((1,), (1, 30)):
            result = score(test, gallery.repeat(4, 1), labels, ks)
            assert not result.predictions.any()
            again = score(test, gallery.repeat(4, 1), labels, ks)
            assert torch.equal(result.scores, again.scores)

    def test_autocast_does_not_lower_the_precision(self):
        inputs = embeddings(9, 50, 40, 2)
        expected = score(*inputs, [4])
        with torch.autocast("cpu", torch.bfloat16):
            actual = score(*inputs, [4])
        assert torch.equal(actual.scores, expected.scores)

    def test_inputs_stay_and_no_graph_is_kept(self):
        inputs = embeddings(9, 50, 4, 2)
        copies = [tensor.clone() for tensor in inputs]
        test, gallery, labels = inputs[0].requires_grad_(), inputs[1].requires_grad_(), inputs[2]
        assert not score(test, gallery, labels, [2]).scores.requires_grad
        assert not class_scores(test, gallery, labels, 2).requires_grad
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies))


class TestSymmetries:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 2**20), classes=st.integers(1, 5), dimension=st.integers(2, 9), data=st.data())
    def test_order_of_test_gallery_and_classes(self, seed, classes, dimension, data):
        test, gallery, labels = embeddings(7, 8 * classes, dimension, classes, seed=seed)
        ks = (1, 3, 8)
        expected = score(test, gallery, labels, ks)

        rows = torch.tensor(data.draw(st.permutations(range(len(test)))))
        permuted = score(test[rows], gallery, labels, ks)
        torch.testing.assert_close(permuted.scores, expected.scores[rows], rtol=1e-5, atol=1e-5)
        assert torch.equal(permuted.predictions, expected.predictions[rows])

        order = torch.tensor(data.draw(st.permutations(range(len(gallery)))))
        assert_equal(score(test, gallery[order], labels[order], ks), expected)

        names = torch.tensor(data.draw(st.permutations(range(classes))))
        renamed = score(test, gallery, names[labels], ks)
        torch.testing.assert_close(renamed.scores, expected.scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(renamed.predictions, names[expected.predictions])


class TestChunks:
    @settings(max_examples=40, deadline=None)
    @given(
        test_rows=st.integers(1, 30),
        per_class=st.integers(1, 25),
        dimension=st.integers(1, 20),
        classes=st.integers(1, 4),
        chunk_bytes=st.integers(1, 8000),
        data=st.data(),
    )
    def test_any_chunk_gives_the_same(self, test_rows, per_class, dimension, classes, chunk_bytes, data):
        test, gallery, labels = embeddings(test_rows, per_class * classes, dimension, classes)
        ks = data.draw(st.lists(st.integers(1, per_class), min_size=1, max_size=4))
        whole = score(test, gallery, labels, ks)
        chunked = score(test, gallery, labels, ks, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(chunked.scores, whole.scores, rtol=1e-5, atol=1e-5)
        if dimension > 1:  # in one dimension similarities are ±1, so classes tie up to rounding
            assert torch.equal(chunked.predictions, whole.predictions)
        torch.testing.assert_close(
            class_scores(test, gallery, labels, ks[0], chunk_bytes=chunk_bytes),
            class_scores(test, gallery, labels, ks[0]),
            rtol=1e-5,
            atol=1e-5,
        )

    @pytest.mark.parametrize(
        ("test_rows", "gallery_rows", "dimension", "classes", "ks", "dtype"),
        [
            (3000, 5000, 64, 3, (1, 10), torch.float32),
            (3000, 5000, 64, 3, (1, 10), torch.float64),
            (3000, 5000, 256, 1, (5,), torch.float32),  # a class of which one block does not hold all
            (3000, 3000, 8, 5, (1, 200, 600), torch.float32),  # neighbours weigh more than embeddings
            (50, 5000, 1024, 2, (5,), torch.bfloat16),  # embeddings weigh more than similarities
        ],
    )
    def test_memory_is_bounded(self, test_rows, gallery_rows, dimension, classes, ks, dtype):
        inputs = embeddings(test_rows, gallery_rows, dimension, classes, dtype=dtype)
        chunk_bytes = 3 * 2**20
        itemsize = 8 if dtype == torch.float64 else 4
        results = test_rows * len(ks) * (itemsize + 8) + gallery_rows * 16
        assert max(test_rows, 1024) * gallery_rows * 4 > 3 * chunk_bytes  # what it would take without chunks
        peak = peak_bytes(lambda: score(*inputs, ks, chunk_bytes=chunk_bytes))
        # The lower bound guards the speed: blocks much smaller than allowed would repeat the normalisation for nothing.
        assert 0.3 * chunk_bytes < peak < 1.1 * chunk_bytes + results

        peak = peak_bytes(lambda: class_scores(*inputs, ks[0], chunk_bytes=chunk_bytes))
        assert peak < 1.1 * chunk_bytes + test_rows * classes * itemsize + gallery_rows * 16

    def test_the_host_does_not_wait_within_the_loop(self):
        inputs = embeddings(200, 300, 16, 5)
        with HostSyncs() as whole:
            score(*inputs, (1, 5))
        with HostSyncs() as chunked:
            score(*inputs, (1, 5), chunk_bytes=20_000)
        assert whole.count == chunked.count > 0

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_gpu_equals_cpu_within_its_memory(self):
        inputs = embeddings(3000, 6000, 64, 3)
        ks, chunk_bytes = (1, 10, 200), 8 * 2**20
        on_gpu = [tensor.cuda() for tensor in inputs]
        score(*on_gpu, ks, chunk_bytes=chunk_bytes)  # once, so that the libraries hold their workspaces
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = score(*on_gpu, ks, chunk_bytes=chunk_bytes)
        assert torch.cuda.max_memory_allocated() - before < 2 * chunk_bytes
        assert result.scores.is_cuda
        assert result.predictions.is_cuda
        expected = score(*inputs, ks)
        torch.testing.assert_close(result.scores.cpu(), expected.scores, rtol=1e-4, atol=1e-4)
        assert (result.predictions.cpu() == expected.predictions).float().mean() > 0.999


class TestNeighbours:
    @pytest.mark.parametrize(
        ("test_rows", "gallery_rows", "dimension", "n"), [(13, 101, 7, 5), (1, 1, 3, 1), (5, 23, 2, 23), (4, 9, 3, 0)]
    )
    @pytest.mark.parametrize("chunk_bytes", [1, 700, 2**20])
    def test_equals_the_loops(self, test_rows, gallery_rows, dimension, n, chunk_bytes):
        test, gallery, _ = embeddings(test_rows, gallery_rows, dimension, 1)
        found = neighbours(test, gallery, n, chunk_bytes=chunk_bytes)
        assert found.similarities.shape == found.rows.shape == (test_rows, n) and found.rows.dtype == torch.int64
        for z, similarities, rows in zip(test.tolist(), found.similarities.tolist(), found.rows.tolist()):
            expected = sorted(((cosine(z, g), row) for row, g in enumerate(gallery.tolist())), reverse=True)[:n]
            np.testing.assert_allclose(similarities, [each for each, _ in expected], atol=1e-5)
            assert rows == [row for _, row in expected]

    def test_no_test_images_and_bad_input(self):
        _, gallery, _ = embeddings(1, 20, 3, 4)
        assert neighbours(torch.empty(0, 3), gallery, 2).rows.shape == (0, 2)
        for test, n in ((torch.empty(2, 4), 1), (torch.empty(2, 3), 21), (torch.empty(2, 3), -1), (torch.empty(3), 1)):
            with pytest.raises(ValueError, match=r"embeddings must be|n must be within"):
                neighbours(test, gallery, n)


def replaced(index: int, value) -> list:
    inputs = [torch.ones(2, 3), torch.ones(6, 3), torch.tensor([0, 0, 0, 1, 1, 1]), [2]]
    inputs[index] = value
    return inputs


def with_entry(value: float, rows: int, dtype=torch.float32) -> torch.Tensor:
    result = torch.ones(rows, 3, dtype=dtype)
    result[rows - 1, 1] = value
    return result


class TestErrors:
    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            (replaced(0, torch.ones(3)), "test embeddings must be (rows, dimensions), got shape (3,)"),
            (replaced(0, torch.ones(2, 0)), "test embeddings must be (rows, dimensions), got shape (2, 0)"),
            (replaced(1, torch.ones(6, 3, 1)), "gallery embeddings must be (rows, dimensions), got shape (6, 3, 1)"),
            (replaced(0, torch.ones(2, 4)), "test has 4 dimensions, the gallery 3"),
            (replaced(0, with_entry(math.nan, 2)), "test embeddings must be finite"),
            (replaced(0, with_entry(math.inf, 2)), "test embeddings must be finite"),
            (replaced(1, with_entry(-math.inf, 6)), "gallery embeddings must be finite"),
            (replaced(1, with_entry(math.nan, 6, torch.float16)), "gallery embeddings must be finite"),
            (replaced(1, with_entry(math.inf, 6, torch.bfloat16)), "gallery embeddings must be finite"),
            (replaced(1, torch.ones(0, 3)), "the gallery is empty"),
            (
                replaced(2, torch.tensor([0, 1])),
                "gallery_labels must be 6 integers, one per gallery row, got shape (2,) of torch.int64",
            ),
            (
                replaced(2, torch.zeros(6)),
                "gallery_labels must be 6 integers, one per gallery row, got shape (6,) of torch.float32",
            ),
            (
                replaced(2, torch.tensor([0, 0, 0, 1, 1, -1])),
                "gallery_labels must be 0..C-1, got -1..1 for 6 images",
            ),
            (
                replaced(2, torch.tensor([0, 0, 0, 1, 1, 10**15])),
                "gallery_labels must be 0..C-1, got 0..1000000000000000 for 6 images",
            ),
            (
                replaced(2, torch.tensor([0, 0, 0, 2, 2, 2])),
                "gallery_labels must be 0..C-1 without gaps, but class 1 has no gallery image",
            ),
            (
                replaced(2, torch.tensor([0, 0, 0, 0, 1, 0])),
                "class 1 has 1 gallery images, fewer than k = 2: use k of at most 1",
            ),
            (replaced(3, [4]), "class 0 has 3 gallery images, fewer than k = 4: use k of at most 3"),
            (replaced(3, [0]), "ks must be one or more positive integers, got [0]"),
        ],
    )
    def test_inputs(self, inputs, message):
        *tensors, ks = inputs
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            score(*tensors, ks)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            class_scores(*tensors, ks[0])

    def test_no_ks(self):
        with pytest.raises(ValueError, match=r"^ks must be one or more positive integers, got \[\]$"):
            score(*replaced(3, [])[:3], [])

    def test_any_of_the_ks(self):
        with pytest.raises(ValueError, match=r"^ks must be one or more positive integers, got \[2, -1, 1\]$"):
            score(*replaced(3, [])[:3], (2, -1, 1))
        with pytest.raises(ValueError, match=r"^class 0 has 3 gallery images, fewer than k = 9: use k of at most 3$"):
            score(*replaced(3, [])[:3], (1, 9, 2))

    @pytest.mark.parametrize("chunk_bytes", [0, -8])
    def test_chunk_bytes(self, chunk_bytes):
        with pytest.raises(ValueError, match=f"^chunk_bytes must be positive, got {chunk_bytes}$"):
            score(*replaced(3, [])[:3], [1], chunk_bytes=chunk_bytes)


class TestThreshold:
    @pytest.mark.parametrize(
        ("accept", "threshold"), [(0.001, 10.0), (0.1, 10.0), (0.11, 9.0), (0.5, 6.0), (0.95, 1.0), (1.0, 1.0)]
    )
    def test_of_ten(self, accept, threshold):
        assert calibrate_threshold(torch.tensor([3.0, 1, 7, 10, 5, 2, 9, 4, 8, 6]), accept) == threshold

    def test_default_accepts_95_percent(self):
        assert calibrate_threshold(torch.arange(100.0)) == 5.0

    @pytest.mark.parametrize(("share", "count"), [(0.07, 100), (0.29, 100), (0.57, 100), (0.55, 100), (0.95, 20)])
    def test_a_whole_number_of_images_is_not_rounded_up(self, share, count):
        threshold = calibrate_threshold(torch.arange(float(count)), share)
        assert threshold == count - round(share * count)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    @settings(max_examples=30, deadline=None)
    @given(
        values=st.lists(st.integers(-5, 5), min_size=1, max_size=30),
        accept=st.one_of(st.floats(0.001, 1), st.integers(1, 20).map(lambda twentieths: twentieths / 20)),
    )
    def test_is_the_largest_that_accepts_enough(self, dtype, values, accept):
        scores = (torch.tensor(values) / 7).to(dtype)

        def enough(threshold: float) -> bool:
            return sum(s >= threshold for s in scores.tolist()) / len(values) >= accept

        threshold = calibrate_threshold(scores, accept)
        assert type(threshold) is float
        assert enough(threshold)
        assert not enough(math.nextafter(threshold, math.inf))
        known = decide(scores, torch.zeros(len(scores), dtype=torch.int64), threshold) != UNKNOWN
        assert known.tolist() == [s >= threshold for s in scores.tolist()]

    @pytest.mark.parametrize(
        ("scores", "accept", "message"),
        [
            (torch.empty(0), 0.95, "known_scores must be a non-empty vector, got shape (0,)"),
            (torch.ones(3, 1), 0.95, "known_scores must be a non-empty vector, got shape (3, 1)"),
            (torch.tensor([1.0, math.nan]), 0.95, "known_scores must be finite"),
            (torch.tensor([1.0, -math.inf]), 0.95, "known_scores must be finite"),
            (torch.ones(3), 0.0, "accept must be in (0, 1], got 0.0"),
            (torch.ones(3), 1.01, "accept must be in (0, 1], got 1.01"),
            (torch.ones(3), math.nan, "accept must be in (0, 1], got nan"),
        ],
    )
    def test_errors(self, scores, accept, message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            calibrate_threshold(scores, accept)


class TestDecide:
    def test_below_the_threshold_is_unknown(self):
        scores = torch.tensor([0.2, 0.5, math.nextafter(0.5, 0), 0.9], dtype=torch.float64)
        decided = decide(scores, torch.tensor([3, 1, 1, 0]), 0.5)
        assert decided.tolist() == [-1, 1, -1, 0]
        assert decided.dtype == torch.int64
        assert UNKNOWN == -1

    def test_a_score_that_is_no_number_is_unknown(self):
        assert decide(torch.tensor([math.nan]), torch.tensor([2]), -math.inf).tolist() == [UNKNOWN]

    def test_one_column_per_k(self):
        decided = decide(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.tensor([[4, 5], [6, 7]]), 2)
        assert decided.tolist() == [[-1, 5], [6, -1]]

    def test_shapes(self):
        message = "scores and predictions must have one shape, got (2, 1) and (2,)"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            decide(torch.ones(2, 1), torch.tensor([0, 1]), 0.5)
