"""Finished datasets of generated pictures, written straight into a folder: no Ray, a second."""

import pyarrow as pa

from cad_models.config import json_digest
from cad_models.dataset import DatasetFolder, Manifest, build_table
from cad_models.images.recipe import ImagesRecipe
from cad_models.images.task import ImagesTask

_SPLITS = ("train", "train", "train", "val", "test")


def make_dataset(path: str, recipe: ImagesRecipe, *, num_objects: int = 60, objects_per_part: int = 8, seed: int = 0) -> DatasetFolder:
    """``builtin:<num_objects>`` as prepare.py makes it: every part holds one split."""
    task, folder = ImagesTask(), DatasetFolder(str(path))
    rows = []
    for i, item in enumerate(task.list_raw(f"builtin:{num_objects}:seed={seed}").items):
        row = task.prepare(item, recipe)
        own = {"object_id": item.object_id, "group_id": item.object_id, "split": _SPLITS[i % len(_SPLITS)], "source": item.source}
        rows.append(({**own, **row.objects}, {"object_id": item.object_id, **row.views}))
    schemas = task.schemas(recipe)
    objects = pa.schema([*[(n, pa.string()) for n in ("object_id", "group_id", "split", "label", "source", "sha256")], *schemas["objects"]])
    views = pa.schema([("object_id", pa.string()), *schemas["views"]])
    parts, labels = [], {}
    for split in dict.fromkeys(_SPLITS):
        members = [row for row in rows if row[0]["split"] == split]
        for start in range(0, len(members), objects_per_part):
            chunk, index = members[start : start + objects_per_part], len(parts)
            digests = [
                folder.write_part(kind, index, build_table(schema, [row[k] for row in chunk]), key="synthetic").sha256
                for k, (kind, schema) in enumerate((("objects", objects), ("views", views)))
            ]
            parts.append({"key": "synthetic", "num_rows": len(chunk), "splits": {split: len(chunk)}, "objects": digests[0], "views": digests[1]})
            for row, _ in chunk:
                labels.setdefault(row["label"], {}).setdefault(split, 0)
                labels[row["label"]][split] += 1
    settings = task.prepare_settings(recipe)
    folder.write_manifest(
        Manifest(
            task="images",
            settings=settings,
            settings_digest=json_digest(settings),
            parts=parts,
            num_objects=num_objects,
            num_groups=num_objects,
            num_quarantined=0,
            num_ignored=0,
            splits={split: sum(row[0]["split"] == split for row in rows) for split in dict.fromkeys(_SPLITS)},
            labels=dict(sorted(labels.items())),
        )
    )
    return folder
