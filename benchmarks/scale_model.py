"""Row 11. Time and cost of a million objects on 1 to 64 GPUs, from a model; and a simulated scheduler: 1,000 parts on 64 nodes that may be lost.

    python -m benchmarks.scale_model > docs/scaling.md
    python -m benchmarks.scale_model --storage-gb-per-s 5 --utilization 0.3

No cluster was measured. Operations are counted by torch on the real modules; what is assumed (a share of a GPU's datasheet rate, links, prices)
stands in `Assumptions` and at the top of the page; every assumption is a flag.
"""

import dataclasses
import heapq
from dataclasses import dataclass

import numpy as np

MILLION = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the model rests on beside counted operations."""

    peak_tflops: float = 989.0
    """bfloat16 of one GPU, dense, from NVIDIA's H100 SXM datasheet."""
    utilization: float = 0.4
    """Share of it that training and encoding reach."""
    gpus_per_node: int = 8
    node_gb_per_s: float = 50.0
    """Of a node's network, each way (400 Gbit/s)."""
    link_gb_per_s: float = 300.0
    """Between GPUs of a node, each way."""
    cores_per_gpu: int = 12
    prepare_per_core_s: float = 9.0
    """Objects of 10,000 faces that a core prepares in a second (row 3)."""
    storage_gb_per_s: float = 1.0
    """That a node reads from object storage."""
    gpu_hour: float = 3.0
    """Price of a GPU with its share of the node for an hour, in dollars."""
    views: int = 24
    query_views: int = 6
    image_tflop: float = 0.7247
    """EVA-02-L/14 at 448 pixels, one image: 362.33 GMAC in timm's results (timm.fast.ai)."""
    image_width: int = 1024
    epochs: int = 50
    batch_size: int = 4096


def encoder_tflop(size: str, num_points: int) -> tuple[float, int]:
    """Teraflop of one cloud, forward, by torch's counter; and the encoder's parameters."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cad_models.alignment.model_config import point_encoder_config
    from cad_models.alignment.point_encoder import PointEncoder

    with torch.device("meta"):
        encoder = PointEncoder(point_encoder_config(size)).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            encoder(torch.empty(1, num_points, encoder.config.num_channels))
    return counter.get_total_flops() / 1e12, sum(p.numel() for p in encoder.parameters())


def hours(gpus: int, given: Assumptions, *, tflop: float, parameters: int, embed_dim: int = 1280) -> dict[str, float]:
    """Hours of every stage, and what a training step does, on ``gpus`` GPUs."""
    rate = gpus * given.peak_tflops * given.utilization
    nodes = -(-gpus // given.gpus_per_node)
    prepare_s = MILLION / (given.prepare_per_core_s * given.cores_per_gpu * gpus)
    embed_s = MILLION * (given.views + given.query_views) * given.image_tflop / rate
    images = given.batch_size * given.views
    # Forward and backward are three times the forward pass; every rank has the rows of its objects in the loss' three products.
    step_tflop = 3 * (given.batch_size * tflop + images * 2 * given.image_width * embed_dim / 1e12 + 2 * given.batch_size * images * embed_dim / 1e12)
    compute_s = step_tflop / rate
    # Ring all-reduce of float32 gradients; images are gathered, and their gradients reduced, once each.
    gradient_gb = 2 * 4 * parameters * (gpus - 1) / gpus / 1e9
    gather_gb = 2 * 4 * images * embed_dim * (gpus - 1) / gpus / 1e9
    speed = given.link_gb_per_s if nodes == 1 else given.node_gb_per_s
    step_s = compute_s + (gradient_gb + gather_gb) / speed
    object_mb = (10_000 * 6 * 4 + given.views * given.image_width * 2) / 1e6
    read_s = given.batch_size * object_mb / 1e3 / (nodes * given.storage_gb_per_s)
    train_s = given.epochs * MILLION / given.batch_size * max(step_s, read_s)
    total = (prepare_s + embed_s + train_s) / 3600
    return {
        "prepare": prepare_s / 3600, "embed": embed_s / 3600, "train": train_s / 3600, "total": total, "cost": total * gpus * given.gpu_hour,
        "compute_ms": 1e3 * compute_s, "collectives_gb": gradient_gb + gather_gb, "collectives_ms": 1e3 * (step_s - compute_s), "read_ms": 1e3 * read_s,
    }  # fmt: skip


def simulated_makespan(*, parts: int, nodes: int, losses_per_node_hour: float, part_s: float = 120.0, back_s: float = 180.0, seed: int = 0) -> float:
    """Seconds until all parts are done, over the least possible with no losses and equal loads: 1 is perfect.

    Each node takes the next part when it is free. Times are log-normal (sigma 0.5). A lost node loses the part it was at, which goes back to the
    queue, and is back after ``back_s``; finished parts are kept, as prepare and embed keep them.
    """
    rng = np.random.default_rng(seed)
    seconds = rng.lognormal(0.0, 0.5, parts)
    seconds *= part_s / seconds.mean()
    waiting = list(range(parts))[::-1]
    free = [(0.0, node) for node in range(nodes)]
    heapq.heapify(free)
    running: list[tuple[float, int, int, bool]] = []
    done, now = 0, 0.0
    while done < parts:
        while waiting and free and (not running or free[0][0] <= running[0][0]):
            start, node = heapq.heappop(free)
            part = waiting.pop()
            lost_after = rng.exponential(3600 / losses_per_node_hour) if losses_per_node_hour else np.inf
            lost = lost_after < seconds[part]
            heapq.heappush(running, (start + min(lost_after, seconds[part]), node, part, bool(lost)))
        now, node, part, lost = heapq.heappop(running)
        if lost:
            waiting.append(part)
        else:
            done += 1
        heapq.heappush(free, (now + (back_s if lost else 0.0), node))
    return now / (seconds.sum() / nodes)


def _bound(given: Assumptions, tflop: float, parameters: int) -> str:
    steps = {gpus: hours(gpus, given, tflop=tflop, parameters=parameters) for gpus in (1, 2, 4, 8, 16, 32, 64)}
    reading = [gpus for gpus, h in steps.items() if h["read_ms"] > h["compute_ms"] + h["collectives_ms"]]
    exchange = [gpus for gpus, h in steps.items() if h["collectives_ms"] > h["compute_ms"]]
    found = [
        f"reading bounds a step on {', '.join(map(str, reading))} GPUs; faster storage or disks of the nodes' own move that." if reading else "never by reading.",
        f"Collectives outweigh computing on {', '.join(map(str, exchange))} GPUs." if exchange else "Collectives stay below computing.",
        "At a constant batch their volume stays while computing shrinks with the GPUs, so more GPUs want a larger batch, or fewer views a step.",
    ]
    return " ".join(found)


def page(given: Assumptions) -> str:
    """The tables, as Markdown."""
    tflop, parameters = encoder_tflop("base", 10_000)
    lines = [
        "# A million objects: a model of time, cost and volume",
        "",
        "Made by `python -m benchmarks.scale_model`; **no cluster was measured**. Counted: one object through the base point encoder (10,000 points) takes",
        f"{1e3 * tflop:.0f} GFLOP forward, {parameters / 1e6:.0f} M parameters. Assumed: "
        + "; ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in dataclasses.asdict(given).items()) + ".",
        "",
        "| GPUs | prepare h | embed h | train h | all h | cost $ | step: compute ms | collectives GB a rank | collectives ms | reading ms | efficiency of a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        h = hours(gpus, given, tflop=tflop, parameters=parameters)
        efficiency = h["compute_ms"] / max(h["compute_ms"] + h["collectives_ms"], h["read_ms"])
        lines.append(
            f"| {gpus} | {h['prepare']:.2f} | {h['embed']:.2f} | {h['train']:.2f} | {h['total']:.1f} | {h['cost']:,.0f} | {h['compute_ms']:,.0f} | "
            f"{h['collectives_gb']:.2f} | {h['collectives_ms']:.0f} | {h['read_ms']:.0f} | {100 * efficiency:.0f} % |"
        )
    lines += [
        "",
        "Time = max(operations / (GPUs × peak × utilization) + volume / link, bytes / storage) a step; collectives do not overlap with computing here, though",
        "DistributedDataParallel overlaps most of the gradients'.",
        "",
        f"Where it stops scaling: {_bound(given, tflop, parameters)}",
        "",
        "## 1,000 parts on 64 nodes, simulated",
        "",
        "| losses a node and hour | time / the least possible (median of 20 seeds) |",
        "| --- | --- |",
    ]
    for losses in (0.0, 0.1, 1.0, 5.0):
        ratios = [simulated_makespan(parts=1_000, nodes=64, losses_per_node_hour=losses, seed=seed) for seed in range(20)]
        lines.append(f"| {losses:g} | {np.median(ratios):.2f} |")
    lines += ["", "Parts of two minutes on average (log-normal, sigma 0.5), three minutes until a lost node is back; a loss costs the part in hand, no more."]
    return "\n".join(lines)


if __name__ == "__main__":
    import tyro

    print(page(tyro.cli(Assumptions, description=__doc__)))
