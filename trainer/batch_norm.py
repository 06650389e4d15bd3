"""Batch normalisation over the global batch: what one rank would compute if it had the images of all ranks.

PyTorch's `SyncBatchNorm` does it on GPUs only; here the same mathematics also runs over gloo on CPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.distributed import gather, mean_over_ranks, world_size


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose batch is that of all ranks, each with equally many images. Same parameters and buffers."""

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(features)
        # Statistics of bfloat16 features need more than its eight bits.
        wide = features if features.dtype == torch.float64 else features.float()
        variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        # One collective: the variance of everything is the mean of the variances plus the variance of the means.
        means, variances = gather(torch.stack((mean, variance))).unbind(1)
        mean, variance = means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)
        if self.track_running_stats:
            self._learn(mean.detach(), variance.detach(), features.numel() // features.shape[1] * world_size())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalised = wide * scale.view(1, -1, 1, 1) + (self.bias - mean * scale).view(1, -1, 1, 1)
        return normalised.to(features.dtype)

    @torch.no_grad()
    def _learn(self, mean: Tensor, variance: Tensor, count: int) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)


def synchronise(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` with every batch normalisation made global; parameters and buffers are taken over."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            replacement = GlobalBatchNorm2d(child.num_features, child.eps, child.momentum)
            replacement.load_state_dict(child.state_dict())
            setattr(module, name, replacement.to(child.weight.device))
        else:
            synchronise(child, device)
    return module


def agree_on_statistics(module: nn.Module) -> None:
    """Give every rank the mean over ranks of the running statistics, which differ where each learned its own."""
    if world_size() > 1:
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(mean_over_ranks(buffer))
