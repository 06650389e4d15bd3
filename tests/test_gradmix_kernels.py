"""The operations as PyTorch sees them, what they refuse, and their kernels: interpreted, compiled and launched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.dispatch import pytorch_body, use_triton
from tests.triton_support import RecordingKernel, compile_for_hopper, run_checks
from trainer.gradmix import activation_map, find_peaks, gradmix_views, layercam_peaks

N = 4
IMAGES = torch.randn(N, 3, 16, 12, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
PARTNER = torch.tensor([1, 2, 3, 0])
CENTERS = torch.rand(N, 2, 2, generator=torch.Generator().manual_seed(1))
GAMMAS = torch.tensor([0.1, 0.3, 0.5, 1.0])
MAPS = torch.rand(N, 5, 6, 7, generator=torch.Generator().manual_seed(2))
GRADIENTS = torch.randn(N, 5, 6, 7, generator=torch.Generator().manual_seed(3))


def test_the_kernels_in_tritons_interpreter():
    run_checks("gradmix_kernel_checks.py", interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_on_the_gpu():
    run_checks("gradmix_kernel_checks.py", interpreted=False)


@pytest.fixture
def recorded(monkeypatch):
    """The module of the kernels, launching nothing."""
    kernels = pytest.importorskip("trainer.gradmix.kernels")
    modules = (kernels.patch_kernels, "_gradmix_views_kernel"), (kernels, "_layercam_peaks_kernel")
    for module, name in modules:
        monkeypatch.setattr(module, name, RecordingKernel(getattr(module, name)))
    return kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gamma", [0.5, 0.1, GAMMAS])
def test_the_views_kernel_compiles_for_a_gpu(recorded, dtype, layout, gamma):
    images = torch.zeros(N, 3, 32, 32, dtype=dtype).to(memory_format=layout)
    recorded.gradmix_views(images, PARTNER, CENTERS, gamma)
    kernel = recorded.patch_kernels._gradmix_views_kernel
    compiled = compile_for_hopper(kernel, kernel.launches[0])
    assert compiled.asm["cubin"] and compiled.metadata.shared == 0
    # The image is copied 16 bytes at a time.
    code = compiled.asm["ptx"]
    assert "ld.global.v4.b32" in code and "st.global.v4.b32" in code


@pytest.mark.parametrize("size", [32, 64, 224])
def test_few_kernels_serve_every_size_of_a_patch(recorded, size):
    """γ is drawn at every step, and each kernel takes as long to compile as some ten steps."""
    images = torch.zeros(1, 3, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    for gamma in torch.linspace(0.1, 0.5, 400).tolist():
        recorded.gradmix_views(images, PARTNER[:1], CENTERS[:1], gamma)
    launches = recorded.patch_kernels._gradmix_views_kernel.launches
    assert len({tuple(launch.options.items()) for launch in launches}) <= 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["layercam", "gradcam"])
def test_the_peaks_kernel_compiles_for_a_gpu(recorded, dtype, layout, kind):
    layers = [torch.zeros(N, *shape, dtype=dtype).to(memory_format=layout) for shape in ((256, 8, 8), (512, 4, 4))]
    for maps in (layers, layers[1:]):
        recorded.layercam_peaks(maps, maps, 3, kind, 1, 0.5)
        compiled = compile_for_hopper(recorded._layercam_peaks_kernel, recorded._layercam_peaks_kernel.launches[-1])
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 8192


def test_small_images_make_enough_programs_and_maps_too_large_for_registers_go_to_pytorch(recorded):
    recorded.gradmix_views(torch.zeros(1024, 3, 32, 32), torch.zeros(1024).long(), torch.zeros(1024, 1, 2), 0.3)
    assert recorded.patch_kernels._gradmix_views_kernel.launches[0].grid[0] >= 1024
    large = torch.rand(1, 2, 130, 129)
    centers, _ = recorded.layercam_peaks([large], [large], 1, "layercam", 1, 0.5)
    assert torch.equal(centers, layercam_peaks(large, large)[0]) and not recorded._layercam_peaks_kernel.launches


class Allocations(TorchDispatchMode):
    """The memory that operations within this context have made, as {address: bytes}."""

    def __init__(self) -> None:
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.made[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("gamma", [0.3, GAMMAS])
def test_the_launchers_allocate_their_results_only(recorded, gamma):
    with Allocations() as views:
        mixed = recorded.gradmix_views(IMAGES, PARTNER, CENTERS, gamma)
    assert list(views.made.values()) == [mixed.numel() * mixed.element_size()]
    with Allocations() as peaks:
        centers, scores = recorded.layercam_peaks([MAPS, MAPS], [GRADIENTS, GRADIENTS], 2, "layercam", 1, 0.5)
    assert sorted(peaks.made.values()) == [4 * scores.numel(), 4 * centers.numel()]


def compute(images, partner, centers, gamma, maps, gradients):
    return gradmix_views(images * 2, partner, centers, gamma) + 1, *layercam_peaks([maps * 1, maps], [gradients] * 2, 2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_takes_the_operations_whole(backend):
    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend=backend)
    for gamma in (0.3, 0.4, GAMMAS):
        arguments = (IMAGES, PARTNER, CENTERS, gamma, MAPS, GRADIENTS)
        mixed, *peaks = compiled(*arguments)
        assert mixed.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close((mixed, *peaks), compute(*arguments))


def test_the_operations_are_registered_as_they_behave():
    torch.library.opcheck(torch.ops.gradmix.views, (IMAGES, PARTNER, CENTERS, 0.3, None))
    torch.library.opcheck(torch.ops.gradmix.views, (IMAGES, PARTNER, CENTERS, 1.0, GAMMAS))
    torch.library.opcheck(torch.ops.gradmix.layercam_peaks, ([MAPS], [GRADIENTS], 2, "gradcam", -1, 0.5))


def test_a_tensor_a_list_and_the_two_steps_are_the_same():
    expected = find_peaks(activation_map(MAPS, GRADIENTS), 2, 0.4)
    for maps, gradients in ((MAPS, GRADIENTS), ([MAPS], (GRADIENTS,))):
        assert all(map(torch.equal, layercam_peaks(maps, gradients, 2, suppress=0.4), expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES[0]}, r"images is \(3, 16, 12\); give \(N, C, H, W\)"),
        ({"images": IMAGES[:0]}, "nothing of it empty"),
        ({"images": IMAGES.long()}, "images is torch.int64; give torch.float32"),
        ({"partner": PARTNER[:3]}, r"partner is \(3,\) torch.int64; give \(4,\)"),
        ({"partner": PARTNER.int()}, "partner is .* torch.int32; give .* torch.int64"),
        ({"partner": PARTNER + 1}, "partner has an index out of range; set it within 0 to 3"),
        ({"partner": PARTNER - 1}, "partner has an index out of range"),
        ({"centers": CENTERS[:, 0]}, r"centers is \(4, 2\); give \(4, P, 2\)"),
        ({"centers": CENTERS[:, :0]}, "P patches of 1 or more"),
        ({"centers": CENTERS.long()}, "centers is torch.int64"),
        ({"centers": CENTERS * torch.nan}, "centers has a place that is not finite"),
        ({"centers": CENTERS.to("meta")}, "centers is on meta; put it on cpu"),
        ({"gamma": 0.0}, r"gamma is 0.0; set it within \(0, 1\]"),
        ({"gamma": 1.1}, "gamma is 1.1"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"gamma": float("inf")}, "gamma is inf"),
        ({"gamma": GAMMAS[:2]}, r"gamma is \(2,\); give a number or \(4,\)"),
        ({"gamma": GAMMAS * torch.nan}, "gamma has a value out of range"),
        ({"gamma": GAMMAS.to("meta")}, "gamma is on meta"),
    ],
)
def test_views_refuse_in_one_line_what_is_wrong(change, message):
    arguments = {"images": IMAGES, "partner": PARTNER, "centers": CENTERS, "gamma": 0.3} | change
    with pytest.raises(ValueError, match=message) as refused:
        gradmix_views(**arguments)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": []}, "gradients has 1 layers and maps 0"),
        ({"gradients": [GRADIENTS, GRADIENTS]}, "gradients has 2 layers and maps 1"),
        ({"maps": MAPS[0]}, r"maps has a layer of \(5, 6, 7\); give \(N, K, h, w\)"),
        ({"maps": MAPS.long()}, "maps is torch.int64"),
        ({"gradients": GRADIENTS.double()}, "gradients is torch.float64"),
        ({"gradients": GRADIENTS[:, :4]}, r"gradients has a layer of \(4, 4, 6, 7\); give \(4, 5, 6, 7\), as its map"),
        ({"maps": [MAPS, MAPS[:2]], "gradients": [GRADIENTS, GRADIENTS[:2]]}, "with one N"),
        ({"gradients": GRADIENTS.to("meta")}, "gradients is on meta; put it on cpu"),
        ({"num_peaks": 0}, "num_peaks is 0; set it to 1 or more"),
        ({"kind": "cam"}, "kind is 'cam'; set it to one of layercam, gradcam"),
        ({"sign": 0}, "sign is 0; set it to 1 or -1"),
        ({"suppress": float("nan")}, "suppress is nan"),
    ],
)
def test_peaks_refuse_in_one_line_what_is_wrong(change, message):
    arguments = {"maps": MAPS, "gradients": GRADIENTS} | change
    with pytest.raises(ValueError, match=message) as refused:
        layercam_peaks(**arguments)
    assert "\n" not in str(refused.value)


class OnCuda:
    is_cuda = True


def test_one_place_says_which_body_runs(monkeypatch):
    monkeypatch.delenv("GRADMIX_PYTORCH_BODY", raising=False)
    installed = pytest.importorskip("triton") is not None
    assert use_triton(OnCuda()) is installed and not use_triton(IMAGES)
    with pytorch_body():
        assert not use_triton(OnCuda())
        with pytorch_body():
            pass
        assert not use_triton(OnCuda())
    assert use_triton(OnCuda())
    monkeypatch.setenv("GRADMIX_PYTORCH_BODY", "1")
    assert not use_triton(OnCuda())


def test_the_pytorch_body_needs_no_triton():
    program = "import sys; sys.modules['triton'] = None; import torch; from trainer.gradmix import gradmix_views\n"
    program += "gradmix_views(torch.rand(2, 3, 8, 8), torch.tensor([1, 0]), torch.rand(2, 1, 2), 0.5)"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)
