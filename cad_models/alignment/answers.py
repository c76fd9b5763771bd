"""Images and meshes as a user gives them -> embeddings of every member -> ranked answers, between images and meshes (mesh -> mesh: similar_meshes.py).

A gallery image stands for the object that it shows: ``bolt_0.png`` and ``bolt_1.png`` are two views of ``bolt``. An object given by several views is
the mean of their unit embeddings, normalised again, as in evaluation.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from cad_models.alignment.data import IMAGE_SUFFIXES, cad_points, read_uri
from cad_models.common.images import BadImage, decode_image
from cad_models.common.meshes import MESH_SUFFIXES, BadMesh, load_mesh
from cad_models.dataset import Folder
from cad_models.task import Answer, Columns, Entry, Input, Predictor, Reject, Requests, Search

if TYPE_CHECKING:
    from cad_models.checkpoint import Member

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

# Inputs of one forward pass on a GPU. On a CPU it is one: matrix products of another shape sum in another order, and an answer would depend on
# what else was asked.
_GPU_BATCH = 64


# --- listing ------------------------------------------------------------------------------------------------------------------------------
def list_requests(queries: str | Sequence[str], gallery: str | None, *, direction: str = "auto", measured: bool = False) -> Requests:
    """Searches between a folder of queries (or a list of files) and a folder of gallery files, both recursive.

    Images among the queries and meshes in the gallery make ``image_to_mesh``; meshes and images make ``mesh_to_image``; both of both make both. Meshes
    on both sides and no image on either make ``mesh_to_mesh``, which otherwise needs to be asked for.
    A folder with the source system's ``queries_image_to_mesh/``, ``gallery_mesh_for_image/``, ``queries_mesh_to_image/`` and
    ``gallery_image_for_mesh/`` needs no gallery.

    Args:
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
        if name == MESH_TO_MESH and measured:
            asked, among = ([replace(file, kind=MEASURED_MESH) for file in side] for side in (asked, among))
        if asked and among:
            objects = _view_groups(among) if gallery_kind == "image" else _single(among)
            searches.append(Search(direction=name, queries=listed.entries(_single(asked)), gallery=listed.entries(objects)))
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
    """Inputs numbered in the order of their first use; a file used twice is read once."""

    def __init__(self) -> None:
        self.inputs: list[Input] = []
        self.sides: tuple[list[_File], list[_File]] = ([], [])
        self._positions: dict[str, int] = {}

    def count(self, queries: list[_File], gallery: list[_File]) -> None:
        self.sides[0].extend(queries)
        self.sides[1].extend(gallery)

    def entries(self, groups: Mapping[str, list[_File]]) -> tuple[Entry, ...]:
        return tuple(Entry(entry_id=name, inputs=tuple(self._position(file) for file in files)) for name, files in sorted(groups.items()))

    def _position(self, file: _File) -> int:
        if file.uri not in self._positions:
            self._positions[file.uri] = len(self.inputs)
            self.inputs.append(Input(kind=file.kind, source=file.name, uri=file.uri))
        return self._positions[file.uri]


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

    num_points: tuple[int, ...]
    """Sizes of the sampled point clouds: a member's cloud is a prefix of one of them."""


def read_input(item: Input, settings: ReadSettings) -> Columns | Reject:
    """The arrays of one file: ``points/<n>`` float32 [n, 6] (with normals) of a mesh, with ``measures`` float32 [21] where they are wanted, ``image`` uint8
    [height, width, 3] of an image, and ``thumbnail``."""
    try:
        data = read_uri(item.uri)
        return _read_image(data) if item.kind == "image" else _read_mesh(data, item, settings)
    except BadMesh as error:
        return Reject(reason=error.reason, detail=error.detail)
    except BadImage as error:
        return Reject(reason="bad_image", detail=f"{error.reason}: {error.detail}")
    except OSError as error:
        return Reject(reason="unreadable", detail=str(error))


def _read_image(data: bytes) -> Columns:
    image = decode_image(data)
    return {"image": image, "thumbnail": _thumbnail(image)}


def _read_mesh(data: bytes, item: Input, settings: ReadSettings) -> Columns:
    from cad_models.common.rendering import Camera, render_views

    mesh = load_mesh(data, "." + item.uri.rpartition(".")[2].lower())
    sha256 = hashlib.sha256(data).hexdigest()
    columns = {f"points/{n}": np.concatenate(cad_points(mesh, sha256, n), axis=1) for n in settings.num_points}
    if item.kind == MEASURED_MESH:
        from cad_models.alignment.descriptors import measures

        columns["measures"] = measures(mesh)
    picture = render_views(mesh.vertices, mesh.faces, [Camera(azimuth_deg=30.0, elevation_deg=25.0)], size=_THUMBNAIL_SIZE)[0]
    return columns | {"thumbnail": _thumbnail(picture)}


def _thumbnail(image: np.ndarray) -> np.ndarray:
    import io

    from PIL import Image

    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=82)
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)


# --- members ------------------------------------------------------------------------------------------------------------------------------
class AlignmentPredictor(Predictor):
    """Embeds images and meshes with every member; members that share an encoder share its work.

    Raises:
        ValueError: an encoder is not there, or is not the one that a member was trained with.
    """

    def __init__(self, members: "Sequence[Member]", *, device: str = "cpu") -> None:
        from cad_models.common.encoders import build_encoder

        self._members, self._device = list(members), device
        self._encoders = {}
        for member in members:
            name, digest = member.signature["encoder"], member.signature["encoder_digest"]
            if name not in self._encoders:
                self._encoders[name] = build_encoder(name, device=device)
            encoder = self._encoders[name]
            if encoder.digest != digest:
                raise ValueError(
                    f"member {member.digest[:12]} was trained on embeddings of {name} with digest {digest}, the encoder here has digest "
                    f"{encoder.digest}: use the same weights, or train on embeddings of this encoder"
                )
        self.seconds = {"encode images": 0.0, "embed": 0.0}

    @property
    def settings(self) -> ReadSettings:
        return ReadSettings(
            num_points=tuple(sorted({member.signature["num_stored_points"] for member in self._members})),
        )

    def predict(self, batch: Sequence[Columns]) -> list[list[np.ndarray]]:
        """Unit embeddings; an input is an image or a mesh by the columns that it has. A measured mesh's measures come after the members' embeddings."""
        size = 1 if self._device == "cpu" else _GPU_BATCH
        outputs: list[list[np.ndarray]] = [[] for _ in batch]
        for kind, embed in (("image", self._embed_images), ("mesh", self._embed_meshes)):
            positions = [i for i, columns in enumerate(batch) if _holds(columns) == kind]
            for start in range(0, len(positions), size):
                chosen = positions[start : start + size]
                for rows in embed([batch[i] for i in chosen]):
                    for i, row in zip(chosen, rows, strict=True):
                        outputs[i].append(row)
        for columns, rows in zip(batch, outputs, strict=True):
            if "measures" in columns:
                rows.append(columns["measures"])
        return outputs

    def _embed_images(self, batch: list[Columns]) -> list[np.ndarray]:
        started = time.perf_counter()
        # Embeddings are stored as float16: rounding here too gives a query the very vector that evaluation would give it.
        frozen = {
            name: encoder.encode([columns["image"] for columns in batch]).astype(np.float16).astype(np.float32)
            for name, encoder in self._encoders.items()
        }
        encoded = time.perf_counter()
        rows = [self._run(member.learner.embed_images, frozen[member.signature["encoder"]]) for member in self._members]
        self.seconds["encode images"] += encoded - started
        self.seconds["embed"] += time.perf_counter() - encoded
        return rows

    def _embed_meshes(self, batch: list[Columns]) -> list[np.ndarray]:
        started = time.perf_counter()
        rows = []
        for member in self._members:
            signature = member.signature
            channels = 6 if "normals" in signature["channels"] else 3
            points = [columns[f"points/{signature['num_stored_points']}"][: signature["num_points"], :channels] for columns in batch]
            rows.append(self._run(member.learner.embed_cad, np.ascontiguousarray(np.stack(points))))
        self.seconds["embed"] += time.perf_counter() - started
        return rows

    def _run(self, function, array: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return function(torch.from_numpy(array).to(self._device)).float().cpu().numpy()


def _holds(columns: Columns) -> str:
    return "image" if "image" in columns else "mesh"


# --- answers ------------------------------------------------------------------------------------------------------------------------------
def combine_embeddings(
    members: Sequence[Float[np.ndarray, "*items _"]], *, rule: str = "concatenate", weights: Sequence[float] | None = None
) -> Float[np.ndarray, "*items _"]:
    """The members' unit embeddings of the same things -> one, whose inner products rank as the ensemble does.

    ``concatenate``: scaled by the square roots of the weights' shares and laid side by side, so that the inner product is the weighted mean of the
    members' cosines and one index serves. ``mean``: averaged and normalised again, as the source system does; that means something only for
    members that share their axes (as checkpoints of one run).

    Raises:
        ValueError: unknown rule, weights that are not positive or not one a member, or ``mean`` of members with unequal widths.
    """
    share = _shares(len(members), weights)
    if rule == "concatenate":
        return np.concatenate([m * np.float32(np.sqrt(w)) for m, w in zip(members, share, strict=True)], axis=-1)
    if rule != "mean":
        raise ValueError(f"--combine {rule!r} is none of concatenate, mean")
    widths = [m.shape[-1] for m in members]
    if len(set(widths)) > 1:
        raise ValueError(f"--combine mean needs members of one width, they have {', '.join(map(str, widths))}: use --combine concatenate")
    return _unit(sum(m * np.float32(w) for m, w in zip(members, share, strict=True)))


def _shares(count: int, weights: Sequence[float] | None) -> np.ndarray:
    given = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != (count,) or not np.all(np.isfinite(given)) or np.any(given <= 0):
        raise ValueError(f"weights must be {count} positive numbers, one a member, got {None if weights is None else list(weights)}")
    return given / given.sum()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))


def rank(search: Search, outputs: Mapping[int, list[np.ndarray]], *, rule: str, weights: Sequence[float], top_k: int) -> list[Answer]:
    """The ``top_k`` best gallery objects of every query, by inner product of the combined embeddings; exact, ties by id.

    Queries and objects none of whose files could be read are left out.
    """
    import torch

    from cad_models.common.retrieval import top_k as best

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
        views = [outputs[i] for i in entry.inputs if i in outputs]
        if views:
            ids.append(entry.entry_id)
            for member, rows in zip(members, zip(*views, strict=True), strict=True):
                # A single view is unit already: normalising it again would only round.
                member.append(rows[0] if len(rows) == 1 else _unit(np.mean(rows, axis=0, dtype=np.float64)).astype(np.float32))
    if not ids:
        return ids, np.zeros((0, 0), dtype=np.float32)
    return ids, combine_embeddings([np.stack(rows) for rows in members], rule=rule, weights=weights)


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
