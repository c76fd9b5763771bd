"""Raw files -> rows, rows -> model-ready arrays, arrays -> batches, for the alignment task. No torch until a batch is made."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cad_models.alignment.recipe import QUERY_CONDITIONS, AlignmentRecipe, AugmentConfig
from cad_models.common.images import BadImage, decode_image, encode_png
from cad_models.common.meshes import MESH_SUFFIXES, BadMesh, Mesh, geometry_signature, load_mesh, mesh_facts, normalized
from cad_models.common.near_duplicates import shape_points
from cad_models.common.picture_changes import PictureChange
from cad_models.common.points import fps_order, sample_surface, seed_of, side_by_side
from cad_models.dataset import DatasetError, Folder, tensor_field, to_numpy
from cad_models.sources import generated_set, source_files
from cad_models.task import Columns, EmbedColumn, Inspection, Listing, RawItem, Reject, Row

if TYPE_CHECKING:
    import torch

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# Surface points of which the well-spread few are taken that tell near duplicates.
_SHAPE_SAMPLES = 2_048

# Points after this many stand in sampling order: a model never uses more centres than this, and ordering all of them costs 10 x more.
NUM_ORDERED_POINTS = 1_024

# What a gallery view is changed to for training: all that a user's query may differ in, and the drawing.
_VIEW_CHANGE = PictureChange(max_roll_deg=180.0, max_box_change=0.3, max_gamma=1.5, change_lines=True)


# --- listing ------------------------------------------------------------------------------------------------------------------------------
def list_source(source: str) -> Listing:
    """The objects of ``builtin:<N>[:seed=<S>]``, of a folder of meshes (recursive), or of ``models/`` + ``images/`` + ``captions.json``.

    Raises:
        ValueError: the source is not there, is no folder, or holds no mesh.
    """
    if source.startswith("builtin:"):
        count, seed, _ = generated_set(source, of="parts")
        return Listing(
            items=[
                RawItem(object_id=f"part-{i:06d}", source=f"builtin:{i}:seed={seed}", uri=f"builtin:{i}:{seed}")
                for i in range(count)
            ]
        )
    folder, files = source_files(source)
    listing = _list_pairs(folder, files) if _has_pair_layout(files) else _list_meshes(folder, files)
    if not listing.items and not listing.rejects:
        raise ValueError(f"--source {source} holds no mesh ({', '.join(MESH_SUFFIXES)}) among its {len(files)} files")
    return listing


def _has_pair_layout(files: list[str]) -> bool:
    tops = {name.split("/", 1)[0] for name in files if "/" in name}
    return "models" in tops and "images" in tops


def _list_meshes(folder: Folder, files: list[str]) -> Listing:
    meshes = [name for name in files if _suffix(name) in MESH_SUFFIXES]
    stems = [name[: -len(_suffix(name))] for name in meshes]
    repeated = {stem for stem in stems if stems.count(stem) > 1} if len(set(stems)) < len(stems) else set()
    items = [
        RawItem(
            # a.stl beside a.obj: the suffix tells them apart.
            object_id=name if stem in repeated else stem,
            source=name,
            uri=folder.path(name),
            label=name.split("/", 1)[0] if "/" in name else "",
        )
        for name, stem in zip(meshes, stems, strict=True)
    ]
    return Listing(items=sorted(items, key=lambda item: item.object_id), num_ignored=len(files) - len(meshes))


def _list_pairs(folder: Folder, files: list[str]) -> Listing:
    """The source system's layout: ``models/{id}.stl``, ``images/{id}_{view}.png``, optionally ``captions.json`` {id: text}."""
    meshes = {
        name[len("models/") : -len(_suffix(name))]: name for name in files if name.startswith("models/") and _suffix(name) in MESH_SUFFIXES
    }
    captions: dict[str, str] = {}
    if "captions.json" in files:
        captions = folder.read_json("captions.json")
        if not isinstance(captions, dict):
            raise DatasetError(
                f"{folder.path('captions.json')} must hold one JSON object {{id: text}}, it holds a {type(captions).__name__}"
            )
    views: dict[str, list[tuple[int, str]]] = {}
    rejects: list[tuple[str, Reject]] = []
    for name in files:
        if not name.startswith("images/") or _suffix(name) not in IMAGE_SUFFIXES:
            continue
        object_id, _, view = name[len("images/") : -len(_suffix(name))].rpartition("_")
        if object_id in meshes and view.isdigit():
            views.setdefault(object_id, []).append((int(view), name))
        else:
            rejects.append(
                (name, Reject(reason="no_model", detail=f"no models/{object_id or '<id>'} for this image (expected images/<id>_<view>)"))
            )
    items = []
    for object_id, mesh in sorted(meshes.items()):
        if object_id not in views:
            rejects.append((mesh, Reject(reason="no_views", detail=f"no images/{object_id}_<view> for this model")))
            continue
        images = tuple(folder.path(name) for _, name in sorted(views[object_id]))
        caption = str(captions.get(object_id, ""))
        items.append(RawItem(object_id=object_id, source=mesh, uri=folder.path(mesh), images=images, caption=caption))
    used = len(meshes) + sum(map(len, views.values())) + sum(1 for name, _ in rejects if name.startswith("images/")) + bool(captions)
    return Listing(items=items, rejects=rejects, num_ignored=max(0, len(files) - used))


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind("/") else ""


# --- one object ---------------------------------------------------------------------------------------------------------------------------
def read_item(item: RawItem) -> tuple[Mesh, str, str]:
    """An object's mesh, the SHA-256 of its source bytes, and its label.

    Raises:
        BadMesh: the file is not a usable mesh.
    """
    if item.uri.startswith("builtin:"):
        from cad_models.alignment.parts import generate_part

        index, seed = map(int, item.uri.removeprefix("builtin:").split(":"))
        part = generate_part(index, seed)
        digest = hashlib.sha256(part.vertices.tobytes() + part.faces.tobytes()).hexdigest()
        return Mesh(vertices=part.vertices, faces=part.faces, warnings=()), digest, part.family
    data = read_uri(item.uri)
    return load_mesh(data, _suffix(item.uri)), hashlib.sha256(data).hexdigest(), item.label


def read_uri(uri: str) -> bytes:
    """A file's bytes, by path or URI."""
    parent, _, name = uri.rpartition("/")
    return Folder(parent or "/").read_bytes(name)


def inspect_item(item: RawItem) -> Inspection | Reject:
    """Parse a mesh once: enough to find its exact duplicates and to stratify splits."""
    try:
        mesh, sha256, _ = read_item(item)
    except BadMesh as error:
        return Reject(reason=error.reason, detail=error.detail)
    except OSError as error:
        return Reject(reason="unreadable", detail=str(error))
    return Inspection(
        sha256=sha256,
        size=len(mesh.faces),
        complexity=float(len(mesh.vertices)) * len(mesh.faces),
        signature=geometry_signature(mesh),
        shape=shape_points(sample_surface(normalized(mesh), _SHAPE_SAMPLES, 0)[0]),
        inputs=_images_digest(item),
    )


def _images_digest(item: RawItem) -> str:
    if not item.images:
        return ""
    digest = hashlib.sha256()
    for path in item.images:
        digest.update(path.rpartition("/")[2].encode() + b"\0")
        try:
            digest.update(hashlib.sha256(read_uri(path)).digest())
        except OSError:
            # One unreadable image of many: preparing puts it into the quarantine, and looks again the next time.
            digest.update(b"unreadable")
    return digest.hexdigest()


def cad_points(mesh: Mesh, sha256: str, num_points: int, *, num_ordered: int = NUM_ORDERED_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Surface points and normals as the model gets them, in training and in ``infer.py`` alike.

    Args:
        sha256: Of the mesh's source: seeds the sampling, so that the same file gives the same points under any name.
        num_ordered: For who reads only so many: the first of them are the same for any number, fewer cost less. At most ``NUM_ORDERED_POINTS`` count.

    Returns:
        ``(points, normals)``, float32 [num_points, 3]: centred, within the unit sphere, the first ``num_ordered`` in farthest-point order.
    """
    points, normals = sample_surface(normalized(mesh), num_points, seed_of(sha256, 0))
    order = fps_order(points, min(num_ordered, NUM_ORDERED_POINTS, num_points))
    return points.take(order, axis=0), normals.take(order, axis=0)


def prepare_item(item: RawItem, recipe: AlignmentRecipe) -> Row | Reject:
    """The heavy work on one object: points, facts, views."""
    try:
        mesh, sha256, label = read_item(item)
    except BadMesh as error:
        return Reject(reason=error.reason, detail=error.detail)
    except OSError as error:
        return Reject(reason="unreadable", detail=str(error))
    facts = mesh_facts(mesh)
    points, normals = cad_points(mesh, sha256, recipe.data.num_points)
    views = _given_views(item, recipe) if item.images else _rendered_views(mesh, sha256, recipe)
    if isinstance(views, Reject):
        return views
    columns, rejects = views
    extents = [float(e) for e in facts.extents]
    objects = {
        "points": points,
        "normals": normals,
        "caption": item.caption,
        "num_vertices": facts.num_vertices,
        "num_faces": facts.num_faces,
        "num_bodies": facts.num_bodies,
        "volume": float(facts.volume),
        "area": float(facts.area),
        "extent_x": extents[0],
        "extent_y": extents[1],
        "extent_z": extents[2],
        "watertight": bool(facts.watertight),
        "warnings": "; ".join(facts.warnings),
        "num_views": len(columns["images"]),
        "num_query_views": len(columns["query_images"]),
        "label": label,
        "sha256": sha256,
    }
    return Row(objects=objects, views=columns, rejects=rejects)


def _rendered_views(mesh: Mesh, sha256: str, recipe: AlignmentRecipe) -> tuple[dict[str, Any], list]:
    from cad_models.common.rendering import query_cameras, render_views, ring_cameras

    gallery = ring_cameras(recipe.data.num_views)
    # Query cameras differ from object to object and are never training cameras: a model cannot learn them.
    queries = query_cameras(recipe.data.num_query_views, seed_of(sha256, 1), apart_from=gallery)
    images = render_views(mesh.vertices, mesh.faces, [*gallery, *queries], size=recipe.data.image_size)
    encoded = [encode_png(image) for image in images]
    columns = {
        "images": encoded[: len(gallery)],
        "cameras": json.dumps([camera.to_dict() for camera in gallery]),
        "query_images": encoded[len(gallery) :],
        "query_cameras": json.dumps([camera.to_dict() for camera in queries]),
    }
    return columns, []


def _given_views(item: RawItem, recipe: AlignmentRecipe) -> tuple[dict[str, Any], list] | Reject:
    """The user's own images. The last quarter (``num_query_views`` at most) is held out for queries: the same view numbers for every
    object, hence cameras that training never sees."""
    good: list[bytes] = []
    rejects: list[tuple[str, Reject]] = []
    for path in item.images:
        name = "/".join(path.rsplit("/", 2)[1:])
        try:
            data = read_uri(path)
            decode_image(data)
            good.append(data)
        except BadImage as error:
            rejects.append((name, Reject(reason="bad_image", detail=f"{error.reason}: {error.detail}")))
        except OSError as error:
            rejects.append((name, Reject(reason="unreadable", detail=str(error))))
    if not good:
        return Reject(reason="no_views", detail=f"none of its {len(item.images)} images can be read")
    num_queries = min(recipe.data.num_query_views, len(good) // 4)
    # With three images or fewer none can be spared: queries are then views seen in training, which only concerns objects of the train split.
    columns = {
        "images": good[: len(good) - num_queries],
        "cameras": "[]",
        "query_images": good[len(good) - num_queries :] if num_queries else good,
        "query_cameras": "[]",
    }
    return columns, rejects


def schemas(recipe: AlignmentRecipe) -> dict[str, pa.Schema]:
    """Columns that :func:`prepare_item` fills."""
    number, real, text = pa.int64(), pa.float64(), pa.string()
    objects = pa.schema(
        [
            tensor_field("points", "float32", (recipe.data.num_points, 3)),
            tensor_field("normals", "float32", (recipe.data.num_points, 3)),
            ("caption", text),
            *[(name, number) for name in ("num_vertices", "num_faces", "num_bodies")],
            *[(name, real) for name in ("volume", "area", "extent_x", "extent_y", "extent_z")],
            ("watertight", pa.bool_()),
            ("warnings", text),
            ("num_views", number),
            ("num_query_views", number),
        ]
    )
    views = pa.schema(
        [("images", pa.list_(pa.binary())), ("cameras", text), ("query_images", pa.list_(pa.binary())), ("query_cameras", text)]
    )
    return {"objects": objects, "views": views}


# --- embedding ----------------------------------------------------------------------------------------------------------------------------
def changed_embed_columns(recipe: AlignmentRecipe) -> tuple[EmbedColumn, ...]:
    """Query images in harder conditions, and changed versions of the gallery views, where the recipe wants them."""
    columns = []
    if recipe.data.query_conditions:
        for name, (max_roll_deg, max_box_change) in QUERY_CONDITIONS.items():
            change = PictureChange(max_roll_deg=max_roll_deg, max_box_change=max_box_change)
            columns.append(
                EmbedColumn(source=("views", "query_images"), name=f"query_embeddings_{name}", count=f"num_query_views_{name}", change=change)
            )
    if recipe.data.augmented_views:
        columns.append(
            EmbedColumn(
                source=("views", "images"), name="augmented_embeddings", count="num_augmented_views", change=_VIEW_CHANGE, copies=recipe.data.augmented_views
            )
        )
    return tuple(columns)


# --- training -----------------------------------------------------------------------------------------------------------------------------
def category_number(label: str) -> int:
    """A label as int64, the same on every machine; 0 without one."""
    return group_number(label) if label else 0


def group_number(group_id: str) -> int:
    """A group id as int64, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(group_id.encode(), digest_size=8).digest(), "big", signed=True)


def examples(tables: dict[str, pa.Table], recipe: AlignmentRecipe) -> Columns:
    """Co-partitioned tables -> ``points`` and, where the model has them, ``normals`` float32 [n, points, 3], ``views`` float16 [n, most views, width]
    (zeros where an object has fewer), ``num_views`` int64 [n], the same for ``query_views``, ``group`` and ``label`` int64 [n], ``object_id`` [n].

    With ``data.query_conditions`` also ``query_views_<condition>``, as ``query_views``; with ``data.augmented_share`` also ``augmented_views`` float16
    [n, most views, versions, width]."""
    objects, embeddings = tables["objects"], tables["embeddings"]
    num_points = recipe.model.num_read_points
    stored = to_numpy(objects, "points")
    if stored.shape[1] < num_points:
        raise DatasetError(
            f"--model.num-points {num_points} is more than the dataset's {stored.shape[1]} points: prepare with --data.num-points {num_points} or more, or "
            f"read fewer: --model.num-points {stored.shape[1]}"
        )
    # Each as it is stored, without a copy: `collate` copies a batch anyway and puts them beside each other then.
    named = ["points", "normals"] if "normals" in recipe.model.channels else ["points"]
    columns: Columns = {name: np.ascontiguousarray(to_numpy(objects, name)[:, :num_points]) for name in named}
    columns |= {
        "group": np.array([group_number(g) for g in objects.column("group_id").to_pylist()], dtype=np.int64),
        "label": np.array([category_number(label or "") for label in objects.column("label").to_pylist()], dtype=np.int64),
        "object_id": np.array(objects.column("object_id").to_pylist(), dtype=object),
    }
    for name, source in (("views", "embeddings"), ("query_views", "query_embeddings")):
        columns[name], columns[f"num_{name}"] = _padded(embeddings, source)
    if recipe.data.query_conditions:
        for condition in QUERY_CONDITIONS:
            columns[f"query_views_{condition}"], _ = _padded(embeddings, f"query_embeddings_{condition}")
    if recipe.data.augmented_share > 0:
        versions, count = _padded(embeddings, "augmented_embeddings")
        num_copies = max(1, int(count.sum()) // max(1, int(columns["num_views"].sum())))
        columns["augmented_views"] = versions.reshape(len(versions), versions.shape[1] // num_copies, num_copies, versions.shape[2])
    return columns


def _padded(embeddings: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of embeddings, float16 [n, most, width] with zeros where an object has fewer, and how many each has, int64 [n]."""
    cells = to_numpy(embeddings, name)
    if isinstance(cells, np.ndarray):
        return cells, np.full(len(cells), cells.shape[1], dtype=np.int64)
    width = json.loads(embeddings.schema.field(name).metadata[b"shape"])[1]
    padded = np.zeros((len(cells), max((len(c) for c in cells), default=0), width), dtype=np.float16)
    for row, cell in zip(padded, cells, strict=True):
        row[: len(cell)] = cell
    return padded, np.array([len(c) for c in cells], dtype=np.int64)


def collate(columns: Columns, recipe: AlignmentRecipe, *, rngs: Sequence[np.random.Generator] | None) -> "dict[str, torch.Tensor]":
    """Arrays of a batch -> tensors ``points`` [n, points, channels], ``group``, ``views``, ``view_mask``; in evaluation also ``query_views`` (in all
    conditions), ``query_mask`` and ``label``."""
    import torch

    points = side_by_side(columns["points"], columns["normals"]) if "normals" in columns else np.array(columns["points"], dtype=np.float32)
    views, count = columns["views"], columns["num_views"]
    if rngs is not None:
        for cloud, rng in zip(points, rngs, strict=True):
            cloud[:] = _augmented(cloud, recipe.data.augment, rng)
        if recipe.data.augmented_share > 0:
            views = _draw_versions(views, columns["augmented_views"], recipe.data.augmented_share, rngs)
        if 0 < recipe.data.views_per_step < views.shape[1]:
            views, count = _draw_views(views, count, recipe.data.views_per_step, rngs)
    batch = {
        "points": torch.from_numpy(points),
        "group": torch.from_numpy(np.array(columns["group"])),
        "views": torch.from_numpy(views.astype(np.float32)),
        "view_mask": torch.from_numpy(np.arange(views.shape[1])[None, :] < count[:, None]),
    }
    if rngs is None:
        queries = [name for name in columns if name == "query_views" or name.startswith("query_views_")]
        batch |= {name: torch.from_numpy(columns[name].astype(np.float32)) for name in queries}
        batch["query_mask"] = torch.from_numpy(np.arange(columns["query_views"].shape[1])[None, :] < columns["num_query_views"][:, None])
        batch["label"] = torch.from_numpy(np.array(columns["label"]))
    return batch


def _draw_versions(views: np.ndarray, versions: np.ndarray, share: float, rngs: Sequence[np.random.Generator]) -> np.ndarray:
    """The views, each with probability ``share`` replaced by one of its versions [n, views, versions, width]."""
    drawn = views.copy()
    every = np.arange(views.shape[1])
    for row, own, rng in zip(drawn, versions, rngs, strict=True):
        replaced, which = rng.random(len(every)) < share, rng.integers(own.shape[1], size=len(every))
        row[replaced] = own[every, which][replaced]
    return drawn


def _draw_views(views: np.ndarray, count: np.ndarray, wanted: int, rngs: Sequence[np.random.Generator]) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.zeros((len(views), wanted, views.shape[2]), dtype=views.dtype)
    for row, source, n, rng in zip(drawn, views, count, rngs, strict=True):
        chosen = rng.permutation(n)[:wanted]
        row[: len(chosen)] = source[chosen]
    return drawn, np.minimum(count, wanted)


def _augmented(cloud: np.ndarray, augment: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Per-axis scale, shift and rotation about the vertical axis; normals turn by the inverse transpose, so they stay normal."""
    scale = np.exp(rng.uniform(-1, 1, 3) * np.log(augment.max_scale)).astype(np.float32)
    shift = rng.uniform(-augment.max_shift, augment.max_shift, 3).astype(np.float32)
    angle = np.deg2rad(rng.uniform(-augment.max_rotation_deg, augment.max_rotation_deg))
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=np.float32)
    moved = (cloud[:, :3] * scale + shift) @ rotation.T
    if cloud.shape[1] == 3:
        return moved
    normals = (cloud[:, 3:6] / scale) @ rotation.T
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    return np.concatenate([moved, normals], axis=1)
