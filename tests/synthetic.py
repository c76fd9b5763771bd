"""Tiny datasets made of random latent factors, written straight into a dataset folder: learnable, in milliseconds, without meshes or encoders."""

import json

import numpy as np
import pyarrow as pa

from cad_models.alignment.recipe import SMOKE, AlignmentRecipe
from cad_models.config import json_digest
from cad_models.dataset import DatasetFolder, EmbeddingsManifest, Manifest, build_table, tensor_field

WIDTH = 48
"""Width of the synthetic image embeddings."""

_SPLITS = ("train", "train", "train", "val", "test")


def make_dataset(
    path: str, num_objects: int = 40, *, recipe: AlignmentRecipe = SMOKE, objects_per_part: int = 8, encoder: str = "hog", seed: int = 0
) -> DatasetFolder:
    """Write a finished dataset with embeddings: an object is a box of random extents, its image embeddings a noisy random map of the extents.

    Every part holds one split only, as prepare.py makes them. The numbers of views differ from object to object.
    """
    rng = np.random.default_rng(seed)
    mapping = rng.normal(size=(9, WIDTH))
    num_points = recipe.data.num_points
    rows = []
    for i in range(num_objects):
        extents = rng.uniform(0.2, 1.0, 3)
        points = rng.uniform(-1, 1, (num_points, 3))
        side = rng.integers(0, 3, num_points)
        sign = np.sign(points[np.arange(num_points), side])
        points[np.arange(num_points), side] = sign
        normals = np.zeros((num_points, 3))
        normals[np.arange(num_points), side] = sign
        factors = np.concatenate([extents, extents**2, np.log(extents)]) @ mapping

        def views(count, factors=factors):
            return (factors + 0.05 * rng.normal(size=(count, WIDTH))).astype(np.float16)

        object_id = f"box-{i:04d}"
        rows.append(
            {
                "object_id": object_id,
                "group_id": object_id,
                "split": _SPLITS[i % len(_SPLITS)],
                "label": "box",
                "source": f"{object_id}.stl",
                "sha256": json_digest(object_id, length=64),
                "points": points * extents / np.linalg.norm(extents),
                "normals": normals,
                "embeddings": views(4 + i % 3),
                "query_embeddings": views(3),
            }
        )
        rows[-1]["num_views"], rows[-1]["num_query_views"] = len(rows[-1]["embeddings"]), 3
    rows.sort(key=lambda row: (row["split"], row["object_id"]))
    objects = pa.schema(
        [
            *[(name, pa.string()) for name in ("object_id", "group_id", "split", "label", "source", "sha256")],
            tensor_field("points", "float32", (num_points, 3)),
            tensor_field("normals", "float32", (num_points, 3)),
        ]
    )
    embeddings = pa.schema(
        [
            ("object_id", pa.string()),
            tensor_field("embeddings", "float16", (-1, WIDTH)),
            ("num_views", pa.int64()),
            tensor_field("query_embeddings", "float16", (-1, WIDTH)),
            ("num_query_views", pa.int64()),
        ]
    )
    folder = DatasetFolder(str(path))
    parts, embedded = [], []
    for split in dict.fromkeys(_SPLITS):
        members = [row for row in rows if row["split"] == split]
        for start in range(0, len(members), objects_per_part):
            chunk, index = members[start : start + objects_per_part], len(parts)
            info = folder.write_part("objects", index, build_table(objects, chunk), key="synthetic")
            parts.append({"key": "synthetic", "num_rows": len(chunk), "splits": {split: len(chunk)}, "objects": info.sha256, "views": ""})
            info = folder.write_part(f"embeddings/{encoder}", index, build_table(embeddings, chunk), key="synthetic")
            embedded.append({"num_rows": len(chunk), "sha256": info.sha256, "max_views": 6})
    settings = {"num_points": num_points, "seed": seed}
    manifest = Manifest(
        task="alignment",
        settings=settings,
        settings_digest=json_digest(settings),
        parts=parts,
        num_objects=num_objects,
        num_groups=num_objects,
        num_quarantined=0,
        num_ignored=0,
        splits={split: sum(row["split"] == split for row in rows) for split in dict.fromkeys(_SPLITS)},
    )
    folder.write_manifest(manifest)
    folder.folder.write_json(
        f"embeddings/{encoder}/manifest.json",
        json.loads(
            json.dumps(
                EmbeddingsManifest(
                    encoder=encoder, encoder_digest="synthetic", width=WIDTH, dataset_digest=manifest.digest, parts=embedded
                ).__dict__
            )
        ),
    )
    return folder
