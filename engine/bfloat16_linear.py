"""A linear layer for the CPU whose weights are bfloat16; what it computes with is float32.

It is for weights that bfloat16 holds exactly, as those of a model that was published in it: then it gives
what a layer with weights of float32 gives, from half the memory. Torch has no operator for that. Both factors
must be of one type; of those with narrow weights, fbgemm's float16 is slower than oneDNN's float32 from 16
rows on. So the product is our own, bfloat16_linear.c, compiled for this processor where it runs. Where that
can't be done, there is PackedLinear.
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


class Bfloat16Linear(nn.Module):
    """A linear layer that gives what `F.linear` gives in float32, but for the order of its sums.

    What a row gives does not depend on how many there are beside it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, flags: tuple[str, ...] = ()) -> None:
        """
        Args:
            weight: [out_features, in_features], one that `can_keep` takes; bias: [out_features].
            flags: for the compiler.
        """
        super().__init__()
        kernel = compiled(*flags)
        assert kernel is not None
        self._linear = kernel.linear
        self._out_features, in_features = weight.shape
        missing = -self._out_features % kernel.width
        padded = F.pad(weight.detach().bfloat16(), (0, 0, 0, missing))
        panels = padded.view(-1, 2, kernel.width // 2, in_features).permute(0, 3, 2, 1).contiguous()
        self.weight: Tensor
        self.bias: Tensor | None
        # As words: what moves a module to float32 leaves those alone.
        self.register_buffer("weight", panels.view(torch.int32).squeeze(-1))
        self.register_buffer("bias", None if bias is None else F.pad(bias.detach().float(), (0, missing)))

    def forward(self, x: Tensor) -> Tensor:
        """[rows, in_features] -> [rows, out_features], float32"""
        x = x.contiguous()
        panels, _, lanes = self.weight.shape
        y, scratch = x.new_empty(len(x), panels * 2 * lanes), torch.empty_like(x)
        bias = None if self.bias is None else self.bias.data_ptr()
        pointers = (x.data_ptr(), self.weight.data_ptr(), bias, y.data_ptr(), scratch.data_ptr())
        self._linear(*pointers, *x.shape, y.shape[1], torch.get_num_threads())
        return y[:, : self._out_features]


def can_keep(weight: Tensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a matrix that is to compute in a type on a device can as well be kept in bfloat16.

    Args:
        weight: [out_features, in_features], of any type.
    """
    if device.type != "cpu" or dtype != torch.float32 or compiled() is None:
        return False
    return bool((weight.bfloat16() == weight).all())


class Kernel(NamedTuple):
    """What bfloat16_linear.c is compiled to."""

    linear: Any
    width: int
    """Rows of a panel."""


@cache
def compiled(*flags: str) -> Kernel | None:
    """The product, compiled for this processor, in a fraction of a second; None where that can't be done.

    Args:
        flags: for the compiler, after its own.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    # Without libraries: the threads must be those of the OpenMP that torch has loaded, not a second set.
    options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffreestanding", "-nostdlib", *flags]
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder, "linear.so")
            command = [*compiler, *options, _SOURCE, "-o", path]
            subprocess.run(command, check=True, capture_output=True, text=True)
            library = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        log.info(
            "weights stay in float32: in bfloat16 they would take half the memory and time, but for that a C "
            "compiler (gcc) and a processor with AVX2 are needed: %s",
            reason.strip().splitlines()[-1],
        )
        return None
    library.linear.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3 + [ctypes.c_int]
    library.linear.restype = None
    return Kernel(library.linear, ctypes.c_int64.in_dll(library, "width").value)
