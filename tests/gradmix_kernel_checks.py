"""The Triton bodies of the GradMix operations against loops over images, channels and cells.

Run by tests/test_gradmix_kernels.py, in Triton's interpreter or on a GPU: see tests/triton_support.py.
"""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.loops import naive_gradmix, naive_map
from tests.triton_support import DEVICE, INTERPRETED
from trainer.gradmix import gradmix_views, kernels, layercam_peaks, reference

# The padding of a block may hold a NaN, which is never stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Absolute, times the largest input; and relative, by one unit in the last place, since two right results may be rounded
# to neighbours.
TOLERANCE = {
    torch.float32: (1e-5, 0.0),
    torch.bfloat16: (1e-3, torch.finfo(torch.bfloat16).eps),
    torch.float16: (1e-3, torch.finfo(torch.float16).eps),
}
FORMATS = (torch.contiguous_format, torch.channels_last)


def assert_near(actual, expected, dtype, scale):
    absolute, relative = TOLERANCE[dtype]
    torch.testing.assert_close(actual.cpu(), expected, atol=absolute * float(scale), rtol=relative)


def batch(n, channels, height, width, num_patches, dtype=torch.float32, layout=torch.contiguous_format, seed=0):
    """Images, partners and centers on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, channels, height, width, generator=generator).to(dtype, memory_format=layout)
    return images, torch.arange(n).roll(1), torch.rand(n, num_patches, 2, generator=generator)


def mixed(images, partner, centers, gamma):
    """The kernel's result, of arguments on the CPU."""
    gamma = gamma.to(DEVICE) if isinstance(gamma, torch.Tensor) else gamma
    return kernels.gradmix_views(images.to(DEVICE), partner.to(DEVICE), centers.to(DEVICE), gamma).cpu()


# Prime, odd and even sides, taller and wider, of one channel and of more than a block: nothing hides in round numbers.
@pytest.mark.parametrize(
    ("shape", "num_patches"), [((3, 3, 17, 13), 1), ((2, 1, 7, 11), 3), ((2, 5, 6, 8), 2), ((2, 2, 1, 9), 1)]
)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", FORMATS)
def test_views_equal_the_loop(shape, num_patches, dtype, layout):
    images, partner, centers = batch(*shape, num_patches, dtype, layout)
    for gamma in (torch.full((shape[0],), 0.45), torch.linspace(0.2, 0.9, shape[0])):
        expected = naive_gradmix(images, partner, centers, gamma)
        result = mixed(images, partner, centers, gamma)
        assert result.dtype == dtype and result.is_contiguous(memory_format=layout)
        assert_near(result, expected, dtype, images.abs().max())
    assert_near(
        mixed(images, partner, centers, 0.45), naive_gradmix(images, partner, centers, [0.45] * shape[0]), dtype, 4
    )


@pytest.mark.parametrize("layout", FORMATS)
def test_a_batch_of_many_programs_equals_the_loop(layout):
    images, partner, centers = batch(2, 3, 40, 37, 2, layout=layout)
    expected = naive_gradmix(images, partner, centers, [0.5, 0.5])
    assert_near(mixed(images, partner, centers, 0.5), expected, torch.float32, images.abs().max())


@pytest.mark.parametrize("gamma", [1e-6, 0.02, 0.5, 0.999, 1.0])
def test_patches_at_corners_and_sizes_at_their_bounds(gamma):
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.5]]).unsqueeze(1)
    images, partner, _ = batch(5, 2, 11, 7, 1)
    for given_gamma in (gamma, torch.full((5,), gamma)):
        expected = naive_gradmix(images, partner, corners, [gamma] * 5)
        assert_near(mixed(images, partner, corners, given_gamma), expected, torch.float32, images.abs().max())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.sampled_from(FORMATS))
def test_outside_nothing_changes_inside_everything_does_and_the_batchs_order_does_not_matter(seed, gamma, layout):
    images, partner, centers = batch(4, 2, 9, 14, 1, layout=layout, seed=seed)
    result = mixed(images, partner, centers, gamma)
    changed = (result != images).all(dim=1)
    height, width = (max(1, math.floor(gamma * size + 0.5)) for size in (9, 14))
    assert (changed.sum(dim=(1, 2)) == height * width).all()
    assert (changed.any(dim=2).sum(dim=1) == height).all() and (changed.any(dim=1).sum(dim=1) == width).all()
    assert torch.equal(result[~changed.unsqueeze(1).expand_as(result)], images[~changed.unsqueeze(1).expand_as(images)])
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    permuted = mixed(images[order], order.argsort()[partner[order]], centers[order], gamma)
    assert torch.equal(permuted, result[order])


@settings(max_examples=10, deadline=None)
@given(st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_patches_are_where_the_pytorch_body_puts_them(gamma, y, x):
    images = torch.stack([torch.zeros(1, 10, 6), torch.ones(1, 10, 6)])
    partner, centers = torch.tensor([1, 0]), torch.tensor([[[y, x]], [[y, x]]])
    expected = reference.gradmix_views(images, partner, centers, gamma)
    assert torch.equal(mixed(images, partner, centers, gamma) > 0.5, expected > 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partner": torch.tensor([1, 2])}, "partner has an index out of range"),
        ({"partner": torch.tensor([-1, 0])}, "partner has an index out of range"),
        ({"centers": torch.tensor([[[0.5, 0.5]], [[0.5, torch.nan]]])}, "centers has a place that is not finite"),
        ({"centers": torch.tensor([[[torch.inf, 0.5]], [[0.5, 0.5]]])}, "centers has a place that is not finite"),
        ({"gamma": torch.tensor([0.5, 1.1])}, "gamma has a value out of range"),
        ({"gamma": torch.tensor([0.0, 0.5])}, "gamma has a value out of range"),
        ({"gamma": torch.tensor([0.5, torch.nan])}, "gamma has a value out of range"),
    ],
)
@pytest.mark.skipif(not INTERPRETED, reason="a failed assertion on a GPU ends the process")
def test_the_kernel_checks_the_values_it_reads(change, message):
    images, partner, centers = batch(2, 1, 6, 5, 1)
    arguments = {"images": images, "partner": partner, "centers": centers, "gamma": torch.full((2,), 0.5)}
    assert mixed(**arguments).isfinite().all()
    with pytest.raises(Exception, match=message):
        mixed(**(arguments | change))


@pytest.mark.skipif(INTERPRETED, reason="of a GPU only")
def test_a_wrong_value_stops_the_process_at_its_next_synchronisation():
    program = "import torch; from trainer.gradmix import gradmix_views\n"
    program += "images, centers = torch.rand(2, 1, 8, 8, device='cuda'), torch.rand(2, 1, 2, device='cuda')\n"
    program += "gradmix_views(images, torch.tensor([1, 2], device='cuda'), centers, 0.5)\n"
    program += "print('went on')\ntorch.cuda.synchronize()\nprint('and on')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode and "partner has an index out of range" in done.stdout + done.stderr
    assert "went on" in done.stdout and "and on" not in done.stdout


def naive_peaks(activation, num_peaks, suppress):
    """Centers and scores of one map that has a place, cell by cell."""
    height, width = activation.shape
    cells = sorted((-activation[y, x].item(), y, x) for y in range(height) for x in range(width))
    chosen = []
    for value, y, x in cells:
        apart = all(
            max(abs(y - other_y) / height, abs(x - other_x) / width) > suppress - 1e-6 for _, other_y, other_x in chosen
        )
        if value < 0 and apart and len(chosen) < num_peaks:
            chosen.append((value, y, x))
    chosen += chosen[:1] * (num_peaks - len(chosen))
    return [((y + 0.5) / height, (x + 0.5) / width) for _, y, x in chosen], [-value for value, _, _ in chosen]


def layer(n, channels, height, width, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(n, channels, height, width, generator=generator)
    gradients = torch.randn(n, channels, height, width, generator=generator)
    return maps.to(dtype, memory_format=layout), gradients.to(dtype, memory_format=layout)


def peaks(maps, gradients, num_peaks=1, kind="layercam", sign=1, suppress=0.5):
    """The kernel's centers and scores, of layers on the CPU."""
    maps, gradients = [a.to(DEVICE) for a in maps], [g.to(DEVICE) for g in gradients]
    centers, scores = kernels.layercam_peaks(maps, gradients, num_peaks, kind, sign, suppress)
    return centers.cpu(), scores.cpu()


def assert_peaks(actual, activation, num_peaks, suppress, dtype):
    centers, scores = actual
    for i, single in enumerate(activation):
        if single.max() <= 0:
            assert centers[i].isnan().all() and (scores[i] == 0).all()
            continue
        expected_centers, expected_scores = naive_peaks(single, num_peaks, suppress)
        assert_near(scores[i], torch.tensor(expected_scores), dtype, single.max())
        torch.testing.assert_close(centers[i], torch.tensor(expected_centers), atol=1e-7, rtol=0)


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (2, 7, 3, 5), (2, 1, 1, 1), (2, 300, 2, 3)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", FORMATS)
def test_peaks_equal_the_loop(shape, dtype, layout):
    maps, gradients = layer(*shape, dtype, layout, seed=3)
    for kind in ("layercam", "gradcam"):
        for sign in (1, -1):
            activation = naive_map(maps.float(), gradients.float(), kind, sign)
            assert_peaks(peaks([maps], [gradients], 3, kind, sign), activation, 3, 0.5, dtype)


def test_maps_that_are_not_dense_and_layouts_that_differ():
    maps, gradients = layer(4, 6, 5, 4, torch.float32, torch.channels_last, seed=1)
    expected = peaks([maps], [gradients])
    assert all(map(torch.equal, peaks([maps], [gradients.contiguous()]), expected))
    assert all(map(torch.equal, peaks([maps.mT.contiguous().mT], [gradients]), expected))
    assert all(map(torch.equal, peaks([maps[:2]], [gradients[:2]]), (part[:2] for part in expected)))


@pytest.mark.parametrize("kind", ["layercam", "gradcam"])
def test_layers_are_normalised_resized_and_added(kind):
    shapes = [(3, 9, 4, 3), (3, 4, 8, 6), (3, 6, 3, 7), (3, 2, 8, 6)]
    layers = [layer(*shape, torch.float32, FORMATS[i % 2], seed=i) for i, shape in enumerate(shapes)]
    maps, gradients = zip(*layers)
    activation = torch.zeros(3, 8, 6)
    for a, g in layers:
        for i, single in enumerate(naive_map(a, g, kind, 1)):
            spread = single.max() - single.min()
            single = (single - single.min()) / (spread if spread > 0 else 1.0)
            activation[i] += F.interpolate(single[None, None], (8, 6), mode="bilinear", align_corners=False)[0, 0]
    assert_peaks(peaks(maps, gradients, 2, kind), activation, 2, 0.5, torch.float32)


def test_of_equal_cells_the_first_wins():
    ones = torch.ones(2, 3, 3, 5)
    assert torch.equal(peaks([ones], [ones])[0], torch.tensor([[[0.5 / 3, 0.1]], [[0.5 / 3, 0.1]]]))
    late = torch.zeros(1, 1, 4, 4)
    late[0, 0, 2, 1] = late[0, 0, 2, 3] = late[0, 0, 3, 0] = 2.0
    assert peaks([late], [late])[0].tolist() == [[[0.625, 0.375]]]


@pytest.mark.parametrize("corner", [(0, 0), (0, 4), (3, 0), (3, 4)])
def test_a_peak_in_a_corner(corner):
    maps, gradients = torch.ones(1, 2, 4, 5), torch.zeros(1, 2, 4, 5)
    gradients[0, 1, corner[0], corner[1]] = 0.5
    centers, scores = peaks([maps], [gradients], 2)
    expected = torch.tensor([(corner[0] + 0.5) / 4, (corner[1] + 0.5) / 5])
    torch.testing.assert_close(centers[0], expected.expand(2, 2), atol=1e-7, rtol=0)
    assert scores.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("kind", ["layercam", "gradcam"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("of_gradient", [False, True])
def test_what_is_not_finite_stays_with_its_image(kind, bad, of_gradient):
    layers = [layer(4, 3, 5, 3, torch.float32, torch.contiguous_format, seed=2)]
    layers += [layer(4, 2, 3, 2, torch.float32, torch.contiguous_format, seed=3)]
    for count in (1, 2):
        maps, gradients = zip(*((a.clone(), g.abs()) for a, g in layers[:count]))
        expected_centers, expected_scores = peaks(maps, gradients, 2, kind)
        (gradients if of_gradient else maps)[-1][1, 1, 2, 1] = bad
        maps[0][3], gradients[0][3] = 0.0, 0.0
        centers, scores = peaks(maps, gradients, 2, kind)
        assert centers[1].isnan().all() and scores[1].isnan().all()
        assert torch.equal(centers[[0, 2]], expected_centers[[0, 2]])
        assert torch.equal(scores[[0, 2]], expected_scores[[0, 2]])
        # The third says nothing; with a second layer, that one alone speaks.
        assert centers[3].isnan().all().item() == (count == 1) and (scores[3] == 0).all().item() == (count == 1)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_peaks_are_those_of_the_pytorch_body_in_any_order_of_the_batch(seed, height, width, num_peaks):
    maps, gradients = layer(3, 4, height, width, torch.float32, torch.channels_last, seed)
    centers, scores = peaks([maps], [gradients], num_peaks)
    expected_centers, expected_scores = reference.layercam_peaks([maps], [gradients], num_peaks, "layercam", 1, 0.5)
    torch.testing.assert_close(scores, expected_scores, equal_nan=True)
    torch.testing.assert_close(centers, expected_centers, atol=0, rtol=0, equal_nan=True)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        peaks([maps[order]], [gradients[order]], num_peaks)[0], centers[order], atol=0, rtol=0, equal_nan=True
    )


@pytest.mark.skipif(INTERPRETED, reason="of a GPU only")
def test_a_cuda_graph_captures_the_operations_and_they_allocate_nothing_else():
    images, partner, centers = (tensor.to(DEVICE) for tensor in batch(64, 3, 32, 32, 2, layout=torch.channels_last))
    gamma = torch.full((64,), 0.3, device=DEVICE)
    maps, gradients = (tensor.to(DEVICE) for tensor in layer(64, 32, 4, 4, torch.float32, torch.channels_last, 0))

    def both():
        return gradmix_views(images, partner, centers, gamma), *layercam_peaks(maps, gradients, 2)

    expected = both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = kernels.gradmix_views(images, partner, centers, gamma)
    peak = torch.cuda.max_memory_allocated()
    assert peak - before <= result.numel() * result.element_size() + 512
