"""Pictures as a user gives them -> every member's probabilities -> classes, in the form of a contest's ``predictions.csv``."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cad_models.common.images import BadImage
from cad_models.images.data import read_picture, rejected, squeezed, thumbnail
from cad_models.images.ensembling import combine
from cad_models.images.options import ImagesOptions
from cad_models.images.sources import IMAGE_SUFFIXES, Source
from cad_models.task import Answer, Columns, Entry, Input, Predictor, RawItem, Reject, Requests, Search

if TYPE_CHECKING:
    from cad_models.checkpoint import Member

DIRECTION = "classify"

_GPU_BATCH = 64
_CROP = 0.9  # side of a crop at test time, as a share of the picture's


def list_requests(queries: str | Sequence[str], *, direction: str = "auto") -> Requests:
    """One search: the pictures of a folder or zip (at any depth), or a list of files.

    Raises:
        ValueError: unknown direction, missing folder, or no picture.
    """
    if direction not in ("auto", DIRECTION):
        raise ValueError(f"--direction {direction!r} is none of auto, {DIRECTION}")
    if isinstance(queries, str):
        source = Source(queries)
        try:
            names = source.names()
        except ValueError as error:
            raise ValueError(str(error).replace("--source", "--queries")) from error
        files = [(name, source.path(name)) for name in names]
    else:
        files = [(path, path if "://" in path else Source(path.rpartition("/")[0] or ".").path(path.rpartition("/")[2])) for path in dict.fromkeys(queries)]
    pictures = [(name, uri) for name, uri in files if name.lower().endswith(IMAGE_SUFFIXES)]
    if not pictures:
        raise ValueError(f"--queries holds no picture ({', '.join(IMAGE_SUFFIXES)}) among its {len(files)} files")
    ids = _ids([name for name, _ in pictures])
    inputs = tuple(Input(kind="image", source=name, uri=uri) for name, uri in pictures)
    entries = tuple(Entry(entry_id=entry_id, inputs=(i,)) for i, entry_id in enumerate(ids))
    return Requests(inputs=inputs, searches=(Search(direction=DIRECTION, queries=entries),), num_ignored=len(files) - len(pictures))


def _ids(names: list[str]) -> list[str]:
    """Stems; as much of the path as is needed where stems are equal."""
    paths = [name.rpartition(".")[0] for name in names]
    stems = [path.rpartition("/")[2] for path in paths]
    equal_stems, equal_paths = Counter(stems), Counter(paths)
    return [
        stem if equal_stems[stem] == 1 else path if equal_paths[path] == 1 else name for name, path, stem in zip(names, paths, stems, strict=True)
    ]


def read_input(item: Input, settings: tuple[int, ...]) -> Columns | Reject:
    """``pixels/<size>`` uint8 [size, size, 3] for each stored size of ``settings``, as preparing makes them, and ``thumbnail``."""
    try:
        pixels, _ = read_picture(RawItem(object_id=item.source, source=item.source, uri=item.uri))
    except (BadImage, OSError) as error:
        return rejected(error)
    columns = {f"pixels/{size}": squeezed(pixels, size) for size in settings}
    return columns | {"thumbnail": np.frombuffer(thumbnail(pixels, 128), dtype=np.uint8)}


class ImagesPredictor(Predictor):
    """Classifiers of the same classes; each sees pictures at its own size and with its own channels.

    Raises:
        ValueError: members of other classes.
    """

    def __init__(self, members: "Sequence[Member]", *, device: str, options: ImagesOptions) -> None:
        check_classes([member.signature for member in members])
        self._members, self._device, self._tta = list(members), device, options.tta
        self.seconds = {"classify": 0.0}

    @property
    def settings(self) -> tuple[int, ...]:
        return tuple(sorted({member.signature["stored_size"] for member in self._members}))

    def predict(self, batch: Sequence[Columns]) -> list[list[np.ndarray]]:
        """Probabilities [classes] of every member."""
        started = time.perf_counter()
        size = 1 if self._device == "cpu" else _GPU_BATCH
        outputs: list[list[np.ndarray]] = [[] for _ in batch]
        for start in range(0, len(batch), size):
            chunk = batch[start : start + size]
            for member in self._members:
                pixels = np.stack([columns[f"pixels/{member.signature['stored_size']}"] for columns in chunk])
                for row, own in zip(member_probabilities(member, pixels, tta=self._tta, device=self._device), outputs[start : start + size], strict=True):
                    own.append(row)
        self.seconds["classify"] += time.perf_counter() - started
        return outputs


def check_classes(signatures: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The classes that all members answer with. Raises ValueError naming two that differ."""
    first = tuple(signatures[0]["class_names"])
    for i, signature in enumerate(signatures[1:], start=2):
        own = tuple(signature["class_names"])
        if own != first:
            only = sorted(set(own) ^ set(first))
            raise ValueError(f"members 1 and {i} were trained on other classes ({', '.join(only[:5])} in one of them only): they cannot answer together")
    return first


def member_probabilities(member: "Member", pixels: np.ndarray, *, tta: str, device: str) -> np.ndarray:
    """float32 [n, classes] of stored pictures uint8 [n, stored, stored, 3], the mean over the versions that ``tta`` names."""
    import torch

    size = member.signature["image_size"]
    versions = [torch.from_numpy(version) for version in tta_versions(pixels, size, tta)]
    with torch.inference_mode():
        total = sum(member.learner.probabilities(version.to(device)) for version in versions)
    return (total / len(versions)).float().cpu().numpy()


def tta_versions(pixels: np.ndarray, size: int, tta: str) -> list[np.ndarray]:
    """The versions of stored pictures that a member sees, each uint8 [n, 3, size, size]; see `ImagesOptions.tta`."""
    from cad_models.images.augment import FLIP, draw_parameters, resized, transformed
    from cad_models.images.recipe import AugmentConfig

    if tta == "none":
        return [resized(pixels, size)]
    whole = draw_parameters(AugmentConfig(preset="none").resolved(), 1, 1, np.random.default_rng(0))
    rest = 1 - _CROP
    corners = [(0.0, 0.0), (rest, 0.0), (0.0, rest), (rest, rest), (rest / 2, rest / 2)] if tta == "crops" else []
    boxes = [(0.0, 0.0, 1.0, 1.0), *((x, y, _CROP, _CROP) for x, y in corners)]
    versions = []
    for box in boxes:
        for mirrored in (0.0, 1.0):
            parameters = whole.copy()
            parameters[:4], parameters[FLIP] = box, mirrored
            versions.append(transformed(pixels, np.tile(parameters, (len(pixels), 1)), size))
    return versions


# --- answers ------------------------------------------------------------------------------------------------------------------------------
def rank(
    search: Search,
    outputs: Mapping[int, list[np.ndarray]],
    *,
    rule: str,
    weights: Sequence[float],
    top_k: int,
    fitted: Mapping[str, Any] | None,
    signatures: Sequence[Mapping[str, Any]],
) -> list[Answer]:
    """The ``top_k`` most probable classes of every picture that could be read; equal ones by name."""
    names = check_classes(signatures)
    queries = [entry for entry in search.queries if entry.inputs[0] in outputs]
    if not queries:
        return []
    members = [np.stack(rows) for rows in zip(*(outputs[entry.inputs[0]] for entry in queries), strict=True)]
    probabilities = combine(members, rule=rule, weights=weights, fitted=fitted)
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    return [
        Answer(direction=search.direction, query=entry.entry_id, rank=place, answer=names[c], score=float(row[c]))
        for entry, row, classes in zip(queries, probabilities, best, strict=True)
        for place, c in enumerate(classes, start=1)
    ]


def submission(answers: Sequence[Answer], options: ImagesOptions) -> list[list[str]]:
    """``id,label`` (and ``p_<class>``, empty for classes beyond the top k), one line a picture."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.query, []).append(answer)
    ids = list(found) if options.order == "file" else sorted(found, key=_number_first)
    names = sorted({answer.answer for answer in answers}) if options.probabilities else []
    rows = []
    for query in ids:
        of_class = {answer.answer: f"{answer.score:.6f}" for answer in found[query]}
        best = min(found[query], key=lambda answer: answer.rank)
        rows.append([query, best.answer, *(of_class.get(name, "") for name in names)])
    return [["id", "label", *(f"p_{name}" for name in names)], *rows]


def _number_first(query: str) -> tuple[int, int, str]:
    return (0, int(query), query) if query.isdecimal() else (1, 0, query)
