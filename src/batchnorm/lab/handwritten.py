"""The tutorial's hand-written batch norm layer, an object of study: its faults are kept, and named."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HandwrittenBatchNorm(nn.Module):
    """Batch norm as the tutorial writes it, correct in its output and wrong in the rest.

    - The running statistics are assigned inside the autograd graph. Every forward links them to all the
      earlier ones, so the graph grows without end; a forward that no backward follows (a test loop in
      training mode) also keeps all activations of its batch. This is the out-of-memory that the author
      could not explain. `Tensor.detach()` would cure it.
    - They are plain attributes, not buffers: absent from the state_dict, left behind by `.to()`.
    - The running variance starts at 0, so eval mode before the first batch divides by `sqrt(eps)`.
    - After a convolution, the shift `beta` starts at 1 instead of 0.
    - `momentum = 0.9` weighs the new batch, the reverse of the tutorial's own moving-average example:
      the statistics are those of the last batch or two.
    - The running variance is the biased one, as Keras's and unlike torch's.

    Args:
        num_features: channels C.
        after_convolution: whether inputs are (N, C, H, W) rather than (N, C).
    """

    def __init__(self, num_features: int, *, after_convolution: bool) -> None:
        super().__init__()
        shape = (1, num_features, 1, 1) if after_convolution else (1, num_features)
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.ones(shape) if after_convolution else torch.zeros(shape))
        self.running_mean = torch.zeros(shape)
        self.running_var = torch.zeros(shape)
        self.eps = 1e-5
        self.momentum = 0.9

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the batch in training, by the running statistics in eval mode."""
        if self.running_mean.device != x.device:
            self.running_mean = self.running_mean.to(x.device)
            self.running_var = self.running_var.to(x.device)
        if self.training:
            dims = [dim for dim in range(x.ndim) if dim != 1]
            mean = x.mean(dims, keepdim=True)
            var = ((x - mean) ** 2).mean(dims, keepdim=True)
            self.running_mean = self.momentum * mean + (1 - self.momentum) * self.running_mean
            self.running_var = self.momentum * var + (1 - self.momentum) * self.running_var
        else:
            mean, var = self.running_mean, self.running_var
        return self.gamma * ((x - mean) / torch.sqrt(var + self.eps)) + self.beta

    def extra_repr(self) -> str:
        """Channels, eps and momentum."""
        return f"{self.gamma.shape[1]}, eps={self.eps}, momentum={self.momentum}"
