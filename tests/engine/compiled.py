"""Compiles the kernels as they are launched for Llama-3-8B, for GPUs that are not here; tells their needs.

    python -m tests.engine.compiled 80 86 90 120

The arguments are compute capabilities without their dot; each line of the output is a kernel's name, the
capability, and the bytes of shared memory that a program of it takes.
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from engine import decode_attention, int8_kernels, layer_kernels, sample_kernels, vector_kernels
from engine.attention import Contexts
from engine.int8_linear import Int8Linear
from engine.sequence import BLOCK_SIZE

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 4096, 32, 8, 128, 14_336, 128_256
TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
capabilities = [int(capability) for capability in sys.argv[1:]]


def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """In the place of a launch."""
    arguments = dict(zip(kernel.arg_names, args, strict=False))
    arguments |= {p.name: options.pop(p.name) for p in kernel.params if p.name in options}
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for parameter in kernel.params:
        name, place, value = parameter.name, (parameter.num,), arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[place] = "constexpr", value
            continue
        signature[name] = type_of(value)
        is_any = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if not is_any and (isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[place] = [["tt.divisibility", 16]]
    for capability in capabilities:
        source = ASTSource(kernel, signature, constants, attributes)
        done = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(kernel.fn.__name__, capability, done.metadata.shared, flush=True)


def type_of(value: Tensor | float) -> str:
    """As Triton calls it."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if isinstance(value, int) else "fp32"


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_attention(sequences: int, dtype: torch.dtype) -> None:
    cache = tensor(100, BLOCK_SIZE, 2, KV_HEADS, HEAD_DIM, dtype=dtype)
    tables, lens = tensor(sequences, 64, dtype=torch.int32), tensor(sequences, dtype=torch.int32)
    contexts = Contexts(slice(0, sequences), tables, lens)
    decode_attention.decode_attention(
        tensor(sequences, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=dtype)[:, :HEADS], cache, contexts, 0.1
    )


def launch_layer(tokens: int) -> None:
    layer_kernels.add_norm(tensor(tokens, HIDDEN), tensor(tokens, HIDDEN), tensor(HIDDEN), 1e-5)
    layer_kernels.silu_mul(tensor(tokens, 2 * MLP))
    layer_kernels.rotate_and_store(
        tensor(tokens, HEADS + 2 * KV_HEADS, HEAD_DIM),
        tensor(tokens, HEAD_DIM),
        tensor(tokens, HEAD_DIM),
        tensor(tokens, dtype=torch.long),
        tensor(100, BLOCK_SIZE, 2, KV_HEADS, HEAD_DIM),
    )


def launch_vector(matrix: type[nn.Linear] | type[Int8Linear]) -> None:
    def of(size_out: int, size_in: int) -> nn.Module:
        weight = tensor(size_out, size_in)
        if matrix is Int8Linear:
            return Int8Linear(weight, None)
        return nn.Linear(size_in, size_out, bias=False, device="meta", dtype=weight.dtype)

    x = tensor(1, HIDDEN)
    vector_kernels.linear(x, of(HIDDEN, HIDDEN))
    vector_kernels.norm_linear(x, x, tensor(HIDDEN), 1e-5, of(2 * MLP, HIDDEN))
    vector_kernels.silu_linear(tensor(1, 2 * MLP), of(HIDDEN, MLP))


def launch_int8(tokens: int) -> None:
    for size_out, size_in in ((HIDDEN, HIDDEN), (2 * MLP, HIDDEN)):
        weight = tensor(size_out, size_in, dtype=torch.int8)
        int8_kernels.linear(tensor(tokens, size_in), weight, tensor(size_out))


def launch_sampler(sequences: int) -> None:
    logits, rows = tensor(sequences, VOCAB, dtype=torch.float32), tensor(sequences, dtype=torch.long)
    knob = tensor(sequences, dtype=torch.float32)
    seen = tensor(256, VOCAB, dtype=torch.bool)
    counts = tensor(256, VOCAB, dtype=torch.int32)
    sample_kernels.penalize(logits, rows, seen, counts, knob, knob, knob)
    sample_kernels.choose(logits, knob, knob, knob, knob, knob)


def main() -> None:
    JITFunction.run = compile_only
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=82)
    for sequences in (1, 64):
        launch_attention(sequences, torch.bfloat16)
    launch_attention(1, torch.float32)
    launch_layer(64)
    launch_vector(nn.Linear)
    launch_vector(Int8Linear)
    for tokens in (1, 64, 2048):
        launch_int8(tokens)
    launch_sampler(64)


if __name__ == "__main__":
    main()
