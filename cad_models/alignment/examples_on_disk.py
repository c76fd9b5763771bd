"""Example files to try the jobs with: generated parts as STL files, a picture of each, and the test split's query pictures and meshes of a dataset.

    python -m cad_models.alignment.examples_on_disk parts --count 240 --out demo/parts
    python -m cad_models.alignment.examples_on_disk pictures --count 100 --out demo/pictures
    python -m cad_models.alignment.examples_on_disk queries --dataset demo/dataset --parts demo/parts --out demo
"""

import argparse
import re
import shutil
from pathlib import Path

from cad_models.alignment.parts import generate_part
from cad_models.common.images import encode_png
from cad_models.common.rendering import query_cameras, render_views
from cad_models.common.stl_writer import binary_stl
from cad_models.dataset import DatasetFolder


def write_parts(out: Path, count: int, seed: int) -> None:
    """Write ``<out>/<family>/part-000000.stl`` and so on."""
    for index in range(count):
        part = generate_part(index, seed)
        # A family's name as a folder becomes the objects' label.
        folder = out / re.sub(r"\W+", "_", part.family)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{part.object_id}.stl").write_bytes(binary_stl(part.vertices, part.faces))


def write_pictures(out: Path, count: int, seed: int, size: int = 224) -> None:
    """Write ``<out>/part-000000.png`` and so on: the first parts of `write_parts`, each from a camera of its own that no gallery view has."""
    out.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        part = generate_part(index, seed)
        (picture,) = render_views(part.vertices, part.faces, query_cameras(1, index), size=size)
        (out / f"{part.object_id}.png").write_bytes(encode_png(picture))


def write_queries(out: Path, dataset: DatasetFolder, parts: Path) -> int:
    """Write ``<out>/queries`` (one picture of each test object, from a camera that no gallery view has, and its mesh) and ``<out>/gallery`` (the
    meshes and two other pictures of each); returns the number of test objects."""
    queries, gallery = out / "queries", out / "gallery"
    for folder in (queries, gallery):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    count = 0
    for index, part in enumerate(dataset.manifest().parts):
        if not part["splits"].get("test"):
            continue
        objects = dataset.read_part("objects", index, ["object_id", "source"])
        views = dataset.read_part("views", index, ["query_images"])
        for source, images in zip(objects.column("source").to_pylist(), views.column("query_images").to_pylist(), strict=True):
            mesh = parts / source
            (queries / f"{mesh.stem}.png").write_bytes(images[0])
            shutil.copy(mesh, queries / mesh.name)
            shutil.copy(mesh, gallery / mesh.name)
            for view, image in enumerate(images[1:3]):
                (gallery / f"{mesh.stem}_{view}.png").write_bytes(image)
            count += 1
    return count


def main() -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    parts = verbs.add_parser("parts", help="generated parts as STL files")
    pictures = verbs.add_parser("pictures", help="one picture of each of the first generated parts")
    for verb in (parts, pictures):
        verb.add_argument("--count", type=int, default=240)
        verb.add_argument("--seed", type=int, default=0)
    queries = verbs.add_parser("queries", help="query pictures and gallery meshes of a dataset's test split")
    queries.add_argument("--dataset", required=True)
    queries.add_argument("--parts", type=Path, required=True)
    for verb in (parts, pictures, queries):
        verb.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.verb == "parts":
        write_parts(arguments.out, arguments.count, arguments.seed)
        print(f"{arguments.count} parts in {arguments.out}")
    elif arguments.verb == "pictures":
        write_pictures(arguments.out, arguments.count, arguments.seed)
        print(f"{arguments.count} pictures in {arguments.out}")
    else:
        count = write_queries(arguments.out, DatasetFolder(arguments.dataset), arguments.parts)
        print(f"queries and gallery of {count} test objects in {arguments.out}")


if __name__ == "__main__":
    main()
