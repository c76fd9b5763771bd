"""From histograms to unit vectors: multi-layer perceptrons, several side by side."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from cad_models.histograms.recipe import HistogramModel

_ACTIVATIONS = {"none": nn.Identity, "relu": nn.ReLU, "gelu": nn.GELU}


class ParallelLinear(nn.Module):
    """Linear layers side by side, one a network, initialised as `torch.nn.Linear` is."""

    def __init__(self, num_networks: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(num_networks, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_networks, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "networks batch in_dim"]) -> Float[Tensor, "networks batch out_dim"]:
        return torch.baddbmm(self.bias, x, self.weight)


class Perceptrons(nn.Module):
    """``num_networks`` perceptrons: standardise, hidden layers, a linear layer, and every row to norm 1.

    With four hidden layers of 32 units, 16 outputs, no activation and no residuals this is the source system's network (7,824 parameters for 128 inputs), but
    for the norm: it divided a batch by the norm of the whole matrix, so that its rows were no unit vectors.
    """

    def __init__(self, in_dim: int, config: HistogramModel):
        super().__init__()
        self.config = config
        in_dims = [in_dim] + [config.width] * (config.depth - 1)
        self.layers = nn.ModuleList(ParallelLinear(config.num_networks, width, config.width) for width in in_dims)
        self.head = ParallelLinear(config.num_networks, config.width, config.embed_dim)
        self.activation = _ACTIVATIONS[config.activation]()
        self.register_buffer("input_mean", torch.zeros(in_dim))
        self.register_buffer("input_std", torch.ones(in_dim))

    def forward(self, features: Float[Tensor, "networks batch in_dim"]) -> Float[Tensor, "networks batch embed_dim"]:
        """Unit rows; each network may be given other rows (as when each mixes objects in its own way)."""
        config = self.config
        x = functional.dropout((features - self.input_mean) / self.input_std, config.input_dropout, self.training)
        for number, layer in enumerate(self.layers):
            y = functional.dropout(self.activation(layer(x)), config.dropout, self.training)
            x = x + y if config.residual and number > 0 else y
        return functional.normalize(self.head(x), dim=-1)
