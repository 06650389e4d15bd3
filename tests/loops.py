"""The GradMix operations as loops written from the paper, one image and one pixel at a time: their bodies are tested
and timed against them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def naive_gradmix(images, partner, centers, gamma):
    n, _, height, width = images.shape
    mixed = images.clone()
    for i in range(n):
        side = float(gamma[i])
        ph, pw = max(1, math.floor(side * height + 0.5)), max(1, math.floor(side * width + 0.5))
        # One axis at a time: PyTorch 2.11 repeats the first row where both shrink and the width becomes 1.
        tall = F.interpolate(images[partner[i]][None].float(), (ph, width), mode="bilinear", antialias=True)
        patch = F.interpolate(tall, (ph, pw), mode="bilinear", antialias=True)[0]
        for cy, cx in centers[i].tolist():
            top = min(max(math.floor(cy * height - ph / 2 + 0.5), 0), height - ph)
            left = min(max(math.floor(cx * width - pw / 2 + 0.5), 0), width - pw)
            mixed[i, :, top : top + ph, left : left + pw] = patch.to(images.dtype)
    return mixed


def naive_map(maps, gradients, kind, sign):
    n, channels, height, width = maps.shape
    result = torch.zeros(n, height, width)
    for i in range(n):
        for y in range(height):
            for x in range(width):
                total = 0.0
                for k in range(channels):
                    gradient = sign * gradients[i, k]
                    weight = max(gradient[y, x].item(), 0.0) if kind == "layercam" else gradient.mean().item()
                    total += weight * maps[i, k, y, x].item()
                result[i, y, x] = max(total, 0.0)
    return result
