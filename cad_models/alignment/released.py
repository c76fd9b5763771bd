"""Released ReConV2 checkpoints (ShapeLLM, arXiv:2402.17766): their names, their variants, and the command that imports them.

    python -m cad_models.alignment.released --checkpoint best_lvis.pth --output recon_base/

A released ``.pth`` is a pickle. This command is the only place that reads one, with ``torch.load(weights_only=True)``, which builds tensors and plain
containers and executes nothing. It writes a folder that everything else can read::

    <output>/
      pc_encoder.safetensors     the point encoder under this project's names
      encoder.json               its architecture, and where it came from

A training starts from it with ``--init-from <output> --model.size recon_base`` and so on; :func:`load_imported` gives the encoder itself.
"""

import hashlib
import json
import math
import pickle
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cad_models.alignment.model_config import PointEncoderConfig, released_config
from cad_models.alignment.point_encoder import PointEncoder
from cad_models.config import from_dict, to_dict
from cad_models.dataset import Folder
from cad_models.learner import check_fit

WEIGHTS = "pc_encoder.safetensors"
DESCRIPTION = "encoder.json"

# What no shape tells, by what a shape does tell. Attention heads by width; image and text queries by their sum.
_HEADS = {384: 6, 768: 12, 1024: 16, 1408: 16}
_QUERIES = {16: (13, 3), 11: (8, 3)}
# Patches: 64 of 1,024 points in the causal recipes, 512 of 10,000 in the others.
_NUM_GROUPS = {True: 64, False: 512}

# Released names (without the "module." of data-parallel training) and ours; what follows the prefix is equal on both
# sides.
_RELEASED_PREFIXES: dict[str, str] = {
    "model.global_query": "queries",
    "model.embed.first_conv.": "patch_embed.first.",
    "model.embed.second_conv.": "patch_embed.second.",
    "model.encoder.sos_pos": "start_position",
    "model.encoder.sos": "start_token",
    "model.encoder.blocks.local_blocks.": "local_blocks.",
    "model.encoder.blocks.global_blocks.": "cross_blocks.",
    "model.encoder.ln_f1.": "local_norm.",
    "model.encoder.ln_f2.": "query_norm.",
    "model.pos_embed.": "position.",
    "img_proj.": "image_proj.",
    "text_proj.": "text_proj.",
}
# Reconstruction (masked autoencoding) only, and a norm that the released code never applies.
_RELEASED_IGNORED: tuple[str, ...] = ("model.decoder.", "model.decoder_pos_embed.", "model.norm.")


def reconv2_name(released: str) -> str | None:
    """Our name of a tensor of a released checkpoint, or ``None`` when the encoder has no use for it.

    Raises ``ValueError`` for a name that no released checkpoint has.
    """
    name = released.removeprefix("module.")
    if name.startswith(_RELEASED_IGNORED):
        return None
    for prefix, ours in _RELEASED_PREFIXES.items():
        if name.startswith(prefix):
            return ours + name[len(prefix) :]
    raise ValueError(f"{released!r} is no tensor of a ReConV2 checkpoint: is this file one?")


def load_reconv2(encoder: PointEncoder, state: Mapping[str, Tensor]) -> None:
    """Loads the tensors of a released checkpoint (its ``base_model`` entry) into an encoder of ``mode="reconv2"``.

    Raises ``ValueError`` that names what is missing, unexpected or of another shape.
    """
    encoder.load_state_dict(converted(encoder, state))


def converted(encoder: PointEncoder, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state under our names, checked against ``encoder`` (which may live on the meta device).

    Raises ``ValueError`` that names what is missing, unexpected or of another shape.
    """
    ours = encoder.state_dict()
    renamed: dict[str, Tensor] = {}
    for released, tensor in state.items():
        name = reconv2_name(released)
        if name is not None:
            # A convolution of kernel size 1 over points is a linear layer.
            renamed[name] = tensor.squeeze(-1) if name.startswith("patch_embed.") and tensor.dim() == 3 else tensor
    check_fit("the checkpoint", renamed, ours, most=8)
    return {name: renamed[name] for name in ours}


def recognized_config(
    state: Mapping[str, Tensor], *, num_heads: int = 0, num_groups: int = 0, num_image_queries: int = 0
) -> PointEncoderConfig:
    """The architecture of a released state, read off its names and shapes.

    Three settings leave no trace there and follow the published recipes: heads from the width, patches from whether the checkpoint is causal, and
    how the queries divide into image and text queries from their number. The arguments say them for a checkpoint of another recipe (0 = as
    published).

    Raises ``ValueError`` for a state that is no ReConV2 checkpoint, and for one that needs an argument.
    """
    named: dict[str, tuple[int, ...]] = {}
    for released, tensor in state.items():
        named[released.removeprefix("module.")] = tuple(tensor.shape)
        reconv2_name(released)  # refuses a name of something else

    def shape(name: str) -> tuple[int, ...]:
        if name not in named:
            raise ValueError(f"the checkpoint has no {name}: it is not a ReConV2 point encoder, or not a whole one")
        return named[name]

    _, num_queries, width = shape("model.global_query")
    depth = 1 + max((int(m[1]) for m in (re.match(r"model\.encoder\.blocks\.local_blocks\.(\d+)\.", n) for n in named) if m), default=-1)
    if depth == 0:
        raise ValueError("the checkpoint has no model.encoder.blocks.local_blocks.*: it is not a ReConV2 point encoder, or not a whole one")
    convolutions = sorted(
        (int(m[1]), n) for n in named if (m := re.fullmatch(r"model\.embed\.first_conv\.(\d+)\.weight", n)) and len(named[n]) == 3
    )
    if not convolutions:
        raise ValueError("the checkpoint has no model.embed.first_conv.*.weight: it is not a ReConV2 point encoder, or not a whole one")
    columns = named[convolutions[0][1]][1]
    if columns not in (3, 6):
        raise ValueError(f"the checkpoint reads {columns} columns a point: a ReConV2 point encoder reads 3 (xyz) or 6 (xyz and colour)")
    causal = "model.encoder.sos" in named
    if not num_heads and width not in _HEADS:
        raise ValueError(f"no released recipe has the width {width}, and shapes do not tell the attention heads: give --num-heads")
    if not num_image_queries and num_queries not in _QUERIES:
        raise ValueError(
            f"no released recipe has {num_queries} queries, and shapes do not tell image from text queries: give --num-image-queries"
        )
    images = num_image_queries or _QUERIES[num_queries][0]
    if not 1 <= images <= num_queries:
        raise ValueError(f"--num-image-queries {images} must lie in 1 … {num_queries}, the queries of the checkpoint")
    mlp_width = shape("model.encoder.blocks.local_blocks.0.mlp.fc1.weight")[0]
    # The decoder rebuilds a patch point by point; a fine-tuned checkpoint may come without it.
    rebuilt = named.get("model.decoder.increase_dim.0.weight")
    return PointEncoderConfig(
        width=width,
        depth=depth,
        num_heads=num_heads or _HEADS[width],
        mlp_width=0 if mlp_width == 4 * width else mlp_width,
        num_groups=num_groups or _NUM_GROUPS[causal],
        group_size=rebuilt[0] // columns if rebuilt else 32,
        patch_widths=tuple(named[name][0] for _, name in convolutions),
        num_image_queries=images,
        num_text_queries=num_queries - images,
        embed_dim=shape("img_proj.weight")[0],
        channels="xyz" if columns == 3 else "xyz+color",
        centers="fps",
        drop_path=0.1,
        mode="reconv2",
        causal=causal,
        layer_scale=1e-5 if "model.encoder.blocks.local_blocks.0.ls1.gamma" in named else 0.0,
        # Training only: the causal recipes and the giant one keep the local blocks as they are.
        stop_gradient=causal or width == 1408,
    )


def variant_name(config: PointEncoderConfig) -> str:
    """The released name of an architecture, or ``""`` when it is none of them."""
    for name in ("small", "small_1k", "base", "base_1k", "large", "large_1k", "giant"):
        if released_config(name) == config:
            return name
    return ""


def read_released(path: Path) -> dict[str, Tensor]:
    """The model's tensors of a released ``.pth``, without the ``module.`` of data-parallel training.

    Raises ``ValueError`` for a file that is missing, holds anything but tensors and plain containers, or no model.
    """
    try:
        # Mapped, not read: the optimiser's state, twice the weights, stays on the disk.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise ValueError(f"--checkpoint {path}: there is no such file") from error
    except IsADirectoryError as error:
        raise ValueError(f"--checkpoint {path} is a folder: give the .pth file") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        detail = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"--checkpoint {path} is no checkpoint of tensors alone, and nothing else is ever unpickled ({detail[0]}): download the file again; files "
            "written by torch before 1.6 must be saved anew by a newer torch"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("base_model"), dict):
        content = content["base_model"]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = ", ".join(list(map(str, content))[:5]) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"--checkpoint {path} holds no model: expected an entry base_model with tensors, found {found or 'nothing'}")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """Converts a released ReConV2 checkpoint (.pth) into a folder of safetensors and JSON, from which trainings start."""

    checkpoint: Path
    """The released file, as best_lvis.pth."""
    output: Path
    """Folder to write; must not exist yet, or be empty."""
    num_heads: int = 0
    """Attention heads, for a width that no released recipe has; 0 = as published."""
    num_groups: int = 0
    """Patches of a cloud; 0 = as published, 64 for causal checkpoints (1k), 512 for the others."""
    num_image_queries: int = 0
    """Image queries among the global queries; 0 = as published."""


def import_released(job: ImportJob) -> PointEncoderConfig:
    """Do it, and return the architecture that was found. Nothing is left in ``job.output`` when it fails.

    Raises:
        ValueError: the file cannot be used, or the folder holds something.
    """
    if job.output.exists() and (not job.output.is_dir() or any(job.output.iterdir())):
        raise ValueError(f"--output {job.output} is not empty: choose a new folder, or delete it")
    state = read_released(job.checkpoint)
    config = recognized_config(state, num_heads=job.num_heads, num_groups=job.num_groups, num_image_queries=job.num_image_queries)
    with torch.device("meta"):  # shapes suffice: no second copy of up to 2 billion parameters
        encoder = PointEncoder(config)
    weights = converted(encoder, state)
    broken = [name for name, tensor in weights.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"--checkpoint {job.checkpoint} has values that are not finite in {', '.join(broken[:3])}: download it again")
    described = {
        "config": to_dict(config),
        "variant": variant_name(config),
        "source": job.checkpoint.name,
        "source_sha256": _sha256(job.checkpoint),
    }
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=job.output.parent, prefix=f".{job.output.name}-") as scratch:
        directory = Path(scratch) / "import"
        directory.mkdir()
        # Separate memory for each tensor: a released file may share storage between entries, which safetensors refuses.
        save_file({name: tensor.to(_stored(tensor)).clone().contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
        (directory / DESCRIPTION).write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
        # safetensors makes files that only their owner may read.
        (directory / WEIGHTS).chmod((directory / DESCRIPTION).stat().st_mode)
        if job.output.exists():
            job.output.rmdir()
        directory.rename(job.output)
    return config


def load_imported(folder: str) -> PointEncoder:
    """The point encoder (evaluation mode) in a folder that the command wrote, by path or URI.

    Raises ``ValueError`` for a folder that is none, or whose files do not go together.
    """
    source = Folder(folder)
    try:
        config = from_dict(PointEncoderConfig, source.read_json(DESCRIPTION)["config"])
    except (FileNotFoundError, KeyError) as error:
        raise ValueError(f"{folder} has no {DESCRIPTION}: import a checkpoint with python -m cad_models.alignment.released") from error
    with source.fetched("") as directory:
        try:
            weights = load_file(directory / WEIGHTS)
        except (FileNotFoundError, SafetensorError, OSError) as error:
            raise ValueError(f"{folder}: {WEIGHTS} is missing or broken ({error}): import the checkpoint again") from error
        with torch.device("meta"):
            encoder = PointEncoder(config)
        try:
            encoder.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder}: {WEIGHTS} does not fit {DESCRIPTION}: import the checkpoint again ({error})") from error
    return encoder.eval()


def _stored(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.is_floating_point() else tensor.dtype


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command; 0, or 1 with a message."""
    job = tyro.cli(ImportJob, args=arguments, description=ImportJob.__doc__)
    try:
        config = import_released(job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    name = variant_name(config)
    with torch.device("meta"):
        number = sum(math.prod(p.shape) for p in PointEncoder(config).parameters())
    print(
        f"{job.output}: ReConV2 {name or 'of an unpublished recipe'}, {number / 1e6:.1f} million parameters, {config.channels}, "
        f"{config.num_groups} patches of {config.group_size}"
    )
    if name:
        print(
            f"train from it with: --init-from {job.output} --model.size recon_{name} --model.channels {config.channels} "
            f"--model.embed-dim {config.embed_dim} --model.num-points {1_024 if config.causal else 10_000}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
