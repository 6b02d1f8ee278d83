"""Modules of other packages, written out so that the tests need not install them."""

import torch
from torch import nn


class Conv1D(nn.Module):
    """Transformers' linear layer of GPT-2, whose weight is (inputs, outputs)."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.5)

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class FullyShardedDataParallel(nn.Module):
    """FSDP's wrapper, by its name."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


class DTensor(nn.Parameter):
    """A parameter of which a process has a part, by its name."""
