"""From files to answers: what ``infer.py`` asks of the histograms task."""

import io
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from cad_models.common.meshes import MESH_SUFFIXES, BadMesh, Mesh
from cad_models.dataset import DatasetError, Folder
from cad_models.histograms.data import read_shape, shape_columns, suffix_of
from cad_models.histograms.features import features
from cad_models.histograms.published import BadHistograms
from cad_models.histograms.recipe import HistogramData
from cad_models.task import Answer, Columns, Entry, Input, Predictor, Reject, Requests, Search

if TYPE_CHECKING:
    from cad_models.checkpoint import Member

DIRECTIONS = ("shape_to_class", "shape_to_shape")
_SUFFIXES = (*MESH_SUFFIXES, ".json")
_THUMBNAIL_SIZE = 128


# --- what is asked ------------------------------------------------------------------------------------------------------------------------
def list_requests(queries: str | Sequence[str], gallery: str | None, *, direction: str = "auto") -> Requests:
    """The class of every query, and with a gallery the shapes most like it. Queries and gallery are meshes or histogram files (JSON), at any depth.

    Raises:
        ValueError: an unknown direction, a folder that is not there or holds no shape.
    """
    if direction not in ("auto", *DIRECTIONS):
        raise ValueError(f"--direction {direction!r} is none of auto, {', '.join(DIRECTIONS)}")
    if direction == "shape_to_shape" and gallery is None:
        raise ValueError("--direction shape_to_shape needs --gallery: the shapes to choose from")
    inputs: dict[str, tuple[int, Input]] = {}
    query_entries, ignored = _entries(queries, "--queries", inputs)
    searches = [Search(direction="shape_to_class", queries=query_entries)] if direction != "shape_to_shape" else []
    if gallery is not None and direction != "shape_to_class":
        gallery_entries, more = _entries(gallery, "--gallery", inputs)
        ignored += more
        searches.append(Search(direction="shape_to_shape", queries=query_entries, gallery=gallery_entries))
    return Requests(inputs=tuple(item for _, item in inputs.values()), searches=tuple(searches), num_ignored=ignored)


def _entries(given: str | Sequence[str], flag: str, inputs: dict[str, tuple[int, Input]]) -> tuple[tuple[Entry, ...], int]:
    named = _files(given, flag)
    shapes = [(name, uri) for name, uri in named if suffix_of(name) in _SUFFIXES]
    if not shapes:
        raise ValueError(f"{flag} holds no shape ({', '.join(_SUFFIXES)}) among its {len(named)} files")
    stems = Counter(_stem(name) for name, _ in shapes)
    entries = []
    for name, uri in shapes:
        kind = "histograms" if suffix_of(name) == ".json" else "mesh"
        position, _ = inputs.setdefault(uri, (len(inputs), Input(kind=kind, source=name, uri=uri)))
        entries.append(Entry(entry_id=_stem(name) if stems[_stem(name)] == 1 else name, inputs=(position,)))
    return tuple(sorted(entries, key=lambda entry: entry.entry_id)), len(named) - len(shapes)


def _files(given: str | Sequence[str], flag: str) -> list[tuple[str, str]]:
    if not isinstance(given, str):
        return [(path, path if "://" in path else Folder(path).uri) for path in dict.fromkeys(given)]
    folder = Folder(given)
    if not folder.exists():
        raise ValueError(f"{flag} {given}: there is no such folder")
    if folder.is_local and suffix_of(given) in _SUFFIXES and not folder.names():
        return [(given, folder.uri)]
    return [(name, folder.path(name)) for name in folder.files() if not any(part.startswith(".") for part in name.split("/"))]


def _stem(name: str) -> str:
    base = name.rpartition("/")[2]
    return base.rpartition(".")[0] or base


# --- one file -----------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """What the members need of a file: each distinct value is computed once."""

    data: tuple[HistogramData, ...]
    """Which features of a shape."""


def read_input(item: Input, settings: ReadSettings) -> Columns | Reject:
    """``features/<i>`` float32 [width], one for each of the settings, and ``thumbnail``: a picture of a mesh, nothing for a histogram file."""
    try:
        shape, _ = read_shape(item.uri)
        columns: Columns = {}
        computed: dict[int, dict[str, np.ndarray]] = {}
        for number, data in enumerate(settings.data):
            if data.log2_chords not in computed:
                computed[data.log2_chords] = shape_columns(shape, data.log2_chords)
            stored = computed[data.log2_chords]
            columns[f"features/{number}"] = features(stored["histograms"][None], stored["distributions"][None], data)[0]
    except BadMesh as error:
        return Reject(reason=error.reason, detail=error.detail)
    except BadHistograms as error:
        return Reject(reason="malformed", detail=str(error))
    except DatasetError as error:  # a histogram file, and a member that wants what only meshes have
        return Reject(reason="failed", detail=str(error))
    except OSError as error:
        return Reject(reason="unreadable", detail=str(error))
    return columns | {"thumbnail": _thumbnail(shape) if isinstance(shape, Mesh) else np.zeros(0, dtype=np.uint8)}


def _thumbnail(mesh: Mesh) -> np.ndarray:
    from PIL import Image

    from cad_models.common.rendering import Camera, render_views

    camera = Camera(azimuth_deg=30.0, elevation_deg=25.0)
    picture = render_views(mesh.vertices, mesh.faces, [camera], size=_THUMBNAIL_SIZE)[0]
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=82)
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)


# --- members ------------------------------------------------------------------------------------------------------------------------------
class HistogramPredictor(Predictor):
    """Embeds shapes with every member, and compares them with the member's class centres.

    Raises:
        ValueError: members of different classes, or one that was saved before its first evaluation and so has no class centres.
    """

    def __init__(self, members: "Sequence[Member]", *, device: str = "cpu") -> None:
        self._members, self._device = list(members), device
        classes = [tuple(member.signature["class_names"]) for member in members]
        if len(set(classes)) > 1:
            raise ValueError(
                f"the members were trained on different classes: {', '.join(classes[0])} and {', '.join(next(c for c in classes if c != classes[0]))}"
            )
        for member in members:
            if not member.learner.centres.any():
                raise ValueError(f"member {member.digest[:12]} has no class centres: use a checkpoint that was evaluated, as best/nearest_centre")
        # The chords are the dataset's: a recipe for training may say something else.
        self._wanted = [replace(member.recipe.data, log2_chords=member.signature["log2_chords"]) for member in members]
        self._data = tuple(dict.fromkeys(self._wanted))
        self.seconds = {"embed": 0.0}

    @property
    def settings(self) -> ReadSettings:
        return ReadSettings(data=self._data)

    def predict(self, batch: Sequence[Columns]) -> list[list[np.ndarray]]:
        """For each input and member a unit embedding, followed by its cosines with the class centres."""
        import torch

        started = time.perf_counter()
        outputs: list[list[np.ndarray]] = []
        with torch.inference_mode():
            for columns in batch:  # one at a time: a row's bits must not depend on its neighbours
                rows = []
                for member, wanted in zip(self._members, self._wanted, strict=True):
                    given = np.array(columns[f"features/{self._data.index(wanted)}"])[None]
                    embedding = member.learner.embed(torch.from_numpy(given).to(self._device))
                    rows.append(torch.cat([embedding, embedding @ member.learner.centres.T], dim=1)[0].float().cpu().numpy())
                outputs.append(rows)
        self.seconds["embed"] += time.perf_counter() - started
        return outputs


# --- answers ------------------------------------------------------------------------------------------------------------------------------
def combine_embeddings(members: Sequence[Float[np.ndarray, "n _"]], weights: Sequence[float] | None = None) -> Float[np.ndarray, "n dim"]:
    """Unit embeddings side by side, scaled by the roots of the weights' shares: the cosine is the weighted mean of the members' cosines.

    Raises:
        ValueError: weights that are not positive, or not one a member.
    """
    return np.concatenate([m * np.float32(np.sqrt(w)) for m, w in zip(members, _shares(len(members), weights), strict=True)], axis=-1)


def _shares(count: int, weights: Sequence[float] | None) -> np.ndarray:
    given = np.ones(count) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != (count,) or not np.all(np.isfinite(given)) or np.any(given <= 0):
        raise ValueError(f"weights must be {count} positive numbers, one a member, got {None if weights is None else list(weights)}")
    return given / given.sum()


def rank(
    search: Search, outputs: Mapping[int, list[np.ndarray]], *, weights: Sequence[float], top_k: int, signatures: Sequence[Mapping[str, Any]]
) -> list[Answer]:
    """Of every query the most similar classes (score: the weighted mean of the members' cosines with the class centres) or gallery shapes (of their
    cosines with each other), best first; ties by class name or id. Shapes that could not be read are left out."""
    share = _shares(len(weights), weights)
    widths = [int(signature["embed_dim"]) for signature in signatures]
    names = list(signatures[0]["class_names"])
    query_ids, rows = _rows(search.queries, outputs)
    if not query_ids:
        return []
    if search.direction == "shape_to_class":
        ids = names
        scores = np.stack([sum(w * out[d:].astype(np.float64) for w, out, d in zip(share, row, widths, strict=True)) for row in rows])
    else:
        ids, gallery = _rows(search.gallery, outputs)
        if not ids:
            return []
        whole = [[row[m][:d] for row in rows] for m, d in enumerate(widths)], [[row[m][:d] for row in gallery] for m, d in enumerate(widths)]
        scores = sum(w * (np.stack(q).astype(np.float64) @ np.stack(g).astype(np.float64).T) for w, q, g in zip(share, *whole, strict=True))
    answers = []
    for query, row in zip(query_ids, scores, strict=True):
        # To seven digits: beyond, sums differ from machine to machine.
        order = np.argsort(-row.astype(np.float32), kind="stable")[:top_k]
        answers += [
            Answer(direction=search.direction, query=query, rank=place, answer=ids[i], score=float(row[i])) for place, i in enumerate(order, start=1)
        ]
    return answers


def _rows(entries: Sequence[Entry], outputs: Mapping[int, list[np.ndarray]]) -> tuple[list[str], list[list[np.ndarray]]]:
    found = [(entry.entry_id, outputs[entry.inputs[0]]) for entry in entries if entry.inputs[0] in outputs]
    return [name for name, _ in found], [rows for _, rows in found]


def submission(answers: Sequence[Answer]) -> list[list[str]]:
    """One row a query: its class, the cosine with the class's centre, and the gallery shapes most like it (a list with spaces between)."""
    table: dict[str, list[str]] = {}
    for answer in sorted(answers, key=lambda a: (a.query, a.direction, a.rank)):
        row = table.setdefault(answer.query, [answer.query, "", "", ""])
        if answer.direction == "shape_to_class" and answer.rank == 1:
            row[1:3] = [answer.answer, f"{answer.score:.6f}"]
        elif answer.direction == "shape_to_shape":
            row[3] = f"{row[3]} {answer.answer}".strip()
    return [["id", "class", "cosine", "most_similar"], *table.values()]
