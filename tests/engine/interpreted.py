"""What runs on CUDA, where there is no GPU: Triton's interpreter computes the kernels, and a forward pass is
computed anew where a graph would repeat it.

It changes torch, so it is a process of its own:

    python -m tests.engine.interpreted MODEL QUANTIZATION < sequences
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from engine import decode_graphs, llama
from engine.decode_graphs import DecodeGraphs
from engine.model_runner import ModelRunner, load_model
from engine.sequence import SamplingParams, Sequence
from tests.engine.test_ahead import PlainGraphs
from tests.engine.test_same_tokens import run_together


def pretend_to_be_cuda() -> None:
    """Tensors stay where they are, but all that asks hears that this is a GPU."""
    make, times = torch.tensor, iter([2.0, 1.0])  # ms of a token, and with kernels of its own
    patches: list[tuple[Any, str, Any]] = [
        (torch, "tensor", lambda *args, pin_memory=False, **options: make(*args, **options)),
        (torch.Tensor, "is_cuda", property(lambda tensor: True)),
        (torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None)),
        (torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4)),
        (ModelRunner, "_on_cuda", property(lambda runner: True)),
        (DecodeGraphs, "_record", PlainGraphs._record),
        (decode_graphs, "_milliseconds", lambda replay: next(times)),
    ]
    for owner, name, value in patches:
        setattr(owner, name, value)


def main() -> None:
    sequences = [Sequence(prompt, SamplingParams(**params)) for prompt, params in json.load(sys.stdin)]
    vars(llama)["can_pack"] = lambda device, dtype: False
    folder, quantization = sys.argv[1:]
    model = load_model(Path(folder), torch.device("cpu"), torch.float32, int8=quantization == "int8")
    pretend_to_be_cuda()
    runner = ModelRunner(model, num_blocks=20, max_num_seqs=8)
    runner.capture_graphs(8, 512)
    run_together(runner, sequences, num_blocks=20, max_batch_tokens=32, max_num_seqs=8, every=9)
    print(json.dumps([sequence.token_ids for sequence in sequences]))


if __name__ == "__main__":
    main()
