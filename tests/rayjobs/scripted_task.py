"""A task whose objects are text files that say what happens to them, for tests of the jobs around it.

A file's words: ``size=<n>`` (default 1), ``views=<n>`` (default 2), and at most one of ``inspect:<act>``, ``prepare:<act>`` with the acts hang,
exit, raise, hoard (memory), reject. Files with the same words but for their name are exact duplicates.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cad_models.alignment.task import AlignmentTask
from cad_models.common.images import encode_png
from cad_models.dataset import tensor_field
from cad_models.task import Inspection, Listing, RawItem, Reject, Row


class ScriptedTask(AlignmentTask):
    """Lists ``*.txt``; points [size, 3], views of a few bytes."""

    name = "scripted"

    def list_raw(self, source: str) -> Listing:
        paths = sorted(Path(source).glob("*.txt"))
        return Listing(items=[RawItem(object_id=p.stem, source=p.name, uri=str(p.resolve()), label=p.stem[0]) for p in paths])

    def inspect(self, item: RawItem, recipe: Any) -> Inspection | Reject:
        words = _words(item)
        if (reject := _act(words.get("inspect", ""))) is not None:
            return reject
        size = int(words.get("size", 1))
        signature = np.array([size, int(words.get("views", 2))], dtype=np.float64)
        return Inspection(sha256=_sha256(item), size=size, complexity=float(size), signature=signature)

    def duplicates(self, inspections) -> list[int]:
        first: dict[bytes, int] = {}
        return [first.setdefault(i.signature.tobytes(), n) for n, i in enumerate(inspections)]

    def prepare(self, item: RawItem, recipe: Any) -> Row | Reject:
        words = _words(item)
        if (reject := _act(words.get("prepare", ""))) is not None:
            return reject
        points = np.full((4, 3), float(words.get("size", 1)), dtype=np.float32)
        images = [f"{item.object_id}/{view}".encode() for view in range(int(words.get("views", 2)))]
        rejects = [(f"{item.source}#1", Reject(reason="bad_image", detail="one view"))] if "broken_view" in words else []
        return Row(objects={"points": points, "sha256": _sha256(item)}, views={"images": images}, rejects=rejects)

    def prepare_settings(self, recipe: Any) -> dict[str, Any]:
        return {"num_points": 4, "seed": recipe.seed}

    def schemas(self, recipe: Any) -> dict[str, pa.Schema]:
        return {"objects": pa.schema([tensor_field("points", "float32", (4, 3))]), "views": pa.schema([("images", pa.list_(pa.binary()))])}


class PictureTask(ScriptedTask):
    """Objects without views; one picture each, a gray of its size, in ``objects/``."""

    name = "pictures"
    embed_columns = ()
    preview_source = ("objects", "picture")

    def prepare(self, item: RawItem, recipe: Any) -> Row | Reject:
        row = super().prepare(item, recipe)
        if isinstance(row, Reject):
            return row
        gray = np.full((8, 8, 3), int(_words(item).get("size", 1)), dtype=np.uint8)
        return Row(objects={**row.objects, "picture": encode_png(gray)}, rejects=row.rejects)

    def schemas(self, recipe: Any) -> dict[str, pa.Schema]:
        return {"objects": pa.schema([tensor_field("points", "float32", (4, 3)), ("picture", pa.binary())])}


def _words(item: RawItem) -> dict[str, str]:
    pairs = (word.replace(":", "=").partition("=") for word in Path(item.uri).read_text().split())
    return {name: value for name, _, value in pairs}


def _sha256(item: RawItem) -> str:
    return hashlib.sha256(Path(item.uri).read_bytes()).hexdigest()


def _act(act: str) -> Reject | None:
    if act == "hang":
        time.sleep(3600)
    elif act == "exit":
        os._exit(3)
    elif act == "raise":
        raise RuntimeError("no such luck")
    elif act == "hoard":
        hoard = [np.ones(1 << 24) for _ in range(1000)]
        return Reject(reason="failed", detail=f"{len(hoard)} blocks did fit")
    elif act == "reject":
        return Reject(reason="zero_area", detail="flat")
    return None
