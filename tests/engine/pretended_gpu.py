"""What runs on CUDA, where there is no GPU: tensors that say they are on one, and are computed on the CPU.

Triton's interpreter computes the kernels, and a forward pass is computed anew where a graph would repeat it.
What a GPU would not do, this does not either: mix tensors of its own with those of the CPU. That a step waits
for the GPU, other than to read what was drawn, fails too.

It changes torch, so it is a process of its own:

    python -m tests.engine.pretended_gpu MODEL QUANTIZATION < sequences
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from transformers import LlamaForCausalLM
from triton.runtime.interpreter import InterpretedFunction

from engine import decode_graphs, model_runner, sampler
from engine.attention import causal_mask
from engine.decode_graphs import DecodeGraphs
from engine.llama import Llama
from engine.model_runner import ModelRunner
from engine.sequence import SamplingParams, Sequence
from tests.engine.test_ahead import PlainGraphs
from tests.engine.test_same_tokens import run_together

GPU = torch.device("meta")
"""What it is called here: torch must know it, and nobody else must use it."""
COPIES = ("aten::_to_copy", "aten::copy_")
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
"""Operations whose result the CPU has to know."""


class GpuTensor(Tensor):
    """Has its numbers in a tensor of the CPU."""

    held: Tensor
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, held: Tensor) -> Self:
        made: Self = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class PretendedGpu(TorchDispatchMode):
    """While it is there, tensors can be made on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


waits: list[str] = []
"""The operations for which the CPU has waited."""


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation of torch, as it would be if some of its tensors were on a GPU."""
    name, leaves = func._schema.name, tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    on_gpu = [isinstance(tensor, GpuTensor) for tensor in tensors]
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    to_gpu = devices[0] == GPU if devices else any(on_gpu[:1] if name in COPIES else on_gpu)
    if name in COPIES:
        if on_gpu[-1] != to_gpu and not any(leaf is True for leaf in leaves):  # as for non_blocking
            waits.append(name)
    elif any(on_gpu):
        # Numbers alone may come from the CPU.
        assert all(tensor.dim() == 0 for tensor in tensors if not isinstance(tensor, GpuTensor)), name
        if name in READS:
            waits.append(name)
    result = func(*tree_map(held_by, args), **tree_map(held_by, kwargs))
    for tensor in tensors:
        if result is held_by(tensor):  # computed in place
            return tensor
    return tree_map(lambda each: GpuTensor(each) if to_gpu and isinstance(each, Tensor) else each, result)


def held_by(value: Any) -> Any:
    """What computes in its place."""
    if isinstance(value, GpuTensor):
        return value.held
    return torch.device("cpu") if value == GPU and isinstance(value, torch.device) else value


run = InterpretedFunction.run


def interpret(kernel: InterpretedFunction, *args: Any, **options: Any) -> None:
    """Runs a kernel, all of whose tensors must be on the GPU."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    assert all(isinstance(tensor, GpuTensor) for tensor in tensors), kernel
    with _disable_current_modes():
        run(kernel, *map(held_by, args), **options)


def on_device(values: Any, device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """As in the sampler, without memory that only CUDA can pin."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def mask(num_queries: int, context_len: int, device: torch.device) -> Tensor:
    """On CUDA it is one by name only, which that alone knows."""
    return causal_mask(num_queries, context_len, torch.device("cpu")).to(device, non_blocking=True)


def pretend() -> None:
    times = iter([2.0, 1.0])  # ms of a token, and with kernels of its own
    patches: list[tuple[Any, str, Any]] = [
        (InterpretedFunction, "run", interpret),
        (torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None)),
        (torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4)),
        (Tensor, "pin_memory", lambda tensor: tensor),
        (model_runner, "causal_mask", mask),
        (ModelRunner, "_on_cuda", property(lambda runner: True)),
        (DecodeGraphs, "_record", PlainGraphs._record),
        (decode_graphs, "_milliseconds", lambda replay: next(times)),
        *((module, "on_device", on_device) for module in (decode_graphs, model_runner, sampler)),
    ]
    # Inference mode, in which they run, has tensors of its own kind.
    for name in ("capture_graphs", "launch", "finish"):
        patches.append((ModelRunner, name, vars(ModelRunner)[name].__wrapped__))
    for owner, name, value in patches:
        setattr(owner, name, value)
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def main() -> None:
    sequences = [Sequence(prompt, SamplingParams(**params)) for prompt, params in json.load(sys.stdin)]
    folder, quantization = sys.argv[1:]
    loaded = LlamaForCausalLM.from_pretrained(Path(folder), dtype=torch.float32)
    pretend()
    with PretendedGpu(), torch.no_grad():
        model = Llama(loaded, device=GPU, int8=quantization == "int8").eval()
        runner = ModelRunner(model, num_blocks=20, max_num_seqs=8)
        runner.capture_graphs(8, 512)
        waits.clear()
        run_together(runner, sequences, num_blocks=20, max_batch_tokens=32, max_num_seqs=8, every=9)
    assert not waits, waits
    print(json.dumps([sequence.token_ids for sequence in sequences]))


if __name__ == "__main__":
    main()
