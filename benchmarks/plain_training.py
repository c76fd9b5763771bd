"""The alignment training as one would write it without this project, for row 1. Started by torchrun:

    python -m torch.distributed.run --nproc-per-node 2 -m benchmarks.plain_training --style research --dataset ds/ --out rates.json

research: as published training code does it. A .npz file an object, opened on each access by a DataLoader, points drawn anew; farthest points in a
loop and neighbours by topk on the fly; every rank computes the whole matrix of logits; AdamW as it comes; a Python loop for the average of the weights.
tuned: the same batches, model and loss as train.py, data in memory, collated ahead in a thread, fused AdamW: nothing but the mathematics.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_patches import plain_patches
from cad_models.alignment.recipe import RECIPE, AlignmentRecipe
from cad_models.config import replace_all
from cad_models.learner import ADAPT_BATCH

PUBLISHED = {
    "data.query_conditions": False, "data.augmented_views": 0, "data.augmented_share": 0.0, "data.views_per_step": 0,
    "model.size": "tiny", "model.residual_head": False, "loss.image_weight": 0.0,
}  # fmt: skip


def recipe(num_epochs: int, quick: bool) -> AlignmentRecipe:
    """The training that published code has, all stored views and the loss between images and meshes alone, of so many epochs; quick: of few points."""
    return replace_all(RECIPE, PUBLISHED | changes(num_epochs, quick))


def changes(num_epochs: int, quick: bool) -> dict[str, object]:
    """What train.py is told by flags, beside ``PUBLISHED``."""
    smaller = {"data.num_points": 1_024, "model.num_points": 256} if quick else {}
    return {"schedule.num_epochs": num_epochs, "schedule.num_warmup_epochs": 1.0, **smaller}


# --- as research code -----------------------------------------------------------------------------------------------------------------------
class NpzObjects(torch.utils.data.Dataset):
    """Objects from .npz files: random points, random scale and shift, all views."""

    def __init__(self, folder: Path, num_points: int, data):
        self.files, self.num_points, self.augment = sorted(folder.glob("*.npz")), num_points, data.augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        stored = np.load(self.files[i])
        chosen = np.random.choice(len(stored["points"]), self.num_points, replace=False)
        points, normals = stored["points"][chosen], stored["normals"][chosen]
        scale = np.exp(np.random.uniform(-1, 1, 3) * np.log(self.augment.max_scale))
        points = points * scale + np.random.uniform(-self.augment.max_shift, self.augment.max_shift, 3)
        normals = normals / scale
        normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
        return {
            "points": torch.from_numpy(np.concatenate([points, normals], axis=1)).float(),
            "views": torch.from_numpy(stored["embeddings"]).float(),
        }


class ResearchModel(nn.Module):
    """The learner's towers, patches on the fly, full logits on every rank."""

    def __init__(self, learner: nn.Module):
        super().__init__()
        self.learner = learner
        encoder = learner.point_encoder
        config = encoder.config
        encoder.group = lambda points: plain_patches(
            points, config.num_groups, config.group_size, first=torch.zeros(len(points), dtype=torch.long)
        )

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of the whole batch."""
        from torch.distributed.nn.functional import all_gather

        cad = self.learner.embed_cad(batch["points"])
        num_views = batch["views"].shape[1]
        image = self.learner.embed_images(batch["views"].flatten(0, 1)).unflatten(0, (-1, num_views))
        if dist.get_world_size() > 1:
            cad, image = torch.cat(all_gather(cad)), torch.cat(all_gather(image.contiguous()))
        logits = cad @ image.flatten(0, 1).T * self.learner.loss.scale
        owner = torch.arange(len(cad)).repeat_interleave(num_views)
        positive = (owner[None, :] == torch.arange(len(cad))[:, None]).float()
        cad_to_image = -(F.log_softmax(logits, dim=1) * positive / num_views).sum(dim=1).mean()
        return (cad_to_image + F.cross_entropy(logits.T, owner)) / 2


def research(chosen: AlignmentRecipe, dataset: Path) -> tuple[list[float], list[float]]:
    """Objects a second and mean loss of every epoch."""
    learner = _fresh_learner(chosen, str(dataset))
    model: nn.Module = ResearchModel(learner)
    if dist.get_world_size() > 1:
        model = nn.parallel.DistributedDataParallel(model)
    data = NpzObjects(dataset / "npz" / "train", chosen.model.num_read_points, chosen.data)
    sampler = torch.utils.data.DistributedSampler(data, shuffle=True, seed=chosen.seed, drop_last=True)
    share = chosen.batch_size // dist.get_world_size()
    loader = torch.utils.data.DataLoader(data, batch_size=share, sampler=sampler, num_workers=2, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.optim.lr, weight_decay=chosen.optim.weight_decay, betas=(0.9, 0.98))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates, losses = [], []
    for epoch in range(chosen.schedule.num_epochs):
        sampler.set_epoch(epoch)
        started, count, total = time.perf_counter(), 0, 0.0
        for batch in loader:
            loss = model(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.optim.grad_clip_norm)
            optimizer.step()
            with torch.no_grad():
                for name, p in model.named_parameters():
                    average[name].mul_(chosen.optim.ema_decay).add_(p, alpha=1 - chosen.optim.ema_decay)
            total += loss.item()
            count += 1
        rates.append(count * chosen.batch_size / (time.perf_counter() - started))
        losses.append(total / max(1, count))
    return rates, losses


# --- by hand --------------------------------------------------------------------------------------------------------------------------------
def tuned(chosen: AlignmentRecipe, dataset: Path) -> tuple[list[float], list[float]]:
    """Objects a second and mean loss of every epoch; the losses are train.py's."""
    from cad_models.common.ema import ExponentialMovingAverage
    from cad_models.common.schedule import lr_factor
    from cad_models.order import WholeOrder, object_rng
    from cad_models.tasks import TASKS
    from rayjobs.batching import prefetched
    from rayjobs.streams import ROW_KEY, SplitStream, concatenated, open_dataset

    rank, world_size, task = dist.get_rank(), dist.get_world_size(), TASKS["alignment"]
    learner = _fresh_learner(chosen, str(dataset))
    stream = SplitStream(dataset=open_dataset(str(dataset), task, chosen), recipe=chosen, split="train")
    rows = concatenated(list(stream.parts(0, 1)))
    first = {name: column[:ADAPT_BATCH] for name, column in rows.items() if name != ROW_KEY}
    learner.adapt(iter([task.collate(first, chosen, rngs=None)]))
    model = nn.parallel.DistributedDataParallel(learner) if world_size > 1 else learner
    optimizer = learner.optimizers(chosen)["model"]
    peaks = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average = ExponentialMovingAverage(learner, chosen.optim.ema_decay)
    order = WholeOrder(stream.num_rows, chosen.batch_size, chosen.seed)
    steps = order.num_steps
    learner.train()
    rates, losses = [], []
    for epoch in range(chosen.schedule.num_epochs):

        def batches(epoch=epoch):
            for step in range(steps):
                mine = order.rows(epoch, step, rank, world_size)
                columns = {name: column[mine] for name, column in rows.items()}
                keys = columns.pop(ROW_KEY)
                yield task.collate(columns, chosen, rngs=[object_rng(chosen.seed, epoch, int(key)) for key in keys])

        started, total = time.perf_counter(), 0.0
        for step, batch in enumerate(prefetched(batches())):
            schedule = chosen.schedule
            factor = lr_factor(
                epoch * steps + step, num_steps=schedule.num_epochs * steps, num_warmup_steps=round(schedule.num_warmup_epochs * steps),
                min_ratio=schedule.min_lr_ratio,
            )  # fmt: skip
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.zero_grad(set_to_none=True)
            loss = model(batch, "model")["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, chosen.optim.grad_clip_norm)
            optimizer.step()
            average.update(learner)
            total += loss.item()
        rates.append(steps * chosen.batch_size / (time.perf_counter() - started))
        losses.append(total / steps)
    return rates, losses


def _fresh_learner(chosen: AlignmentRecipe, dataset: str) -> nn.Module:
    from cad_models.tasks import TASKS
    from rayjobs.streams import open_dataset

    task = TASKS["alignment"]
    torch.manual_seed(chosen.seed)
    return task.learner(chosen, task.signature(chosen, open_dataset(dataset, task, chosen).signature_inputs))


def main() -> None:
    """Train and write the rates of every epoch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", choices=("research", "tuned"), required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rates, losses = (research if flags.style == "research" else tuned)(recipe(flags.epochs, flags.quick), flags.dataset)
    assert all(map(math.isfinite, losses)), losses
    if dist.get_rank() == 0:
        flags.out.write_text(json.dumps({"objects_per_s": rates, "loss": losses}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
