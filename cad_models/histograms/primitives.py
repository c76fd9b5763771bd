"""Generated shapes: primitives under random rotation, translation and non-uniform scale, after the source system's Blender script.

Object *i* of a seed is always the same, whoever makes it and in whatever order. Classes come in turn, so that they are equally frequent.

    python -m cad_models.histograms.primitives --count 320 --out shapes/       # <class>/<id>.stl, and classes.tsv
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

SOURCE_CLASSES = ("Cone", "Cube", "Cylinder", "Sphere", "Torus")
"""The source system's."""
CLASSES = (*SOURCE_CLASSES, "Capsule", "Pyramid", "Tube")

MAX_SCALE = 10.0
"""Each axis is scaled by a factor from 1 to this."""
MAX_SHIFT = 10.0
"""Each coordinate of the position is drawn from ± this."""


@dataclass(frozen=True)
class Shape:
    """One generated shape.

    Attributes:
        label: one of `CLASSES`.
        vertices: float64 [V, 3]; float32 values, so that an STL file holds the very same shape.
        faces: int64 [F, 3], outward.
    """

    label: str
    vertices: np.ndarray
    faces: np.ndarray


def generate_shape(index: int, seed: int, classes: tuple[str, ...] = SOURCE_CLASSES) -> Shape:
    """Shape ``index`` of a seed; its class is ``classes[index % len(classes)]``.

    What an affine map cannot change is drawn, too: how finely surfaces are cut into faces (flat ones as well: a model that has only ever seen cubes of
    the same twelve triangles does not know a finer one), and how thick a torus or a tube is.
    """
    label = classes[index % len(classes)]
    rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
    vertices, faces = _primitive(label, rng)
    scale = rng.uniform(1.0, MAX_SCALE, 3)
    vertices = (vertices * scale) @ random_rotation(rng).T + rng.uniform(-MAX_SHIFT, MAX_SHIFT, 3)
    return Shape(label, vertices.astype(np.float32).astype(np.float64), faces)


def random_rotation(rng: np.random.Generator) -> Float[np.ndarray, "3 3"]:
    """A rotation, uniform over all (a unit quaternion, uniform on its sphere)."""
    w, x, y, z = (q := rng.standard_normal(4)) / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _primitive(label: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A primitive of about unit size, as Blender's "Add > Mesh" makes it."""
    segments = int(rng.integers(24, 65))
    angular = {
        "Cube": ([(0, -1), (np.sqrt(2), -1), (np.sqrt(2), 1), (0, 1)], 4),
        "Pyramid": ([(0, -1), (np.sqrt(2), -1), (0, 1)], 4),
        "Cylinder": ([(0, -1), (1, -1), (1, 1), (0, 1)], segments),
        "Cone": ([(0, -1), (1, -1), (0, 1)], segments),
    }
    if label in angular:
        profile, count = angular[label]
        return _revolved(_subdivided(profile, int(rng.integers(1, 9))), count)
    if label == "Sphere":
        angle = np.linspace(-np.pi / 2, np.pi / 2, int(rng.integers(12, 33)) + 1)
        return _revolved(np.stack([np.cos(angle), np.sin(angle)], axis=1), segments)
    if label == "Capsule":
        angle = np.linspace(0, np.pi / 2, 9)
        cap, half_length = np.stack([np.cos(angle), np.sin(angle)], axis=1), rng.uniform(0.75, 1.5)
        return _revolved(np.concatenate([cap[::-1] * (1, -1) - (0, half_length), cap + (0, half_length)]), segments)
    thickness = rng.uniform(0.15, 0.4)
    if label == "Torus":
        angle = np.linspace(0, 2 * np.pi, int(rng.integers(12, 25)), endpoint=False)
        return _revolved(np.stack([1 + thickness * np.cos(angle), thickness * np.sin(angle)], axis=1), segments, closed=True)
    if label == "Tube":
        return _revolved([(1 - thickness, -1), (1, -1), (1, 1), (1 - thickness, 1)], segments, closed=True)
    raise ValueError(f"there is no shape class {label!r}; there are {', '.join(CLASSES)}")


def _subdivided(profile, parts: int) -> Float[np.ndarray, "n 2"]:
    """The profile with each of its lines cut into equal parts."""
    corners = np.asarray(profile, dtype=np.float64)
    places = np.arange((len(corners) - 1) * parts + 1) / parts
    return np.stack([np.interp(places, np.arange(len(corners)), corners[:, axis]) for axis in (0, 1)], axis=1)


def _revolved(profile, segments: int, *, closed: bool = False) -> tuple[Float[np.ndarray, "v 3"], Int[np.ndarray, "f 3"]]:
    """The surface that a profile of points (radius, height), counter-clockwise seen with the axis on its left, sweeps around the z axis.

    Args:
        closed: whether the profile's end joins its beginning; an open one begins and ends on the axis.
    """
    profile = np.asarray(profile, dtype=np.float64)
    angle = 2 * np.pi * (np.arange(segments) + 0.5) / segments  # a half: with four segments the sides face along x and y
    rings = np.stack(
        [profile[:, :1] * np.cos(angle), profile[:, :1] * np.sin(angle), np.repeat(profile[:, 1:], segments, axis=1)], axis=2
    )
    number = np.arange(len(profile) * segments).reshape(len(profile), segments)
    low = number if closed else number[:-1]
    high = np.roll(number, -1, axis=0) if closed else number[1:]
    a, b, c, d = (ring.ravel() for ring in (low, np.roll(low, -1, axis=1), np.roll(high, -1, axis=1), high))
    faces = np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)])
    if not closed:  # a pole is one point: it takes one number, and half of its ring's triangles have no area
        for pole in (0, len(profile) - 1):
            faces[np.isin(faces, number[pole])] = number[pole, 0]
        distinct = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
        faces = faces[distinct]
    used, faces = np.unique(faces, return_inverse=True)
    return rings.reshape(-1, 3)[used], faces.reshape(-1, 3).astype(np.int64)


def write_shapes(out: Path, count: int, seed: int, classes: tuple[str, ...] = SOURCE_CLASSES) -> None:
    """Write ``<out>/<class>/<id>.stl`` and ``<out>/classes.tsv`` (id, object name), as the source system's generator did."""
    from cad_models.common.stl_writer import binary_stl

    lines = []
    for index in range(count):
        shape = generate_shape(index, seed, classes)
        object_id = f"shape-{index:06d}"
        (out / shape.label).mkdir(parents=True, exist_ok=True)
        (out / shape.label / f"{object_id}.stl").write_bytes(binary_stl(shape.vertices, shape.faces))
        lines.append(f"{object_id}\t{shape.label}\n")
    (out / "classes.tsv").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all-classes", action="store_true", help=f"also {', '.join(CLASSES[len(SOURCE_CLASSES) :])}")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error(f"--count {arguments.count}: it must be at least 1")
    write_shapes(arguments.out, arguments.count, arguments.seed, CLASSES if arguments.all_classes else SOURCE_CLASSES)
    print(f"{arguments.count:,} shapes in {arguments.out}")


if __name__ == "__main__":
    main()
