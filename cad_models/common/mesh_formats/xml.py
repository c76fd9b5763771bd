"""XML without its traps: entities are refused (they can expand without end, or name files), depth is limited, nothing is fetched."""

from collections.abc import Callable
from xml.parsers import expat

from cad_models.common.mesh_formats import BadMesh
from cad_models.common.mesh_formats.scene import MAX_DEPTH

_ENDED_EARLY = (expat.errors.codes[expat.errors.XML_ERROR_NO_ELEMENTS], expat.errors.codes[expat.errors.XML_ERROR_UNCLOSED_TOKEN])


def parse_xml(
    data: bytes,
    on_start: Callable[[str, dict[str, str]], object],
    on_end: Callable[[str], object],
    on_text: Callable[[str], object] | None = None,
) -> None:
    """Streams ``data`` to the given functions; names come without their namespaces.

    Raises:
        BadMesh: truncated, malformed (also for entities, and for nesting deeper than ``MAX_DEPTH``).
    """
    depth = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise BadMesh("malformed", f"XML elements are nested more than {MAX_DEPTH} deep")
        on_start(name.rpartition("}")[2], attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        on_end(name.rpartition("}")[2])

    def refuse_entity(name: str, *_) -> None:
        raise BadMesh("malformed", f"XML entity {str(name)[:40]!r} declared: entities are refused")

    parser = expat.ParserCreate(namespace_separator="}")
    parser.buffer_text = True
    parser.buffer_size = 1 << 16
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.EntityDeclHandler = refuse_entity
    if on_text is not None:
        parser.CharacterDataHandler = on_text
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        reason = "truncated" if error.code in _ENDED_EARLY else "malformed"
        raise BadMesh(reason, f"XML: {error}") from error
    except (LookupError, UnicodeError) as error:  # an encoding that does not exist, or that expat cannot use
        raise BadMesh("malformed", f"XML: {error}") from error
