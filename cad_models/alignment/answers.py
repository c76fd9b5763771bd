"""Images and meshes as a user gives them -> embeddings of every member -> ranked answers, between images and meshes (mesh -> mesh: similar_meshes.py).

A gallery image stands for the object that it shows: ``bolt_0.png`` and ``bolt_1.png`` are two views of ``bolt``. An object given by several views is
the mean of their unit embeddings, normalised again, as in evaluation.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from cad_models.alignment.data import IMAGE_SUFFIXES, cad_points, read_uri
from cad_models.alignment.view_cache import ViewCache
from cad_models.common.images import BadImage, decode_image
from cad_models.common.meshes import MESH_SUFFIXES, BadMesh, load_mesh
from cad_models.common.points import side_by_side
from cad_models.dataset import Folder
from cad_models.task import Answer, Columns, Entry, Input, Reject, Requests, Search

DIRECTIONS = ("image_to_mesh", "mesh_to_image")
MESH_TO_MESH = "mesh_to_mesh"
MEASURED_MESH = "measured mesh"
"""Kind of a mesh whose measures in file units are wanted beside its points."""

# The source system's test layout: folder of the queries, folder of the gallery.
_LAYOUT = {
    "image_to_mesh": ("queries_image_to_mesh", "gallery_mesh_for_image"),
    "mesh_to_image": ("queries_mesh_to_image", "gallery_image_for_mesh"),
}

_THUMBNAIL_SIZE = 128


# --- listing ------------------------------------------------------------------------------------------------------------------------------
def list_requests(
    queries: str | Sequence[str], gallery: str | None, *, direction: str = "auto", turned: bool = False, measured: bool = False
) -> Requests:
    """Searches between a folder of queries (or a list of files) and a folder of gallery files, both recursive.

    Images among the queries and meshes in the gallery make ``image_to_mesh``; meshes and images make ``mesh_to_image``; both of both make both. Meshes
    on both sides and no image on either make ``mesh_to_mesh``, which otherwise needs to be asked for.
    A folder with the source system's ``queries_image_to_mesh/``, ``gallery_mesh_for_image/``, ``queries_mesh_to_image/`` and
    ``gallery_image_for_mesh/`` needs no gallery.

    Args:
        turned: Whether query images are looked at from all sides of their plane: their inputs are of the kind ``turned_image`` then.
        measured: Whether ``mesh_to_mesh`` needs the meshes' measures in file units.

    Raises:
        ValueError: unknown direction, missing folder, or nothing to search.
    """
    if direction not in ("auto", *DIRECTIONS, MESH_TO_MESH):
        raise ValueError(f"--direction {direction!r} is none of auto, {', '.join(DIRECTIONS)}, {MESH_TO_MESH}")
    wanted = DIRECTIONS if direction == "auto" else (direction,)
    listed = _Listed()
    layout = _in_layout(queries, gallery) if isinstance(queries, str) and direction != MESH_TO_MESH else {}
    if layout:
        sides = {name: layout[name] for name in wanted if name in layout}
        for query_files, gallery_files in sides.values():
            listed.count(query_files, gallery_files)
    else:
        if gallery is None:
            raise ValueError(
                "--gallery is missing: name the folder to search in (only --queries with queries_image_to_mesh/ and its like needs none)"
            )
        query_files = _files(queries, "--queries") if isinstance(queries, str) else _named(queries)
        gallery_files = _files(gallery, "--gallery")
        listed.count(query_files, gallery_files)
        if direction == "auto" and not any(file.kind == "image" for file in (*query_files, *gallery_files)):
            wanted = (MESH_TO_MESH,)
        sides = {name: (query_files, gallery_files) for name in wanted}
    searches = []
    for name, (query_files, gallery_files) in sides.items():
        query_kind, gallery_kind = name.split("_to_")
        asked = [file for file in query_files if file.kind == query_kind]
        among = [file for file in gallery_files if file.kind == gallery_kind]
        if asked and among:
            objects = _view_groups(among) if gallery_kind == "image" else _single(among)
            if name == MESH_TO_MESH and measured:
                query_kind = gallery_kind = MEASURED_MESH
            elif turned and query_kind == "image":
                query_kind = "turned_image"
            searches.append(Search(direction=name, queries=listed.entries(_single(asked), query_kind), gallery=listed.entries(objects, gallery_kind)))
    if not searches:
        found = [f"{sum(f.kind == kind for f in side)} {plural}" for side in listed.sides for kind, plural in _KINDS.items()]
        raise ValueError(
            f"nothing to search: --queries holds {found[0]} and {found[1]}, --gallery {found[2]} and {found[3]}; "
            f"{' or '.join(wanted)} needs {'meshes' if wanted == (MESH_TO_MESH,) else 'one kind'} on each side"
        )
    seen = {file.uri for side in listed.sides for file in side}
    return Requests(inputs=tuple(listed.inputs), searches=tuple(searches), num_ignored=len(seen - {item.uri for item in listed.inputs}))


_KINDS = {"image": "images", "mesh": "meshes"}


@dataclass(frozen=True)
class _File:
    name: str
    uri: str
    kind: str

    @property
    def stem(self) -> str:
        base = self.name.rpartition("/")[2]
        return base.rpartition(".")[0] or base


class _Listed:
    """Inputs numbered in the order of their first use; a file used twice in the same way is read once."""

    def __init__(self) -> None:
        self.inputs: list[Input] = []
        self.sides: tuple[list[_File], list[_File]] = ([], [])
        self._positions: dict[tuple[str, str], int] = {}

    def count(self, queries: list[_File], gallery: list[_File]) -> None:
        self.sides[0].extend(queries)
        self.sides[1].extend(gallery)

    def entries(self, groups: Mapping[str, list[_File]], kind: str) -> tuple[Entry, ...]:
        return tuple(Entry(entry_id=name, inputs=tuple(self._position(file, kind) for file in files)) for name, files in sorted(groups.items()))

    def _position(self, file: _File, kind: str) -> int:
        if (file.uri, kind) not in self._positions:
            self._positions[file.uri, kind] = len(self.inputs)
            self.inputs.append(Input(kind=kind, source=file.name, uri=file.uri))
        return self._positions[file.uri, kind]


def _in_layout(queries: str, gallery: str | None) -> dict[str, tuple[list[_File], list[_File]]]:
    roots = [Folder(queries), *([Folder(gallery)] if gallery is not None else [])]
    sides = {}
    for direction, names in _LAYOUT.items():
        query_folder = roots[0] / names[0]
        gallery_folder = next((root / names[1] for root in roots if root.exists(names[1])), None)
        if query_folder.exists() and gallery_folder is not None:
            sides[direction] = (_below(query_folder, names[0]), _below(gallery_folder, names[1]))
    return sides


def _files(uri: str, flag: str) -> list[_File]:
    folder = Folder(uri)
    if not folder.exists():
        raise ValueError(f"{flag} {uri}: there is no such folder")
    if folder.is_local and _kind(folder.uri) is not None and not folder.names():
        return _named([uri])
    return _below(folder, "")


def _below(folder: Folder, shown: str) -> list[_File]:
    names = [name for name in folder.files() if not any(part.startswith(".") for part in name.split("/"))]
    return [_File(f"{shown}/{name}" if shown else name, folder.path(name), _kind(name) or "") for name in names]


def _named(paths: Iterable[str]) -> list[_File]:
    files = []
    for path in dict.fromkeys(paths):
        uri = path if "://" in path else Folder(path).uri
        files.append(_File(path, uri, _kind(path) or ""))
    return files


def _kind(name: str) -> str | None:
    suffix = "." + name.rpartition(".")[2].lower()
    return "image" if suffix in IMAGE_SUFFIXES else "mesh" if suffix in MESH_SUFFIXES else None


def _single(files: list[_File]) -> dict[str, list[_File]]:
    """Each file an entry of its own, named by its stem; by as much of its path as is needed where stems are equal."""
    stems = Counter(file.stem for file in files)
    paths = Counter(file.name.rpartition(".")[0] for file in files)
    named = {}
    for file in files:
        path = file.name.rpartition(".")[0]
        named[file.stem if stems[file.stem] == 1 else path if paths[path] == 1 else file.name] = [file]
    return named


def _view_groups(files: list[_File]) -> dict[str, list[_File]]:
    """Images by object: ``{id}_{number}`` shows the object ``id``, any other name an object of its own.

    If that left one object only, the numbers are no views but tell the objects apart (``part_001.png``, ``part_002.png``).
    """
    groups: dict[str, list[tuple[int, _File]]] = {}
    for file in files:
        object_id, _, view = file.stem.rpartition("_")
        if object_id and view.isascii() and view.isdigit():
            groups.setdefault(object_id, []).append((int(view), file))
        else:
            groups.setdefault(file.stem, []).append((-1, file))
    if len(groups) == 1 and len(files) > 1:
        return _single(files)
    return {name: [file for _, file in sorted(views, key=lambda view: (view[0], view[1].name))] for name, views in groups.items()}


# --- one file -----------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """What the members need of a file: each distinct value is computed once."""

    num_points: tuple[tuple[int, int], ...]
    """Pairs (stored, read): a member's cloud is the first ``read`` of ``stored`` sampled points in farthest-point order."""
    num_views: int = 0
    """Views rendered of a mesh; 0 = none."""
    view_size: int = 224
    """Width and height of a view, in pixels."""
    num_rolls: int = 1
    """Positions in which a turned image is looked at."""
    cache: str = ""
    """Folder of a `ViewCache`; empty = none."""
    encoder_digests: tuple[str, ...] = ()
    """Of the encoders whose views a cache must have, so that nothing need be rendered."""


def read_input(item: Input, settings: ReadSettings) -> Columns | Reject:
    """The arrays of one file.

    ``thumbnail``; of an image ``image`` uint8 [height, width, 3] and ``num_rolls``; of a mesh ``points/<stored>`` float32 [read, 6] (with normals); of one that
    is to be measured ``measures`` float32 [21]; of another, where views are wanted, ``views`` uint8 [views, size, size, 3] or, from the cache,
    ``frozen_views/<encoder digest>`` float16 [views, width]; ``sha256`` uint8. ``seconds/<stage>``: what it cost.
    """
    try:
        data = read_uri(item.uri)
        if item.kind in ("mesh", MEASURED_MESH):
            return _read_mesh(data, item, settings)
        return _read_image(data, settings.num_rolls if item.kind == "turned_image" else 1)
    except BadMesh as error:
        return Reject(reason=error.reason, detail=error.detail)
    except BadImage as error:
        return Reject(reason="bad_image", detail=f"{error.reason}: {error.detail}")
    except OSError as error:
        return Reject(reason="unreadable", detail=str(error))


def _read_image(data: bytes, num_rolls: int) -> Columns:
    started = time.perf_counter()
    image = decode_image(data)
    decoded = time.perf_counter()
    columns = {"image": image, "num_rolls": np.array(num_rolls), "thumbnail": _thumbnail(image)}
    stages = {"decode images": decoded - started, "thumbnails": time.perf_counter() - decoded}
    return columns | {f"seconds/{stage}": np.array(seconds) for stage, seconds in stages.items()}


def _read_mesh(data: bytes, item: Input, settings: ReadSettings) -> Columns:
    from cad_models.common.rendering import Camera, render_views, ring_cameras

    started = time.perf_counter()
    mesh = load_mesh(data, "." + item.uri.rpartition(".")[2].lower())
    digest = hashlib.sha256(data)
    sampled = time.perf_counter()
    columns: Columns = {"sha256": np.frombuffer(digest.digest(), dtype=np.uint8)}
    for stored, read in settings.num_points:
        points, normals = cad_points(mesh, digest.hexdigest(), stored, num_ordered=read)
        columns[f"points/{stored}"] = side_by_side(points[None, :read], normals[None, :read])[0]
    rendered = time.perf_counter()
    if item.kind == MEASURED_MESH:
        from cad_models.alignment.descriptors import measures

        columns["measures"] = measures(mesh)
    elif settings.num_views:
        cached = _cached_views(settings, digest.hexdigest())
        columns |= cached
        if not cached:
            columns["views"] = render_views(mesh.vertices, mesh.faces, ring_cameras(settings.num_views), size=settings.view_size)
    pictured = time.perf_counter()
    picture = render_views(mesh.vertices, mesh.faces, [Camera(azimuth_deg=30.0, elevation_deg=25.0)], size=_THUMBNAIL_SIZE)[0]
    columns["thumbnail"] = _thumbnail(picture)
    stages = {"parse": sampled - started, "sample points": rendered - sampled, "thumbnails": time.perf_counter() - pictured}
    stages |= {"render views": pictured - rendered} if settings.num_views else {}
    return columns | {f"seconds/{stage}": np.array(seconds) for stage, seconds in stages.items()}


def _cached_views(settings: ReadSettings, sha256: str) -> Columns:
    """Every encoder's views of a mesh; empty where the cache lacks any."""
    if not settings.cache:
        return {}
    cache = ViewCache(settings.cache, num_views=settings.num_views, view_size=settings.view_size)
    found = {f"frozen_views/{digest}": cache.read(sha256, digest) for digest in settings.encoder_digests}
    return {} if any(views is None for views in found.values()) else found


def _thumbnail(image: np.ndarray) -> np.ndarray:
    import io

    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=82)
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)


# --- answers ------------------------------------------------------------------------------------------------------------------------------
def combine_embeddings(
    members: Sequence[Float[np.ndarray, "..."]], *, rule: str = "concatenate", weights: Sequence[float] | None = None
) -> Float[np.ndarray, "..."]:
    """The members' unit embeddings of the same things -> one, whose inner products rank as the ensemble does.

    ``concatenate``: scaled by the square roots of the weights' shares and laid side by side, so that the inner product is the weighted mean of the
    members' cosines and one index serves. ``mean``: averaged and normalised again, as the source system does; that means something only for
    members that share their axes (as checkpoints of one run).

    Args:
        members: Of each its vectors along the last axis; the axes before it are alike, but for meshes with one vector beside such with several.

    Raises:
        ValueError: unknown rule, weights that are not positive or not one a member, or ``mean`` of members with unequal widths.
    """
    share = _shares(len(members), weights)
    members = _as_many_sides(members)
    if rule == "concatenate" and len(members) == 1:
        return members[0]  # not a copy: it may be a whole split's
    if rule == "concatenate":
        return np.concatenate([m * np.float32(np.sqrt(w)) for m, w in zip(members, share, strict=True)], axis=-1)
    if rule != "mean":
        raise ValueError(f"--combine {rule!r} is none of concatenate, mean")
    widths = [m.shape[-1] for m in members]
    if len(set(widths)) > 1:
        raise ValueError(f"--combine mean needs members of one width, they have {', '.join(map(str, widths))}: use --combine concatenate")
    return _unit(sum(m * np.float32(w) for m, w in zip(members, share, strict=True)))


def _as_many_sides(members: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Members with one vector a mesh beside such with one for each side: the one stands for every side."""
    largest = max(members, key=lambda m: m.ndim)
    return [m if m.ndim == largest.ndim else np.broadcast_to(m[..., None, :], (*largest.shape[:-1], m.shape[-1])) for m in members]


def _shares(count: int, weights: Sequence[float] | None) -> np.ndarray:
    given = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != (count,) or not np.all(np.isfinite(given)) or np.any(given <= 0):
        raise ValueError(f"weights must be {count} positive numbers, one a member, got {None if weights is None else list(weights)}")
    return given / given.sum()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))


def rank(
    search: Search,
    outputs: Mapping[int, list[np.ndarray]],
    *,
    rule: str,
    weights: Sequence[float],
    top_k: int,
    fitted: Mapping[str, Any] | None = None,
    signatures: Sequence[Mapping[str, Any]] = (),
) -> list[Answer]:
    """The ``top_k`` best gallery objects of every query, by inner product of the combined embeddings; exact, ties by id.

    Where meshes were rendered, or pictures turned: by `cad_models.alignment.view_search`. Queries and objects none of whose files could be read are
    left out.

    Args:
        outputs: As `cad_models.alignment.predictor.AlignmentPredictor.predict` gives them.
        fitted, signatures: As `cad_models.task.Task.rank` has them; read only where meshes were rendered.
    """
    import torch

    from cad_models.common.retrieval import top_k as best

    to_mesh = search.direction == "image_to_mesh"
    pictures, meshes = (search.queries, search.gallery) if to_mesh else (search.gallery, search.queries)
    read = [[outputs[i] for entry in side for i in entry.inputs if i in outputs] for side in (pictures, meshes)]
    # Views, turned pictures, meshes with several vectors: no one inner product ranks them.
    if any(len(found) > len(weights) for side in read for found in side) or any(vectors.ndim > 1 for side in read for found in side for vectors in found):
        from cad_models.alignment.view_search import rank_by_views

        return rank_by_views(search, outputs, rule=rule, weights=weights, top_k=top_k, fitted=fitted, signatures=signatures)
    query_ids, queries = _combined(search.queries, outputs, rule, weights)
    gallery_ids, gallery = _combined(search.gallery, outputs, rule, weights)
    if not query_ids or not gallery_ids:
        return []
    scores, indices = best(torch.from_numpy(queries), torch.from_numpy(gallery), top_k)
    return [
        Answer(direction=search.direction, query=query, rank=place, answer=gallery_ids[index], score=score)
        for query, row, found in zip(query_ids, scores.tolist(), indices.tolist(), strict=True)
        for place, (score, index) in enumerate(zip(row, found, strict=True), start=1)
    ]


def _combined(
    entries: Sequence[Entry], outputs: Mapping[int, list[np.ndarray]], rule: str, weights: Sequence[float]
) -> tuple[list[str], np.ndarray]:
    ids, members = [], [[] for _ in weights]
    for entry in entries:
        views = [outputs[i][: len(weights)] for i in entry.inputs if i in outputs]
        if views:
            ids.append(entry.entry_id)
            for member, row in zip(members, combined_entry(views), strict=True):
                member.append(row)
    if not ids:
        return ids, np.zeros((0, 0), dtype=np.float32)
    return ids, combine_embeddings([np.stack(rows) for rows in members], rule=rule, weights=weights)


def combined_entry(views: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Each member's unit embedding, float32 [dim], of an object given by several files: that of its mean.

    Args:
        views: Of each file each member's unit embedding.
    """
    # A single view is unit already: normalising it again would only round.
    return [rows[0] if len(rows) == 1 else _unit(np.mean(rows, axis=0, dtype=np.float64)).astype(np.float32) for rows in zip(*views, strict=True)]


SUBMISSION_COLUMNS = ("id", "image_to_mesh_image", "image_to_mesh_mesh", "mesh_to_image_mesh", "mesh_to_image_image")


def submission(answers: Sequence[Answer]) -> list[list[str]]:
    """The source system's table: the two directions side by side, each sorted by query; ``id`` counts rows; answer cells are printed Python lists.

    The shorter direction ends in empty cells.
    """
    columns = []
    for direction in DIRECTIONS:
        found: dict[str, list[str]] = {}
        for answer in sorted((a for a in answers if a.direction == direction), key=lambda a: (a.query, a.rank)):
            found.setdefault(answer.query, []).append(answer.answer)
        columns.append([[query, str(best)] for query, best in found.items()])
    num_rows = max(map(len, columns))
    filled = [column + [["", ""]] * (num_rows - len(column)) for column in columns]
    return [list(SUBMISSION_COLUMNS), *[[str(i), *left, *right] for i, (left, right) in enumerate(zip(*filled, strict=True))]]
