"""Testing Triton kernels on any machine: in Triton's interpreter, by compiling for a GPU that is not there, and by what
a launcher would launch.

Triton decides when it is imported whether it compiles or interprets. Checks that run kernels therefore stand in a file
without `test_` in its name, which a test runs in a process of its own. They take their tensors to `DEVICE`, so that
the same file runs compiled on a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def run_checks(file: str, *, interpreted: bool) -> None:
    """Run the checks in tests/`file`, in the interpreter or compiled; a failure shows pytest's output."""
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:xdist", f"tests/{file}"]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]


class Launch(NamedTuple):
    grid: tuple[int, ...]
    args: tuple
    options: dict


class RecordingKernel:
    """In place of a kernel: remembers how it was launched."""

    def __init__(self, kernel) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(Launch(grid, args, options))


def compile_for_hopper(recorded: RecordingKernel, launch: Launch):
    """The machine code for compute capability 9.0 of a kernel, for arguments as in this launch. Needs no GPU.

    The interpreter forgives what the compiler does not: this is the test that a kernel is Triton at all.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = recorded.kernel
    values = dict(zip(kernel.arg_names, launch.args)) | launch.options
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    signature = {name: "constexpr" if name in constants else _signature(values[name]) for name in kernel.arg_names}
    place = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    options = {name: value for name, value in values.items() if name not in place}
    # Of tensors, as of an allocator's memory, the launcher would know that they are aligned to 16 bytes.
    aligned = {place[name]: [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    source = ASTSource(kernel, signature, {place[name]: values[name] for name in constants}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def _signature(value):
    if isinstance(value, tuple):
        return tuple(_signature(item) for item in value)
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


if INTERPRETED:
    from triton.runtime import interpreter

    # Of a launch's options the interpreter takes none: assertions are checked as if all kernels asked for it.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope) -> None:
        """NumPy 2.4 makes no integer of an array of one element any more, which Triton 3.6 asks it for."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index
