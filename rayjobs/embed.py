"""Views -> frozen embeddings, Parquet beside the objects (Ray Data actor pool, GPUs when there are some).

    python rayjobs/embed.py --task alignment --dataset ds/                                    # hog_polar: no weights, quick on a CPU
    python rayjobs/embed.py --task alignment --dataset ds/ --encoder timm:eva02_large_patch14_448.mim_m38m_ft_in22k_in1k
    python rayjobs/embed.py --task alignment --dataset ds/ --encoder timm:vit_small_patch14_dinov2@weights.safetensors

Killed or stopped, the same command goes on from what is finished; after a change of the dataset it encodes only the changed parts.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from cad_models.task import EmbedColumn
from cad_models.tasks import TASKS
from rayjobs.cli import RecipeFlags, UsageError, run_job
from rayjobs.progress import Progress, duration
from rayjobs.resources import ScaleConfig

if TYPE_CHECKING:
    from cad_models.dataset import EmbeddingsManifest

LOCK_NAME = ".embed.lock"


@dataclass(frozen=True, kw_only=True)
class EmbedJob:
    """Views -> frozen embeddings."""

    task: str
    """Which room: see cad_models/tasks.py."""
    recipe: RecipeFlags
    smoke: bool = False
    """The task's smoke recipe: the same code in seconds on a CPU."""
    dataset: str = tyro.MISSING
    """The dataset folder (path or URI) that prepare.py made."""
    encoder: str = ""
    """hog_polar or hog (need no weights), timm:<model> or timm:<model>@<file.safetensors>; empty = the recipe's --data.encoder (auto: hog_polar)."""
    progress_file: str = ""
    """JSON-lines file for progress; empty = outputs/logs/embed-<name of the dataset>.jsonl."""
    scale: ScaleConfig = ScaleConfig(num_workers=0)


class EmbedWorker:
    """Embeds parts; one a process, which builds the encoder once."""

    def __init__(self, uri: str, kind: str, columns: Sequence[EmbedColumn], encoder: str, on_gpu: bool, num_threads: int) -> None:
        from cad_models.dataset import DatasetFolder

        self._dataset, self._kind, self._columns, self._name = DatasetFolder(uri), kind, columns, encoder
        self._on_gpu, self._num_threads = on_gpu, num_threads
        self._encoder: Any = None

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """``{index, part, recorded}`` -> ``{result, digest, width, error}``; an error is a message for the user, and the others are empty."""
        from rayjobs.embedding import embed_part, embedding_key, finished_embeddings

        part, recorded = json.loads(unit["part"]), json.loads(unit["recorded"])
        try:
            encoder = self._build()
            key = embedding_key(part, self._columns, encoder)
            result = finished_embeddings(self._dataset, self._kind, unit["index"], key, recorded)
            if result is None:
                result = embed_part(
                    self._dataset, self._kind, unit["index"], part, self._columns, encoder, num_threads=self._num_threads if self._on_gpu else 1
                )
        except (ValueError, FileNotFoundError) as error:  # DatasetError is a ValueError: a mistake that the user can mend, told without a traceback
            return {"result": "", "digest": "", "width": 0, "error": str(error)}
        return {"result": json.dumps(dataclasses.asdict(result)), "digest": encoder.digest, "width": encoder.width, "error": ""}

    def _build(self) -> Any:
        if self._encoder is None:
            from cad_models.common.encoders import build_encoder

            self._encoder = build_encoder(self._name, device="cuda" if self._on_gpu else "cpu")
        return self._encoder


def main(job: EmbedJob) -> int:
    """Check, encode part by part, and write the embeddings' manifest last."""
    from cad_models.common.encoders import build_encoder, encoder_folder
    from cad_models.dataset import DatasetError, DatasetFolder, EmbeddingsManifest
    from rayjobs.actor_pool import connect_stoppable, plan_pool, run_units
    from rayjobs.folder_lock import locked

    if job.scale.num_workers < 0:
        raise ValueError(f"--scale.num-workers {job.scale.num_workers} must be at least 0")
    task, dataset = TASKS[job.task], DatasetFolder(job.dataset)
    if not task.embed_columns:
        raise UsageError(f"--task {task.name} reads no frozen embeddings: nothing to embed, go on with train.py")
    manifest = dataset.manifest()
    if manifest.task != task.name:
        raise DatasetError(f"--dataset {job.dataset} was prepared for --task {manifest.task}, not for --task {task.name}")
    name = job.encoder or job.recipe.data.encoder
    name = "hog_polar" if name == "auto" else name
    if not name.startswith("timm:"):
        build_encoder(name)  # costs nothing without weights, and refuses a misspelt name before Ray starts
    kind = f"embeddings/{encoder_folder(name)}"
    start = time.monotonic()
    with locked(dataset.folder, f"{kind}/{LOCK_NAME}", "embed"):
        former = _former_manifest(dataset, encoder_folder(name))
        if former and (former.encoder != name or former.dataset_digest != manifest.digest):
            # From here on the folder is between two states, which no reader may take for embeddings of this dataset.
            dataset.folder.delete(f"{kind}/manifest.json")
        connect_stoppable()
        recorded = {part["key"]: part for part in former.parts if "key" in part} if former else {}
        former_keys = [part.get("key") for part in former.parts] if former else []
        units = [
            {
                "index": i,
                "part": json.dumps(part),
                "recorded": json.dumps(recorded.get(former_keys[i]) if i < len(former_keys) else None),
            }
            for i, part in enumerate(manifest.parts)
        ]
        pool = plan_pool(len(units), num_workers=job.scale.num_workers, cpus_per_worker=job.scale.cpus_per_worker, use_gpu=job.scale.use_gpu)
        file = Path(job.progress_file or f"outputs/logs/embed-{Path(job.dataset.rstrip('/')).name}.jsonl")
        progress = Progress("embed", manifest.num_objects, "objects", file=file)
        columns = (*task.embed_columns, *task.changed_embed_columns(job.recipe))
        arguments = (dataset.folder.uri, kind, columns, _absolute_file(name), pool.gpus > 0, job.scale.threads_per_worker or max(1, int(pool.cpus)))
        results: dict[int, dict[str, Any]] = {}
        identity: tuple[str, int] | None = None
        for row in run_units(units, EmbedWorker, arguments, pool, longest_unit_s=3600.0):
            if row["error"]:
                raise ValueError(row["error"])
            if identity not in (None, (row["digest"], row["width"])):
                raise ValueError(f"encoder {name} has digest {identity[0]} on one node and {row['digest']} on another: give all nodes the same weights and timm")
            identity = (row["digest"], row["width"])
            result = json.loads(row["result"])
            results[result["index"]] = result
            progress.add(result["part"]["num_rows"])
        progress.close()
        dataset.drop_parts(kind, len(units))
        assert identity is not None, "a dataset has at least one part"
        dataset.folder.write_json(
            f"{kind}/manifest.json",
            dataclasses.asdict(
                EmbeddingsManifest(
                    encoder=name,
                    encoder_digest=identity[0],
                    width=identity[1],
                    dataset_digest=manifest.digest,
                    parts=[results[i]["part"] for i in range(len(units))],
                )
            ),
        )
    _print_summary(dataset.folder.path(kind), name, identity[1], manifest.num_objects, list(results.values()), pool.gpus > 0, time.monotonic() - start)
    return 0


def _absolute_file(encoder: str) -> str:
    """The name with an absolute weights file: workers elsewhere have another working directory."""
    model, at, file = encoder.partition("@")
    return f"{model}@{os.path.abspath(os.path.expanduser(file))}" if at and "://" not in file else encoder


def _former_manifest(dataset: Any, encoder: str) -> "EmbeddingsManifest | None":
    from cad_models.dataset import DatasetError

    try:
        return dataset.embeddings_manifest(encoder)
    except (DatasetError, KeyError):
        return None  # none, or of another version: every part is looked at


def _print_summary(where: str, encoder: str, width: int, num_objects: int, results: list[dict[str, Any]], on_gpu: bool, seconds: float) -> None:
    num_images = sum(result["num_images"] for result in results)
    num_reused = sum(result["reused"] for result in results)
    lines = [
        ("embeddings", where),
        ("encoder", f"{encoder}, width {width}, on {'GPU' if on_gpu else 'CPU'}"),
        ("objects", f"{num_objects:,}"),
        ("parts", f"{num_reused:,} reused, {len(results) - num_reused:,} computed"),
        ("time", f"{duration(seconds)}, {num_images:,} images encoded, {num_images / max(seconds, 1e-9):.1f} images/s"),
    ]
    print("\n".join(f"{title:<10}  {text}" for title, text in lines), flush=True)


if __name__ == "__main__":
    run_job(EmbedJob, main)
