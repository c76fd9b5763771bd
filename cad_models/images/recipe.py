"""The recipe of the images task: what fixes its numbers. Imports no torch, so that ``--help`` is quick."""

from dataclasses import dataclass, fields
from typing import Literal

from cad_models.config import OptimConfig, Recipe, ScheduleConfig, check

MODEL_NAMES = ("simple_cnn", "simple_cnn_v2", "hog")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training-time changes of a picture. The presets are those of the source system; ``custom`` reads the other fields."""

    preset: Literal["none", "baseline", "ensemble_1", "ensemble_2", "custom"] = "ensemble_2"
    """none; baseline = crop 0.9-1, flip, rotation 15; ensemble_1 = flip, rotation 15; ensemble_2 = crop 0.8-1, flip, rotation 15, colours 0.2, sharpness; custom."""
    min_crop_area: float = 1.0
    """Smallest share of the picture that a random crop keeps (aspect 3/4 to 4/3); 1 = no crop."""
    flip_probability: float = 0.0
    """Of mirroring left and right."""
    max_rotation_deg: float = 0.0
    """Rotation about the centre, drawn from ± this; corners become black."""
    brightness: float = 0.0
    """Factor drawn from 1 ± this."""
    contrast: float = 0.0
    """Factor drawn from 1 ± this."""
    saturation: float = 0.0
    """Factor drawn from 1 ± this."""
    sharpness: float = 1.0
    """Factor of sharpening (0 = smoothed, 1 = unchanged)."""
    sharpness_probability: float = 0.0
    """Of applying the factor of sharpening."""
    max_salt_pepper: float = 0.0
    """Share of pixels made black or white, drawn from 0 to this; on top of any preset."""

    def __post_init__(self) -> None:
        path = "data.augment."
        check(0 < self.min_crop_area <= 1, path + "min_crop_area", self.min_crop_area, "above 0 and at most 1")
        check(0 <= self.max_rotation_deg <= 180, path + "max_rotation_deg", self.max_rotation_deg, "in [0, 180]")
        check(self.sharpness >= 0, path + "sharpness", self.sharpness, "at least 0")
        for name in ("flip_probability", "sharpness_probability", "max_salt_pepper", "brightness", "contrast", "saturation"):
            check(0 <= getattr(self, name) <= 1, path + name, getattr(self, name), "in [0, 1]")
        if self.preset != "custom":
            for field in fields(self):
                given = getattr(self, field.name)
                own = field.name in ("preset", "max_salt_pepper")
                check(own or given == field.default, path + field.name, given, f"left out unless --data.augment.preset is custom (now {self.preset})")

    def resolved(self) -> "AugmentConfig":
        """The preset's values, field by field."""
        values = _PRESETS.get(self.preset)
        return self if values is None else AugmentConfig(preset="custom", max_salt_pepper=self.max_salt_pepper, **values)


_PRESETS: dict[str, dict[str, float]] = {
    "none": {},
    "baseline": {"min_crop_area": 0.9, "flip_probability": 0.5, "max_rotation_deg": 15.0},
    "ensemble_1": {"flip_probability": 0.5, "max_rotation_deg": 15.0},
    "ensemble_2": {
        "min_crop_area": 0.8,
        "flip_probability": 0.5,
        "max_rotation_deg": 15.0,
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0.2,
        "sharpness": 2.0,
        "sharpness_probability": 0.3,
    },
}


@dataclass(frozen=True, kw_only=True)
class ImagesData:
    """What is made of the raw pictures, and what training reads of them."""

    stored_size: int = 160
    """Width and height, in pixels, of the decoded pictures in the dataset (squeezed to squares; crops keep the original aspect)."""
    image_size: int = 128
    """Width and height, in pixels, of what the model sees; at most the dataset's stored size."""
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        check(16 <= self.stored_size <= 1024, "data.stored_size", self.stored_size, "in 16 … 1024 pixels")
        check(16 <= self.image_size <= 1024, "data.image_size", self.image_size, "in 16 … 1024 pixels")


@dataclass(frozen=True, kw_only=True)
class ImagesModel:
    """The classifier. Classes and image size follow the data."""

    name: str = "simple_cnn_v2"
    """simple_cnn, simple_cnn_v2 (with the high-pass channel), hog (for a few hundred pictures), or timm:<model>[@file.safetensors], as timm:resnet18."""
    high_pass: bool = False
    """Add the high-pass channel to another model than simple_cnn_v2, which always has it."""
    dropout: float = 0.3
    """Before the last layer."""

    def __post_init__(self) -> None:
        known = self.name in MODEL_NAMES or (self.name.startswith("timm:") and len(self.name) > len("timm:"))
        check(known, "model.name", self.name, f"{', '.join(MODEL_NAMES)} or timm:<model>[@file.safetensors]")
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")

    @property
    def num_channels(self) -> int:
        """3, or 4 with the high-pass channel."""
        return 4 if self.high_pass or self.name == "simple_cnn_v2" else 3


@dataclass(frozen=True, kw_only=True)
class ImagesLoss:
    """Cross-entropy."""

    class_weights: Literal["none", "balanced"] = "none"
    """balanced = each class weighs the same, however many pictures it has in the train split."""
    label_smoothing: float = 0.0
    """Share of each target spread evenly over all classes."""

    def __post_init__(self) -> None:
        check(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ImagesRecipe(Recipe):
    """Everything that fixes the numbers of an image classifier."""

    data: ImagesData = ImagesData()
    model: ImagesModel = ImagesModel()
    loss: ImagesLoss = ImagesLoss()


RECIPE = ImagesRecipe(
    batch_size=32,
    optim=OptimConfig(lr=2e-3, head_lr=2e-3, weight_decay=0.01, grad_clip_norm=5.0, ema_decay=0.99),
    schedule=ScheduleConfig(num_epochs=30, num_warmup_epochs=1.0),
)
"""Defaults for a few thousand pictures. The room's README gives its figures with the flags that each was measured with."""

SMOKE = ImagesRecipe(
    batch_size=8,
    optim=OptimConfig(lr=2e-3, head_lr=2e-3, weight_decay=0.01, ema_decay=0.9),
    schedule=ScheduleConfig(num_epochs=2, num_warmup_epochs=0.5),
    data=ImagesData(stored_size=48, image_size=40),
)
"""The same code in seconds."""
