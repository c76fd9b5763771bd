"""A picture of a dataset for people: one view each of some of its objects, with their ids."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

from cad_models.task import Task

if TYPE_CHECKING:
    from cad_models.dataset import DatasetFolder, Manifest

_CELL, _CAPTION, _NUM_COLUMNS = 160, 18, 8


def write_contact_sheet(dataset: "DatasetFolder", manifest: "Manifest", task: Task, path: Path, *, most: int = 48) -> Path:
    """Write a PNG with the middle view of up to ``most`` objects, evenly spaced over the dataset; returns ``path``.

    Args:
        task: One that names a ``preview_source`` or embeds images.
    """
    from cad_models.common.images import decode_image

    folder, column = task.preview_source or task.embed_columns[0].source
    chosen = np.unique(np.linspace(0, manifest.num_objects - 1, min(most, manifest.num_objects)).round().astype(int))
    cells: list[tuple[str, np.ndarray]] = []
    start = 0
    for index, part in enumerate(manifest.parts):
        rows = chosen[(chosen >= start) & (chosen < start + part["num_rows"])] - start
        start += part["num_rows"]
        if len(rows):
            table = dataset.read_part(folder, index, ["object_id", column]).take(rows)
            for object_id, images in zip(table.column("object_id").to_pylist(), table.column(column).to_pylist(), strict=True):
                if images:
                    cells.append((object_id, decode_image(images if isinstance(images, bytes) else images[len(images) // 2])))
    data = contact_sheet(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def contact_sheet(cells: list[tuple[str, UInt8[np.ndarray, "height width 3"]]]) -> bytes:
    """The PNG bytes of a grid of captioned images."""
    from PIL import Image, ImageDraw, ImageFont

    num_rows = math.ceil(len(cells) / _NUM_COLUMNS)
    sheet = Image.new("RGB", (_CELL * min(len(cells), _NUM_COLUMNS), (_CELL + _CAPTION) * num_rows), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (caption, image) in enumerate(cells):
        x, y = i % _NUM_COLUMNS * _CELL, i // _NUM_COLUMNS * (_CELL + _CAPTION)
        picture = Image.fromarray(image)
        picture.thumbnail((_CELL - 8, _CELL - 8))
        sheet.paste(picture, (x + (_CELL - picture.width) // 2, y + (_CELL - picture.height) // 2))
        name = caption.rpartition("/")[2]
        while len(name) > 4 and draw.textlength(name, font=font) > _CELL - 8:
            name = name.removesuffix("…")[:-1] + "…"
        draw.text((x + _CELL // 2, y + _CELL), name, fill="black", font=font, anchor="ma")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()
