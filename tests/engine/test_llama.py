"""The forward pass, in the types and on the devices that it is asked for."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.quantization import logits_from
from engine.llama import Llama
from engine.sequence import BLOCK_SIZE
from tests.models import SHAPES, make_model


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_bfloat16_is_off_by_no_more_than_in_transformers(shape: str, tmp_path: Path) -> None:
    path = make_model(tmp_path, shape)
    loaded = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    token_ids = torch.randint(256, (5 * BLOCK_SIZE - 3,), generator=torch.Generator().manual_seed(1))
    # The same weights, rounded to bfloat16, but nothing else of it.
    exact = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).double()
    expected = exact(token_ids[None]).logits[0]
    of_transformers = (loaded(token_ids[None]).logits[0] - expected).norm()
    ours = (logits_from(Llama(loaded).eval(), token_ids.tolist(), 0) - expected).norm()
    assert 0 < ours < 1.5 * of_transformers < 0.1 * expected.norm()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_of_a_model_lies_where_it_is_to_compute(shape: str, int8: bool, tmp_path: Path) -> None:
    loaded = LlamaForCausalLM.from_pretrained(make_model(tmp_path, shape), dtype=torch.float32)
    model = Llama(loaded, device=torch.device("meta"), dtype=torch.bfloat16, int8=int8)
    for module in model.modules():
        for tensor in chain(module.parameters(), module.buffers(), vars(module).values()):
            if isinstance(tensor, Tensor):
                assert tensor.device.type == "meta"
                assert tensor.dtype in (torch.bfloat16, torch.int8)
