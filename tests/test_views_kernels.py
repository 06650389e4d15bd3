"""`render_views` as PyTorch sees it, what it refuses, and its kernel: interpreted, compiled and launched."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline import views
from data_pipeline.views import ViewConfig, draw_parameters, render_view, render_views
from tests.test_gradmix_kernels import Allocations
from tests.triton_support import RecordingKernel, compile_for_hopper, run_checks
from trainer.gradmix import gradmix_views

N = 6
IMAGES = torch.randint(0, 256, (N, 16, 12, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
INDICES = torch.arange(N) + 2**33
PARTNER = torch.tensor([1, 2, 0, 4, 5, 3])
CENTERS = torch.rand(N, 2, 2, generator=torch.Generator().manual_seed(1))
GAMMAS = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 1.0])
STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25)}


def parameters(indices=INDICES, epoch=0, source_size=(16, 12), config=ViewConfig(rotation=5.0)):  # noqa: B008
    return [draw_parameters(config, source_size, indices, seed=7, epoch=epoch, view=view) for view in (0, 1)]


def test_the_kernel_in_tritons_interpreter():
    run_checks("views_kernel_checks.py", interpreted=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_on_the_gpu():
    run_checks("views_kernel_checks.py", interpreted=False)


@pytest.fixture
def recorded(monkeypatch):
    """The module of the kernels, launching nothing."""
    kernels = pytest.importorskip("data_pipeline.views_kernels")
    for module, name in ((kernels, "_render_views_kernel"), (kernels.patch_kernels, "_gradmix_views_kernel")):
        monkeypatch.setattr(module, name, RecordingKernel(getattr(module, name)))
    return kernels


def launch(recorded, size, channels, dtype, rotation):
    """The launch for images of twice the views' size."""
    images = torch.zeros(N, 2 * size, 2 * size, channels, dtype=torch.uint8)
    config = ViewConfig(rotation=rotation)
    first, second = parameters(source_size=(2 * size, 2 * size), config=config)
    mean, std = STATISTICS["mean"][:channels], STATISTICS["std"][:channels]
    recorded.render_views(images, first, second, size, mean, std, dtype, None, None, None)
    return recorded._render_views_kernel.launches[-1]


@pytest.mark.parametrize(
    ("size", "channels", "dtype", "rotation"),
    [
        (32, 3, torch.bfloat16, 0.0),
        (32, 3, torch.float32, 5.0),
        (28, 1, torch.float16, 5.0),
        (64, 3, torch.bfloat16, 0.0),
        (96, 3, torch.bfloat16, 0.0),
    ],
)
def test_the_kernel_compiles_for_a_gpu_and_reads_and_writes_along_rows(recorded, size, channels, dtype, rotation):
    compiled = compile_for_hopper(recorded._render_views_kernel, launch(recorded, size, channels, dtype, rotation))
    assert compiled.asm["cubin"] and compiled.metadata.shared <= 8192
    # The first axis of a tile is that of its columns, and neighbouring threads have to be along it.
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#blocked\d*) = #ttg.blocked<{.*order = \[(.*?)\]", code, re.MULTILINE))
    used = re.findall(r"tt\.(?:load|store) .*tensor<\d+x\d+x!tt\.ptr<\w+>, (#blocked\d*)>", code)
    assert used and {layouts[name] for name in used} == {"0, 1"}


def test_there_is_a_launch_for_views_and_one_for_patches_which_allocate_the_result_only(recorded):
    first, second = parameters()
    for patches, blocks in (((None, None, None), 2), ((PARTNER, CENTERS, 0.3), 3), ((PARTNER, CENTERS, GAMMAS), 3)):
        with Allocations() as memory:
            result = recorded.render_views(IMAGES, first, second, 11, *STATISTICS.values(), torch.bfloat16, *patches)
        assert result.shape == (blocks * N, 3, 11, 11) and list(memory.made.values()) == [result.numel() * 2]
        assert recorded._render_views_kernel.launches.pop().grid == (2 * N,)
        assert not recorded._render_views_kernel.launches
        launches = recorded.patch_kernels._gradmix_views_kernel.launches
        assert len(launches) == blocks - 2
        if launches:
            mixed, views, *_ = launches.pop().args
            assert len(mixed) == len(views) == N
            assert mixed.data_ptr() == result[2 * N :].data_ptr() and views.data_ptr() == result.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.3, GAMMAS])
def test_the_blocks_are_the_views_and_their_mixture(dtype, gamma):
    first, second = parameters()
    options = {"size": 13, "dtype": dtype, **STATISTICS}
    rendered = render_views(IMAGES, first, second, partner=PARTNER, centers=CENTERS, gamma=gamma, **options)
    expected = [render_view(IMAGES, view, **options) for view in (first, second)]
    expected.append(gradmix_views(expected[0], PARTNER, CENTERS, gamma))
    assert torch.equal(rendered, torch.cat(expected)) and rendered.dtype == dtype
    assert rendered.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(render_views(IMAGES, first, second, **options), torch.cat(expected[:2]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile_takes_it_whole(backend):
    def step(images, indices, gamma, epoch):
        first, second = parameters(indices, epoch)
        patches = {"partner": PARTNER, "centers": CENTERS, "gamma": gamma}
        return render_views(images, first, second, size=16, dtype=torch.bfloat16, **patches, **STATISTICS) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for epoch, gamma in ((0, 0.3), (1, 0.4), (2, GAMMAS)):
        result = compiled(IMAGES, INDICES, gamma, epoch)
        assert torch.equal(result, step(IMAGES, INDICES, gamma, epoch))
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_parameters_are_drawn_alike_when_compiled():
    """All bits: a random number that is another one would train another network."""
    indices = torch.arange(2000)
    torch._dynamo.reset()
    compiled = torch.compile(parameters, fullgraph=True)
    assert all(map(torch.equal, tree_tensors(compiled(indices, 3)), tree_tensors(parameters(indices, 3))))


def tree_tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Operations(TorchDispatchMode):
    """The operations that are called within this context."""

    def __init__(self) -> None:
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.add(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def test_drawing_parameters_copies_nothing_between_host_and_device():
    aten = torch.ops.aten
    copies = {aten._local_scalar_dense, aten.lift_fresh, aten.nonzero}
    with FakeTensorMode(), Operations() as operations:
        parameters(torch.arange(N, device="cuda"))
        assert operations.called and not operations.called & copies
        torch.tensor([1.0], device="cuda")
        assert operations.called & copies, "the test sees no copies"


def test_it_is_registered_as_it_behaves():
    first, second = map(views._pack, parameters())
    for patches in ((None, None, None, None), (PARTNER, CENTERS, 0.3, None), (PARTNER, CENTERS, 1.0, GAMMAS)):
        arguments = (IMAGES, first, second, 9, *STATISTICS.values(), torch.float16, *patches)
        torch.library.opcheck(torch.ops.gradmix.render_views, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": IMAGES.float()}, r"images is \(6, 16, 12, 3\) torch.float32; give \(N, H, W, 1 or 3\) torch.uint8"),
        ({"images": IMAGES[..., :2]}, r"images is \(6, 16, 12, 2\)"),
        ({"images": IMAGES[0]}, r"images is \(16, 12, 3\)"),
        ({"images": IMAGES[:, :0]}, "nothing of it empty"),
        ({"first": parameters(INDICES[:2])[0]}, "first has parameters of 2 views; give 6, one an image"),
        ({"second": parameters(config=ViewConfig())[1]}, "one of first and second has angles"),
        ({"images": IMAGES.to("meta")}, "first is on cpu; put it on meta"),
        ({"size": 0}, "size is 0; set it to 1 or more"),
        ({"mean": (0.5,)}, "mean has 1 values; give 3"),
        ({"std": (0.5,) * 4}, "std has 4 values; give 3"),
        ({"dtype": torch.float64}, "dtype is torch.float64; give torch.float32"),
        ({"partner": None}, "some of partner, centers and gamma are None; give all three or none"),
        ({"gamma": None}, "some of partner, centers and gamma are None"),
        ({"partner": PARTNER[:3]}, r"partner is \(3,\) torch.int64; give \(6,\)"),
        ({"partner": PARTNER + 1}, "partner has an index out of range; set it within 0 to 5"),
        ({"partner": PARTNER.to("meta")}, "partner is on meta; put it on cpu"),
        ({"centers": CENTERS[:, :0]}, "P patches of 1 or more"),
        ({"centers": CENTERS * torch.nan}, "centers has a place that is not finite"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"gamma": float("inf")}, "gamma is inf"),
        ({"gamma": 0.0}, r"gamma is 0.0; set it within \(0, 1\]"),
        ({"gamma": GAMMAS * torch.nan}, "gamma has a value out of range"),
        ({"gamma": GAMMAS[:2]}, r"gamma is \(2,\); give a number or \(6,\)"),
    ],
)
def test_it_refuses_in_one_line_what_is_wrong(change, message):
    first, second = parameters()
    arguments = {"images": IMAGES, "first": first, "second": second, "size": 16, "partner": PARTNER}
    arguments |= {"centers": CENTERS, "gamma": 0.3, **STATISTICS, **change}
    with pytest.raises(ValueError, match=message) as refused:
        render_views(**arguments)
    assert "\n" not in str(refused.value)


def test_the_pytorch_body_needs_no_triton():
    program = "import sys; sys.modules['triton'] = None; import torch; from data_pipeline.views import *\n"
    program += "first = draw_parameters(ViewConfig(), (8, 8), torch.arange(2), seed=0, epoch=0, view=0)\n"
    program += "images = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)\n"
    program += "render_views(images, first, first, size=8, mean=(0.5,), std=(0.5,))"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)
