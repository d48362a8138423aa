"""A linear layer for the CPU whose weights are narrower than float32, in which it computes.

Where bfloat16 holds the weights exactly, as those of a model that was published in it, it gives what a
layer with weights of float32 gives, from half the memory; with weights of int8 it takes a quarter. Torch has
no fast operator for either. Of bfloat16 both factors must be; fbgemm's with float16 is slower than oneDNN's
of float32 from 16 rows on; that with int8 is made for inputs of bfloat16. So the product is our own,
narrow_linear.c, compiled for this processor where it runs. Where that can't be done, there are PackedLinear
and Int8Linear.
"""

import ctypes
import logging
import os
import shlex
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger("llama.engine")

_SOURCE = Path(__file__).with_suffix(".c")
_INPUTS = {torch.bfloat16: 1, torch.int8: 2}
"""For so many of them a word of the packed weights has one each, of two rows."""


class NarrowLinear(nn.Module):
    """A linear layer that gives what `F.linear` gives in float32, but for the order of its sums.

    What a row gives does not depend on how many there are beside it.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        *,
        flags: tuple[str, ...] = (),
    ) -> None:
        """
        Args:
            weight: [out_features, in_features], bfloat16 or int8.
            scale: [out_features], what the weights of a row are multiplied with; None: nothing.
            bias: [out_features].
            flags: for the compiler.
        """
        super().__init__()
        kernel = compiled(weight.dtype, *flags)
        assert kernel is not None
        self._linear = kernel.linear
        self._out_features, in_features = weight.shape
        inputs = _INPUTS[weight.dtype]
        missing = -self._out_features % kernel.width
        self._missing_inputs = -in_features % inputs
        weight = F.pad(weight.detach(), (0, self._missing_inputs, 0, missing))
        panels = weight.view(-1, 2, kernel.width // 2, weight.shape[1] // inputs, inputs)
        words = panels.permute(0, 3, 2, 4, 1).flatten(3).contiguous().view(torch.int32).squeeze(-1)

        def padded(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else F.pad(vector.detach().float(), (0, missing))

        self.weight: Tensor
        self.scale: Tensor | None
        self.bias: Tensor | None
        self.register_buffer("weight", words)  # as they are no floats, what moves a module leaves them alone
        self.register_buffer("scale", padded(scale))
        self.register_buffer("bias", padded(bias))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features], float32"""
        x = F.pad(x, (0, self._missing_inputs)) if self._missing_inputs else x.contiguous()
        panels, _, lanes = self.weight.shape
        y, scratch = x.new_empty(len(x), panels * 2 * lanes), torch.empty_like(x)
        tensors = (x, self.weight, self.scale, self.bias, y, scratch)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        self._linear(*pointers, *x.shape, y.shape[1], torch.get_num_threads())
        return y[:, : self._out_features]


def can_narrow(to: torch.dtype, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a layer that computes in a type on a device can be such a one, with weights of type `to`."""
    return device.type == "cpu" and dtype == torch.float32 and compiled(to) is not None


def is_bfloat16(weight: Tensor) -> bool:
    """Whether bfloat16 holds all weights exactly, whatever type they are in."""
    return bool((weight.bfloat16() == weight).all())


class Kernel(NamedTuple):
    """What narrow_linear.c is compiled to."""

    linear: Any
    width: int
    """Rows of a panel."""


@cache
def compiled(narrow: torch.dtype, *flags: str) -> Kernel | None:
    """The product, compiled for this processor, in a fraction of a second; None where that can't be done.

    Args:
        narrow: the type of the weights.
        flags: for the compiler, after its own.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    # Without libraries: the threads must be those of the OpenMP that torch has loaded, not a second set.
    options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffreestanding", "-nostdlib"]
    options += [f"-DINPUTS={_INPUTS[narrow]}", *flags]
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder, "linear.so")
            command = [*compiler, *options, str(_SOURCE), "-o", str(path)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            library = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.info(
            "this is half as fast as it could be: the product with weights of %s can't be compiled, which "
            "needs a C compiler (gcc) and a processor with AVX2: %s",
            str(narrow).removeprefix("torch."),
            reason.strip().splitlines()[-1],
        )
        return None
    library.linear.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 3 + [ctypes.c_int]
    library.linear.restype = None
    return Kernel(library.linear, ctypes.c_int64.in_dll(library, "width").value)
