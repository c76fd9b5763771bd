"""Dataset folders of boxes with random embeddings, written straight to Parquet in seconds; learnable, of any size. And the same as .npz files."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from cad_models.alignment.data import schemas
from cad_models.alignment.recipe import AlignmentRecipe
from cad_models.config import json_digest
from cad_models.dataset import DatasetFolder, EmbeddingsManifest, Manifest, build_table, tensor_field

_SPLITS = ("train", "val", "test")


def write_dataset(
    path: Path, recipe: AlignmentRecipe, *, num_objects: dict[str, int], width: int, noise: float = 0.3, npz: bool = False, objects_per_part: int = 16
) -> DatasetFolder:
    """A finished dataset with embeddings ``hog``: an object is a box, its embeddings are a noisy random map of the box's extents.

    Args:
        num_objects: split -> objects.
        width: of the embeddings.
        noise: of the embeddings, beside a signal of about 1.
        npz: also write ``<path>/npz/<split>/<object>.npz`` with points, normals and embeddings.
    """
    rng = np.random.default_rng(0)
    mapping = rng.normal(size=(9, width)) / 3
    data = recipe.data
    names = ("object_id", "group_id", "split", "label", "source", "sha256")
    wanted = {field.name: field for field in schemas(recipe)["objects"]}
    objects = pa.schema([*[(name, pa.string()) for name in names], wanted["points"], wanted["normals"]])
    embeddings = pa.schema(
        [
            ("object_id", pa.string()),
            tensor_field("embeddings", "float16", (-1, width)),
            ("num_views", pa.int64()),
            tensor_field("query_embeddings", "float16", (-1, width)),
            ("num_query_views", pa.int64()),
        ]
    )
    folder = DatasetFolder(str(path))
    parts, embedded = [], []
    for split in _SPLITS:
        for start in range(0, num_objects.get(split, 0), objects_per_part):
            rows = []
            for i in range(start, min(start + objects_per_part, num_objects[split])):
                object_id = f"{split}-{i:06d}"
                points, normals, factors = _box(rng, data.num_points)
                signal = factors @ mapping
                views, queries = (
                    (signal + noise * rng.normal(size=(count, width))).astype(np.float16) for count in (data.num_views, data.num_query_views)
                )
                rows.append(
                    {
                        "object_id": object_id, "group_id": object_id, "split": split, "label": "box", "source": f"{object_id}.stl",
                        "sha256": json_digest(object_id, length=64), "points": points, "normals": normals, "embeddings": views,
                        "query_embeddings": queries, "num_views": len(views), "num_query_views": len(queries),
                    }  # fmt: skip
                )
                if npz:
                    target = path / "npz" / split / f"{object_id}.npz"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    np.savez(target, points=points, normals=normals, embeddings=views)
            info = folder.write_part("objects", len(parts), build_table(objects, rows), key="generated")
            parts.append({"key": "generated", "num_rows": len(rows), "splits": {split: len(rows)}, "objects": info.sha256, "views": ""})
            info = folder.write_part("embeddings/hog", len(embedded), build_table(embeddings, rows), key="generated")
            embedded.append({"num_rows": len(rows), "sha256": info.sha256, "max_views": data.num_views})
    total = sum(num_objects.values())
    settings = {"num_points": data.num_points}
    manifest = Manifest(
        task="alignment", settings=settings, settings_digest=json_digest(settings), parts=parts, num_objects=total, num_groups=total, num_quarantined=0,
        num_ignored=0, splits={split: num_objects.get(split, 0) for split in _SPLITS},
    )  # fmt: skip
    folder.write_manifest(manifest)
    described = EmbeddingsManifest(encoder="hog", encoder_digest="generated", width=width, dataset_digest=manifest.digest, parts=embedded)
    folder.folder.write_json("embeddings/hog/manifest.json", described.__dict__)
    return folder


def _box(rng: np.random.Generator, num_points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    extents = rng.uniform(0.2, 1.0, 3)
    points = rng.uniform(-1, 1, (num_points, 3))
    side, row = rng.integers(0, 3, num_points), np.arange(num_points)
    normals = np.zeros((num_points, 3))
    points[row, side] = normals[row, side] = np.sign(points[row, side])
    return points * extents / np.linalg.norm(extents), normals, np.concatenate([extents, extents**2, np.log(extents)])
