"""What rooms share in reading ``--source``: the files of a folder, and the parts of a generated set."""

import re

from cad_models.folder import Folder

_BUILTIN = re.compile(r"builtin:(\d+)(?::seed=(\d+))?((?::[a-z]+=[a-z]+)*)")


def source_files(source: str) -> tuple[Folder, list[str]]:
    """The folder and the relative names of its files, sorted; hidden ones are left out. Raises ValueError when it is not there or cannot be listed."""
    folder = Folder(source)
    if not folder.exists():
        raise ValueError(f"--source {source}: there is no such folder")
    try:
        names = folder.files()
    except (NotADirectoryError, OSError) as error:
        raise ValueError(f"--source {source} is not a folder that can be listed ({error})") from error
    return folder, visible(names)


def visible(names: list[str]) -> list[str]:
    """The names of which no part is hidden."""
    return [name for name in names if not any(part.startswith(".") for part in name.split("/"))]


def generated_set(source: str, *, of: str, options: tuple[str, ...] = (), example: str = "") -> tuple[int, int, dict[str, str]]:
    """``builtin:<N>[:seed=<S>][:<option>=<value>]`` -> N, S (0 when not said) and the room's own options.

    Args:
        of: What N counts, for the message, as ``parts``.
        options: Names that the room knows.
        example: One more way to write it, for the message.

    Raises:
        ValueError: it is written otherwise, N is 0, or an option is not among ``options``.
    """
    match = _BUILTIN.fullmatch(source)
    given = dict(pair.split("=") for pair in match[3].split(":")[1:]) if match else {}
    if not match or int(match[1]) < 1 or given.keys() - set(options):
        more = f", or {example}" if example else ""
        raise ValueError(f"--source {source}: write builtin:<number of {of}>, as builtin:600, or builtin:600:seed=7{more}")
    return int(match[1]), int(match[2] or 0), given
