"""Cameras around an object: where views are rendered from.

Convention: the object stands upright with +z up. Azimuth 0 looks at the object's +x side (the camera sits on the +x
axis), azimuth 90 at its +y side; elevation 90 looks straight down. Roll turns the camera counter-clockwise about its
viewing axis.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
from jaxtyping import Float

_GOLDEN_ANGLE_DEG = 180.0 * (3.0 - math.sqrt(5.0))
_QUERY_STREAM = 0x51554552  # keeps query cameras independent of every other use of the same object seed
_MAX_DRAWS_PER_VIEW = 10_000


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A camera that looks at the centre of the object's bounding sphere, from where the sphere just fits the frame.

    Raises ``ValueError`` for values out of range.
    """

    azimuth_deg: float
    """Direction of the camera around +z, counter-clockwise from +x."""
    elevation_deg: float
    """Direction of the camera above the xy plane, -90 to 90."""
    roll_deg: float = 0.0
    """Turn about the viewing axis; 0 = upright."""
    fov_deg: float = 30.0
    """Full angle of view, 0 to 120; 0 = orthographic."""
    margin: float = 0.04
    """Share of the half frame left free around the bounding sphere, 0 to 0.9."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value):
                raise ValueError(f"camera {field.name} is {value!r}: give a finite number")
        for name, low, high in (("elevation_deg", -90.0, 90.0), ("fov_deg", 0.0, 120.0), ("margin", 0.0, 0.9)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"camera {name} is {getattr(self, name)!r}: give a value from {low} to {high}")

    def axes(self) -> Float[np.ndarray, "3 3"]:
        """Rows: right, up, and the unit vector from the object to the camera, in object coordinates (float64)."""
        azimuth, elevation, roll = (math.radians(a) for a in (self.azimuth_deg, self.elevation_deg, self.roll_deg))
        sin_a, cos_a, sin_e, cos_e = math.sin(azimuth), math.cos(azimuth), math.sin(elevation), math.cos(elevation)
        right = np.array([-sin_a, cos_a, 0.0])
        up = np.array([-sin_e * cos_a, -sin_e * sin_a, cos_e])  # defined at the poles too
        toward = np.array([cos_e * cos_a, cos_e * sin_a, sin_e])
        sin_r, cos_r = math.sin(roll), math.cos(roll)
        axes = np.stack([cos_r * right + sin_r * up, cos_r * up - sin_r * right, toward])
        # libm differs in the last bit between platforms; rounding makes the pictures the same bytes everywhere.
        return np.round(axes, 12)

    def direction(self) -> Float[np.ndarray, "3"]:
        """Unit vector from the object to the camera (float64)."""
        return self.axes()[2]

    def to_dict(self) -> dict[str, float]:
        """Plain numbers, for JSON and Parquet; ``Camera.from_dict`` gives the same camera back."""
        return {name: float(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, float]) -> "Camera":
        """The camera written by ``to_dict``; raises ``ValueError`` for unknown or missing names."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted({"azimuth_deg", "elevation_deg"} - set(values))
        if unknown or missing:
            raise ValueError(f"camera has unknown names {unknown} and lacks {missing}: names are {sorted(known)}")
        return cls(**values)


def angle_between_deg(first: Camera, second: Camera) -> float:
    """Angle between the viewing directions of two cameras, 0 to 180 degrees; roll does not count."""
    a, b = first.direction(), second.direction()
    return math.degrees(math.atan2(float(np.linalg.norm(np.cross(a, b))), float(a @ b)))


def ring_cameras(num_views: int = 24) -> list[Camera]:
    """Upright cameras spread evenly over the sphere on rings of rising elevation: the training and gallery views.

    The spherical Fibonacci lattice (González, Math. Geosciences 42, 2010): equal areas for any number of views.
    With 24 views every direction is within 32 degrees of a camera, and cameras are at least 36 degrees apart.
    """
    if num_views < 1:
        raise ValueError(f"num_views is {num_views}: give at least 1")
    return [
        Camera(
            azimuth_deg=round((i * _GOLDEN_ANGLE_DEG) % 360.0, 6),
            elevation_deg=round(math.degrees(math.asin((2 * i + 1) / num_views - 1.0)), 6),
        )
        for i in range(num_views)
    ]


def query_cameras(
    num_views: int,
    seed: int,
    *,
    max_roll_deg: float = 0.0,
    apart_from: Sequence[Camera] | None = None,
    min_angle_deg: float = 10.0,
) -> list[Camera]:
    """Random cameras, uniform over the sphere, none nearer than ``min_angle_deg`` to a gallery camera: the query views.

    Args:
        seed: of the object, not negative; the same seed gives the same cameras.
        max_roll_deg: roll is uniform in ``[-max_roll_deg, max_roll_deg]``; 0 = upright, 180 = any roll.
        apart_from: the gallery cameras; by default ``ring_cameras()``.

    Raises:
        ValueError: no direction is that far from every gallery camera.
    """
    if num_views < 0 or seed < 0:
        raise ValueError(f"num_views is {num_views} and seed is {seed}: neither may be negative")
    gallery = ring_cameras() if apart_from is None else apart_from
    directions = np.stack([camera.direction() for camera in gallery]) if gallery else np.zeros((0, 3))
    max_cosine = math.cos(math.radians(min_angle_deg))
    rng = np.random.default_rng([_QUERY_STREAM, seed])
    cameras: list[Camera] = []
    for _ in range(num_views * _MAX_DRAWS_PER_VIEW):
        if len(cameras) == num_views:
            break
        camera = Camera(
            azimuth_deg=round(float(rng.uniform(0.0, 360.0)), 6),
            elevation_deg=round(math.degrees(math.asin(float(rng.uniform(-1.0, 1.0)))), 6),
            roll_deg=round(float(rng.uniform(-max_roll_deg, max_roll_deg)), 6),
        )
        if np.all(directions @ camera.direction() < max_cosine):
            cameras.append(camera)
    if len(cameras) < num_views:
        raise ValueError(
            f"no room for {num_views} query cameras at least {min_angle_deg} degrees from {len(gallery)} gallery "
            f"cameras: lower min_angle_deg"
        )
    return cameras
