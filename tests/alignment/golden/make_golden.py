"""Writes the stored stages of small encoders: ``python -m tests.alignment.golden.make_golden``.

To be run again only when the architecture changes on purpose: trained (or released) checkpoints no longer fit then.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from cad_models.alignment.model import PointEncoder, PointEncoderConfig

GOLDEN = Path(__file__).with_name("encoders.safetensors")
STAGES = ("groups", "centers", "tokens", "local", "queries", "image_tokens", "text_tokens", "embedding")

_SMALL = {"width": 24, "depth": 2, "num_heads": 2, "num_groups": 8, "group_size": 6, "patch_widths": (8, 16), "embed_dim": 20, "centers": "fps"}
VARIANTS = {
    "fixed": PointEncoderConfig(**_SMALL),
    "fixed_prefix_xyz": PointEncoderConfig(**{**_SMALL, "centers": "prefix", "channels": "xyz", "num_text_queries": 0}),
    "reconv2_rand_color": PointEncoderConfig(**_SMALL, mode="reconv2", channels="xyz+color"),
    # A width that is no multiple of 6 pads the sine positions; an MLP of its own width as in the giant one; three patch widths as in base and large.
    "reconv2_causal": PointEncoderConfig(
        **{**_SMALL, "width": 28, "patch_widths": (8, 12, 16)}, mode="reconv2", channels="xyz", causal=True, stop_gradient=True, mlp_width=90
    ),
    "reconv2_layer_scale": PointEncoderConfig(**_SMALL, mode="reconv2", channels="xyz", layer_scale=1e-5, num_image_queries=8),
}


def golden_encoder(name: str) -> PointEncoder:
    """A small encoder whose weights are sines of their position squared, the same on every machine and in every version of torch."""
    encoder = PointEncoder(VARIANTS[name]).eval()
    with torch.no_grad():
        for index, (key, tensor) in enumerate(encoder.state_dict().items()):
            if not tensor.is_floating_point():
                continue
            count = torch.arange(tensor.numel(), dtype=torch.float64)
            wave = torch.sin(count * count * 0.37 + index).view_as(tensor)
            scale = 0.1 if key.endswith(("running_mean", "running_var", "gamma")) or tensor.dim() == 1 else 0.3
            # Norms keep about their 1 and 0; LayerScale becomes large enough to matter; variances stay positive.
            base = 0.5 if key.endswith("gamma") else tensor if tensor.dim() == 1 else 0
            tensor.copy_(scale * wave + base)
    return encoder


def golden_points(name: str) -> torch.Tensor:
    """Two clouds of 40 points, as many columns as the encoder reads."""
    columns = VARIANTS[name].num_channels
    count = torch.arange(2 * 40 * columns, dtype=torch.float64)
    return torch.sin(count * count * 0.37 + 0.5).view(2, 40, columns).float()


if __name__ == "__main__":
    with torch.no_grad():
        features = {name: golden_encoder(name).encode(golden_points(name)) for name in VARIANTS}
    save_file({f"{name}/{stage}": getattr(found, stage).contiguous().clone() for name, found in features.items() for stage in STAGES}, GOLDEN)
