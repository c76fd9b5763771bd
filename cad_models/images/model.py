"""Classifiers: the source system's two small CNNs, and any timm model by name or file. All read normalised channels first, RGB and perhaps high-pass."""

import difflib
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from cad_models.common.contrastive import sum_with_gradient, world_size
from cad_models.images.recipe import ImagesModel

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_WIDTHS = (32, 64, 128, 256)


def high_pass(rgb: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Grey minus the mean of its four neighbours, of the mean of RGB in [0, 1]; beyond the rim is black.

    A quarter of the 4-neighbour Laplacian: what upsampling and generators leave behind shows in it (the source system's cue for generated faces).
    """
    grey = rgb.mean(dim=1, keepdim=True)
    padded = F.pad(grey, (1, 1, 1, 1))
    around = padded[:, :, :-2, 1:-1] + padded[:, :, 2:, 1:-1] + padded[:, :, 1:-1, :-2] + padded[:, :, 1:-1, 2:]
    return grey - around / 4


class WorkersBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the whole batch, on however many workers it lies: forward, gradient and running statistics are those of one process.

    torch's ``SyncBatchNorm`` needs a GPU; this works with any backend. Every worker must hold as many pictures as the others.
    """

    def forward(self, input: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """Normalised per channel."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input.float()
        count = x.numel() // x.shape[1] * world_size()
        mean = sum_with_gradient(x.sum(dim=(0, 2, 3))) / count
        centred = x - mean[:, None, None]
        # Two passes: sums of squares would cancel.
        variance = sum_with_gradient(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)


class SimpleCnn(nn.Module):
    """Four times convolution 3 x 3, BatchNorm, ReLU, max-pooling 2; mean over the picture; a hidden layer of 256.

    455,682 parameters for 3 channels and 2 classes (``simple_cnn``), 455,490 for 4 channels without convolution biases (``simple_cnn_v2``).

    Args:
        conv_bias: Whether convolutions have a bias (which BatchNorm makes superfluous).
    """

    def __init__(self, num_channels: int, num_classes: int, *, conv_bias: bool, dropout: float):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((num_channels, *_WIDTHS[:-1]), _WIDTHS, strict=True):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=conv_bias), WorkersBatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(_WIDTHS[-1], _WIDTHS[-1]), nn.ReLU(), nn.Dropout(dropout), nn.Linear(_WIDTHS[-1], num_classes))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.features(x).mean(dim=(2, 3)))


class HogClassifier(nn.Module):
    """Histograms of oriented gradients, as `cad_models.common.encoders.HogEncoder` has them, of augmented pictures, and two layers on them.

    For a few hundred pictures, which teach a convolutional network little: nothing before the two layers is learned. Dalal & Triggs, CVPR 2005.
    """

    num_cells = 8
    num_directions = 16
    _HIDDEN = 256

    def __init__(self, num_channels: int, num_classes: int, *, dropout: float):
        super().__init__()
        # Of normalised channels; the high-pass channel is left to the networks.
        weights = torch.zeros(num_channels)
        weights[:3] = torch.tensor((0.299, 0.587, 0.114)) * torch.tensor(IMAGENET_STD)
        self.register_buffer("grey_weights", weights, persistent=False)
        width = self.num_cells**2 * self.num_directions
        # Dropped features make seeds differ, which learn from the same ones otherwise.
        self.body = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width, self._HIDDEN), nn.LayerNorm(self._HIDDEN), nn.GELU(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(self._HIDDEN, num_classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        with torch.no_grad():
            features = self.describe(torch.einsum("bchw,c->bhw", x.float(), self.grey_weights))
        # Of length 1 each: to a mean square of 1 a feature, as layers are initialised for.
        return self.head(self.body(features * features.shape[1] ** 0.5))

    def describe(self, grey: Float[Tensor, "batch height width"]) -> Float[Tensor, "batch features"]:
        """Unit descriptors: cells row by row, 16 signed directions counter-clockwise from +x in each, square roots; zeros for a blank picture."""
        height, width = grey.shape[1:]
        down, right = torch.zeros_like(grey), torch.zeros_like(grey)
        down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
        right[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
        magnitude = torch.hypot(right, down)
        position = torch.atan2(-down, right) / (2 * torch.pi) * self.num_directions
        # A vote is shared between neighbouring directions (and, below, cells).
        bins = torch.arange(self.num_directions, device=grey.device)[:, None, None, None]
        away = (position - bins).remainder(self.num_directions)
        votes = magnitude * (1 - torch.minimum(away, self.num_directions - away)).clamp(min=0)
        cells = torch.einsum("yh,dbhw,xw->byxd", self._shares(height, grey), votes, self._shares(width, grey)).flatten(1)
        return (cells / cells.sum(dim=1, keepdim=True).clamp(min=1e-12)).sqrt()

    def _shares(self, length: int, like: Tensor) -> Tensor:
        """Of each row (or column) of pixels in each cell: 1 at the cell's centre, 0 at its neighbours' centres."""
        position = (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length * self.num_cells - 0.5
        return (1 - (position - torch.arange(self.num_cells, device=like.device)[:, None]).abs()).clamp(min=0)


def build_classifier(config: ImagesModel, num_classes: int) -> nn.Module:
    """The classifier, freshly initialised (a timm model with a file: with its weights, but for a last layer of another size).

    Raises:
        ValueError: unknown timm model, or a file that does not fit.
    """
    if config.name.startswith("timm:"):
        return _timm(config, num_classes)
    if config.name == "hog":
        return HogClassifier(config.num_channels, num_classes, dropout=config.dropout)
    return SimpleCnn(config.num_channels, num_classes, conv_bias=config.name == "simple_cnn", dropout=config.dropout)


def normalisation_of(config: ImagesModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of RGB in [0, 1] that the model is fed with: ImageNet's, or what timm says of its model."""
    if not config.name.startswith("timm:"):
        return IMAGENET_MEAN, IMAGENET_STD
    import timm

    cfg = timm.get_pretrained_cfg(_timm_parts(config.name)[0])
    return (IMAGENET_MEAN, IMAGENET_STD) if cfg is None else (tuple(cfg.mean), tuple(cfg.std))


def _timm_parts(name: str) -> tuple[str, str]:
    model, _, file = name.removeprefix("timm:").partition("@")
    return model, file


def _timm(config: ImagesModel, num_classes: int) -> nn.Module:
    import timm

    name, file = _timm_parts(config.name)
    architecture = name.partition(".")[0]
    known = timm.list_models()
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=3)
        hint = f": did you mean {', '.join('timm:' + c for c in close)}?" if close else "; timm.list_models() lists them"
        raise ValueError(f"--model.name {config.name}: timm has no model {architecture!r}{hint}")
    try:
        model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=config.num_channels, drop_rate=config.dropout)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"--model.name {config.name}: timm cannot make it with {config.num_channels} channels and {num_classes} classes: {error}") from error
    if file:
        _load(model, Path(file), config)
    return model


def _load(model: nn.Module, path: Path, config: ImagesModel) -> None:
    """Weights of a safetensors file; the first layer's are spread over further channels, a last layer of other classes stays as initialised."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from timm.models import adapt_input_conv

    flag = f"--model.name {config.name}"
    if path.suffix != ".safetensors":
        raise ValueError(f"{flag}: {path} is no .safetensors file; pickled weights (.pth, .pt, .bin) are never read: convert them where you trust them")
    if not path.is_file():
        raise ValueError(f"{flag}: there is no file {path}")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{flag}: {path} cannot be read as safetensors ({error}): fetch it again") from error
    own = model.state_dict()
    named = model.pretrained_cfg
    first, last = (((value,) if isinstance(value, str) else tuple(value or ())) for value in (named.get("first_conv"), named.get("classifier")))
    for layer in first:
        key = f"{layer}.weight"
        if key in state and key in own and state[key].shape[1] == 3 != own[key].shape[1]:
            state[key] = adapt_input_conv(own[key].shape[1], state[key])
    of_classifier = tuple(f"{layer}." for layer in last)
    for key in [k for k in state if k.startswith(of_classifier) and (k not in own or own[k].shape != state[k].shape)]:
        del state[key]
    problems = [f"lacks {key}" for key in own if key not in state and not key.startswith(of_classifier)]
    problems += [f"has the unknown {key}" for key in state if key not in own]
    problems += [
        f"{key} has shape {list(state[key].shape)}, the model's is {list(own[key].shape)}" for key in state if key in own and own[key].shape != state[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{flag}: {path} does not fit: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state, strict=False)


class InputNormaliser(nn.Module):
    """Bytes -> what a classifier reads: [0, 1], the high-pass channel where there is one, mean 0 and deviation 1 per channel.

    The high-pass channel's mean and deviation come from `fit`; until then they are 0 and 1.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], *, with_high_pass: bool):
        super().__init__()
        self.with_high_pass = with_high_pass
        extra = (0.0,) if with_high_pass else ()
        self.register_buffer("mean", torch.tensor((*mean, *extra)))
        self.register_buffer("std", torch.tensor((*std, *(1.0 for _ in extra))))

    def forward(self, pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels height width"]:
        """Float32."""
        rgb = pixels.float().div_(255)
        if self.with_high_pass:
            rgb = torch.cat([rgb, high_pass(rgb)], dim=1)
        return rgb.sub_(self.mean[:, None, None]).div_(self.std[:, None, None])

    @torch.no_grad()
    def fit(self, batches) -> None:
        """Take the high-pass channel's mean and (population) deviation over all pixels of all pictures of ``batches`` (uint8 tensors)."""
        count, mean, squares = 0, 0.0, 0.0
        for pixels in batches:
            values = high_pass(pixels.float() / 255).double()
            size, own = values.numel(), float(values.mean())
            # Chan's update: batches may be many, and the mean is small beside the deviation.
            delta = own - mean
            squares += float((values - own).square().sum()) + delta**2 * count * size / (count + size)
            mean += delta * size / (count + size)
            count += size
        if count == 0:
            raise ValueError("the train split is empty: there is nothing to take the high-pass channel's statistics from")
        self.mean[3] = mean
        self.std[3] = max(1e-6, (squares / count) ** 0.5)
