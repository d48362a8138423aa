"""Linear layers for the CPU, their weights packed once into the order in which the processor reads them."""

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP


class PackedLinear(nn.Module):
    """An `nn.Linear` in float32 that is several times faster at the few rows of a decode step.

    `F.linear` hands oneDNN the plain matrix, which it reorders in every call, or multiplies slowly; torch's
    own inductor packs weights when it freezes a model, with these same operators.
    """

    # The row count that the layout is chosen for: good from 2 rows to 256, no worse than others at 1.
    _ROWS = 16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), self._ROWS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]"""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


class PackedMLP(nn.Module):
    """Llama's `down(silu(gate(x)) * up(x))`, of which oneDNN computes silu and product with the matrices."""

    def __init__(self, mlp: LlamaMLP) -> None:
        super().__init__()
        self.gate, self.up, self.down = map(PackedLinear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]"""
        linear = torch.ops.mkldnn._linear_pointwise
        gate = linear(x, self.gate.weight, self.gate.bias, "swish", [], "")
        y: Tensor = self.down(linear.binary(x, gate, self.up.weight, self.up.bias, "mul"))
        return y


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of that type."""
    return (
        dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def pack_linears(module: nn.Module) -> None:
    """Replaces the linear layers below `module` by their packed forms, and drops the plain weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        elif isinstance(child, LlamaMLP) and isinstance(child.act_fn, SiLUActivation):
            setattr(module, name, PackedMLP(child))
        else:
            pack_linears(child)
