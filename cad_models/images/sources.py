"""What a source of labelled pictures holds: a folder per class, a CSV beside pictures (with or without header), a zip of either, generated ones.

Only names and the CSV are read here, no picture. Rows without a picture and pictures without a row are told, each with its reason.
"""

import csv
import io
import os
import zipfile
from collections import Counter, defaultdict
from dataclasses import dataclass

from cad_models.dataset import Folder
from cad_models.images.patterns import class_of
from cad_models.sources import generated_set, visible
from cad_models.task import Listing, RawItem, Reject

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")

_ID_NAMES = ("id", "image", "image_id", "img", "file", "filename", "file_name", "path", "name")
_LABEL_NAMES = ("label", "class", "target", "category", "y", "answer", "solution")
_IN_ZIP = "!/"
_MAX_MEMBER_BYTES = 1 << 29  # no picture and no table of names is larger: a bomb is


class Source:
    """Files of a folder (path or URI) or of a zip file on a local disk."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.zipped = uri.lower().endswith(".zip")
        self._folder = Folder(os.path.abspath(os.path.expanduser(uri)) if self.zipped and "://" not in uri else uri)

    def names(self) -> list[str]:
        """Relative names, sorted, hidden ones left out.

        Raises:
            ValueError: it is not there, or cannot be listed.
        """
        if not self._folder.exists():
            raise ValueError(f"--source {self.uri}: there is no such {'zip file' if self.zipped else 'folder'}")
        try:
            if self.zipped:
                with zipfile.ZipFile(self._folder.uri) as archive:
                    names = sorted(info.filename for info in archive.infolist() if not info.is_dir())
            else:
                names = self._folder.files()
        except zipfile.BadZipFile as error:
            raise ValueError(f"--source {self.uri} is no zip file that can be read ({error})") from error
        except (NotADirectoryError, OSError) as error:
            raise ValueError(f"--source {self.uri} is not a folder that can be listed ({error})") from error
        return [name for name in visible(names) if "__MACOSX" not in name.split("/")]

    def path(self, name: str) -> str:
        """What `read_uri` reads the file by."""
        return f"{self._folder.uri}{_IN_ZIP}{name}" if self.zipped else self._folder.path(name)

    def text(self, name: str) -> str:
        """A text file. Raises ValueError when it is not UTF-8."""
        try:
            return read_uri(self.path(name)).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"--source {self.uri}: {name} is not UTF-8 text ({error})") from error


def read_uri(uri: str) -> bytes:
    """A file's bytes, by path, URI, or ``<file>.zip!/<member>``. Raises OSError."""
    archive, found, member = uri.partition(_IN_ZIP)
    if found and archive.lower().endswith(".zip"):
        try:
            with zipfile.ZipFile(archive) as opened:
                size = opened.getinfo(member).file_size  # reading stops there, whatever the packed bytes hold
                if size > _MAX_MEMBER_BYTES:
                    raise OSError(f"{member} in {archive} unpacks to {size:,} bytes, more than {_MAX_MEMBER_BYTES:,}")
                return opened.read(member)
        except (KeyError, zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError, NotImplementedError) as error:
            raise OSError(f"{member} cannot be read from {archive}: {error}") from error
    parent, _, name = uri.rpartition("/")
    return Folder(parent or "/").read_bytes(name)


def list_source(source: str) -> Listing:
    """The labelled pictures of ``builtin:<N>[:seed=<S>]``, of a folder or zip, or of a CSV file whose pictures lie in its folder.

    A folder with a CSV at its top that names its pictures is read by it; any other is a folder per class.

    Raises:
        ValueError: the source is not there, holds no picture, or more than one CSV would do.
    """
    if source.startswith("builtin:"):
        return _builtin(source)
    if source.lower().endswith(".csv"):
        parent, _, table = source.rpartition("/")
        inner = Source(parent or ".")
        names = inner.names()
        if table not in names:
            raise ValueError(f"--source {source}: there is no such file")
    else:
        inner, table = Source(source), ""
        names = inner.names()
    pictures = [name for name in names if _suffix(name) in IMAGE_SUFFIXES]
    if not pictures:
        raise ValueError(f"--source {source} holds no picture ({', '.join(IMAGE_SUFFIXES)}) among its {len(names)} files")
    tables = [table] if table else [name for name in names if "/" not in name and _suffix(name) == ".csv"]
    parsed, problems = [], []
    for name in tables:
        try:
            parsed.append(parse_table(inner.text(name), pictures, name=name))
        except ValueError as error:
            problems.append(str(error))
    if table and problems:
        raise ValueError(f"--source {source}: {problems[0]}")
    if len(parsed) > 1:
        choice = " or ".join(f"--source {source.rstrip('/')}/{t.name}" for t in parsed)
        raise ValueError(f"--source {source} holds {len(parsed)} CSV files that label its pictures: say which, {choice}")
    if parsed:
        return _by_table(inner, names, pictures, parsed[0])
    listing = _by_folder(inner, names, pictures)
    if not listing.items:
        told = f"; {'; '.join(problems)}" if problems else ""
        raise ValueError(f"--source {source}: no picture has a class: give a folder per class, or a CSV beside the pictures with their names and labels{told}")
    return listing


def _builtin(source: str) -> Listing:
    count, seed, _ = generated_set(source, of="pictures")
    return Listing(
        items=[
            RawItem(object_id=f"picture-{i:06d}", source=f"builtin:{i}:seed={seed}", uri=f"builtin:{i}:{seed}", label=class_of(i, seed))
            for i in range(count)
        ]
    )


def _by_folder(inner: Source, names: list[str], pictures: list[str]) -> Listing:
    """The class is the first folder below which the tree divides: a common top folder, as in most zips, is none."""
    depth = 0
    while len({name.split("/")[depth] for name in pictures if name.count("/") > depth}) == 1 and all(name.count("/") > depth + 1 for name in pictures):
        depth += 1
    stems = Counter(_stem(name) for name in pictures)
    items, rejects = [], []
    for name in pictures:
        parts = name.split("/")
        if len(parts) <= depth + 1:
            rejects.append((name, Reject(reason="no_label", detail="it lies beside the class folders, in none of them")))
            continue
        object_id = _stem(name) if stems[_stem(name)] == 1 else name
        items.append(RawItem(object_id=object_id, source=name, uri=inner.path(name), label=parts[depth]))
    return Listing(items=sorted(items, key=lambda item: item.object_id), rejects=rejects, num_ignored=len(names) - len(pictures))


# --- tables -------------------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Table:
    """A CSV that labels pictures."""

    name: str
    rows: list[tuple[int, str, str]]
    """Line number, id, label of each row, a first line that is no header included."""
    has_header: bool


def parse_table(text: str, pictures: list[str], *, name: str) -> Table:
    """Find the columns of ids and labels of a CSV, and whether its first line is a header.

    A first line whose id names a picture is a row. So is one that looks like the others (a number among numbers, a file name among file names), since its
    picture may be missing; what then remains is a header.

    Raises:
        ValueError: no column names pictures, or it is not clear which holds the labels.
    """
    try:
        dialect: type[csv.Dialect] | csv.Dialect = csv.Sniffer().sniff(text[:8192], delimiters=",;\t")
    except csv.Error:
        dialect = csv.excel
    reader = csv.reader(io.StringIO(text), dialect)
    lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    lines = [(number, row) for number, row in lines if any(row)]
    if not lines:
        raise ValueError(f"{name} is empty")
    width = max(len(row) for _, row in lines)
    lines = [(number, row + [""] * (width - len(row))) for number, row in lines]
    first, rest = lines[0][1], [row for _, row in lines[1:]] or [lines[0][1]]
    known = _Known(pictures)
    hits = [sum(known.has(row[c]) for row in rest) for c in range(width)]
    best = max(hits)
    # Several columns may name pictures (a source's own path beside ours): the one that does so most often, then the leftmost.
    ids = hits.index(best)
    if best == 0:
        raise ValueError(f"{name}: none of its columns names a picture here")
    has_header = not known.has(first[ids]) and _is_header(first, [row[ids] for row in rest], ids)
    labels = _label_column(first if has_header else [], width, ids, name)
    rows = [(number, row[ids], row[labels]) for number, row in lines[has_header:]]
    return Table(name=name, rows=rows, has_header=has_header)


def _is_header(first: list[str], ids: list[str], column: int) -> bool:
    cell = first[column]
    if cell.lower() in _ID_NAMES or any(c.lower() in _LABEL_NAMES for c in first):
        return True
    if ids and all(i.isdigit() for i in ids):
        return not cell.isdigit()
    if ids and all(_suffix(i) in IMAGE_SUFFIXES for i in ids):
        return _suffix(cell) not in IMAGE_SUFFIXES
    return False


def _label_column(header: list[str], width: int, ids: int, name: str) -> int:
    lowered = [cell.lower() for cell in header]
    for wanted in _LABEL_NAMES:
        if wanted in lowered and lowered.index(wanted) != ids:
            return lowered.index(wanted)
    if width == 2:
        return 1 - ids
    has = ", ".join(header) or f"no header and {width} columns"
    raise ValueError(f"{name}: which column holds the labels? name it label (it has {has})")


class _Known:
    """Pictures by every name that a table may give them."""

    def __init__(self, pictures: list[str]) -> None:
        self.by_name: dict[str, list[str]] = defaultdict(list)
        for name in pictures:
            base = name.rpartition("/")[2]
            for key in {name, _stem(name), base, _stem(base)}:
                self.by_name[key].append(name)

    def has(self, cell: str) -> bool:
        return cell.removeprefix("./") in self.by_name

    def find(self, cell: str, folder: str) -> str | None:
        """The picture of that name; where several folders have one, that of ``folder``."""
        found = self.by_name.get(cell.removeprefix("./"), [])
        if len(found) == 1:
            return found[0] if folder in ("", _parent(found[0])) or "/" in cell else None
        return next((name for name in found if _parent(name) == folder), None)


def _by_table(inner: Source, names: list[str], pictures: list[str], table: Table) -> Listing:
    known = _Known(pictures)
    folder = _table_folder(known, table)
    items, rejects, used = [], [], set()
    for line, cell, label in table.rows:
        where = f"{table.name}:{line}"
        if not cell:
            rejects.append((where, Reject(reason="bad_row", detail=f"line {line} of {table.name} has no id")))
            continue
        name = known.find(cell, folder)
        if name is None:
            rejects.append((where, Reject(reason="no_image", detail=f"no picture {cell!r} for line {line} of {table.name}")))
            continue
        used.add(name)
        if not label:
            rejects.append((name, Reject(reason="no_label", detail=f"line {line} of {table.name} has no label")))
            continue
        items.append(RawItem(object_id=_stem(cell) if _suffix(cell) in IMAGE_SUFFIXES else cell, source=name, uri=inner.path(name), label=label))
    # Pictures of other folders (a test set's) are none of the table's business.
    for name in pictures:
        if name not in used and (folder in ("", _parent(name))):
            rejects.append((name, Reject(reason="no_label", detail=f"{table.name} has no row for it")))
            used.add(name)
    conflicts = _conflicting(items)
    rejects += [(i.source, Reject(reason="bad_row", detail=f"{table.name} gives {i.object_id!r} several labels: {conflicts[i.object_id]}")) for i in items if i.object_id in conflicts]
    items = [item for item in items if item.object_id not in conflicts]
    ignored = len(names) - len(used) - 1
    return Listing(items=sorted(items, key=lambda item: item.object_id), rejects=rejects, num_ignored=max(0, ignored))


def _table_folder(known: _Known, table: Table) -> str:
    """The folder of the table's pictures, "" = any: where ids alone name pictures in several folders (train_images/0.jpg and test_images/0.jpg), the one
    with most of them; among equals, the one whose name begins most like the table's."""
    counts: Counter[str] = Counter()
    for _, cell, _ in table.rows:
        for folder in {_parent(name) for name in known.by_name.get(cell.removeprefix("./"), [])}:
            counts[folder] += 1
    if sum(counts.values()) <= len(table.rows) and len(counts) > 1:
        return ""  # no id is in two folders
    return max(sorted(counts), key=lambda folder: (counts[folder], len(os.path.commonprefix([folder.rpartition("/")[2], table.name]))))


def _conflicting(items: list[RawItem]) -> dict[str, str]:
    labels: dict[str, set[str]] = defaultdict(set)
    for item in items:
        labels[item.object_id].add(item.label)
    return {object_id: ", ".join(sorted(found)) for object_id, found in labels.items() if len(found) > 1}


def _suffix(name: str) -> str:
    dot = name.rfind(".")
    return name[dot:].lower() if dot > name.rfind("/") else ""


def _stem(name: str) -> str:
    return name[: len(name) - len(_suffix(name))]


def _parent(name: str) -> str:
    return name.rpartition("/")[0]
