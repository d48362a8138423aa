"""The forward pass, in the types and on the devices that it is asked for."""

from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from engine.attention import AttentionBatch, Span, causal_mask
from engine.llama import Llama
from engine.sequence import BLOCK_SIZE
from tests.models import SHAPES, make_model

CPU = torch.device("cpu")
NUM_TOKENS = 5 * BLOCK_SIZE - 3


def logits_of_a_prompt(model: Llama, token_ids: Tensor) -> Tensor:
    config = model.config
    shape = (5, BLOCK_SIZE, 2, config.num_key_value_heads, config.head_dim)
    caches = [torch.zeros(shape, dtype=model.dtype) for _ in range(config.num_hidden_layers)]
    places = torch.arange(NUM_TOKENS)
    mask = causal_mask(NUM_TOKENS, NUM_TOKENS, CPU)
    span = Span(slice(0, NUM_TOKENS), torch.arange(5), NUM_TOKENS, mask)
    logits: Tensor = model(token_ids, places, AttentionBatch(caches, places, [], [span]))
    return logits


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_bfloat16_is_off_by_no_more_than_in_transformers(shape: str, tmp_path: Path) -> None:
    path = make_model(tmp_path, shape)
    loaded = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    token_ids = torch.randint(256, (NUM_TOKENS,), generator=torch.Generator().manual_seed(1))
    # The same weights, rounded to bfloat16, but nothing else of it.
    exact = LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16).double()
    expected = exact(token_ids[None]).logits[0]
    of_transformers = (loaded(token_ids[None]).logits[0] - expected).norm()
    ours = (logits_of_a_prompt(Llama(loaded).eval(), token_ids) - expected).norm()
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
