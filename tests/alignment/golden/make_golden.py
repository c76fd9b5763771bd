"""Writes the stored stages of the fixed-mode encoder: ``python -m tests.alignment.golden.make_golden``.

To be run again only when the architecture changes on purpose: trained checkpoints no longer fit then.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from cad_models.alignment.model import PointEncoder, PointEncoderConfig

GOLDEN = Path(__file__).with_name("fixed_encoder.safetensors")


def golden_encoder() -> PointEncoder:
    """A small encoder whose weights are sines of their position, the same on every machine and in every version of torch."""
    config = PointEncoderConfig(
        width=24, depth=2, num_heads=2, num_groups=8, group_size=6, patch_widths=(8, 16), embed_dim=20, centers="fps"
    )
    encoder = PointEncoder(config).eval()
    with torch.no_grad():
        for index, parameter in enumerate(encoder.parameters()):
            wave = torch.sin(1.7 * torch.arange(parameter.numel(), dtype=torch.float64) + index)
            # Norms keep their 1 and 0.
            parameter.copy_(0.1 * wave.view_as(parameter) + (parameter if parameter.dim() == 1 else 0))
    return encoder


def golden_points() -> torch.Tensor:
    """Two clouds of 40 points with normals."""
    count = torch.arange(2 * 40 * 6, dtype=torch.float64)
    return torch.sin(count * count * 0.37 + 0.5).view(2, 40, 6).float()


if __name__ == "__main__":
    with torch.no_grad():
        features = golden_encoder().encode(golden_points())
    stages = ("centers", "tokens", "queries", "embedding")
    save_file({stage: getattr(features, stage).contiguous() for stage in stages}, GOLDEN)
