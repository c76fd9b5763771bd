"""Row 6. The multi-positive contrastive loss, forward and backward in float32: N objects × 24 views of width 512, on one thread.

Rival: the loss as it stands in papers, with the whole matrix of logits and a row of targets for every object. Memory is the growth of the peak of a
process that does nothing else, so every step runs in a process of its own.
"""

import multiprocessing
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Comparison, Settings, compared, peak_memory_mb, product_flops, row_main, times_better
from cad_models.alignment.loss import MultiPositiveContrastiveLoss

NUM_VIEWS, WIDTH, TEMPERATURE = 24, 512, 0.07


def naive_loss(cad: Tensor, image: Tensor) -> Tensor:
    """Both directions with full logits: mean log-probability of each object's views among all views; cross-entropy of each view over the objects."""
    num_objects, num_views, _ = image.shape
    logits = cad @ image.flatten(0, 1).T / TEMPERATURE
    owner = torch.arange(num_objects).repeat_interleave(num_views)
    positive = (owner[None, :] == torch.arange(num_objects)[:, None]).float()
    cad_to_image = -(F.log_softmax(logits, dim=1) * positive / num_views).sum(dim=1).mean()
    image_to_cad = F.cross_entropy(logits.T, owner)
    return (cad_to_image + image_to_cad) / 2


def inputs(num_objects: int) -> tuple[Tensor, Tensor]:
    """Unit embeddings with gradient: [N, width] and [N, views, width]."""
    generator = torch.Generator().manual_seed(0)
    cad = F.normalize(torch.randn(num_objects, WIDTH, generator=generator), dim=-1)
    image = F.normalize(torch.randn(num_objects, NUM_VIEWS, WIDTH, generator=generator), dim=-1)
    return cad.requires_grad_(), image.requires_grad_()


def step(kind: str, cad: Tensor, image: Tensor) -> tuple[float, Tensor, Tensor]:
    """Loss and both gradients by ``ours`` or ``naive``."""
    cad.grad = image.grad = None
    if kind == "naive":
        loss = naive_loss(cad, image)
    else:
        mask = torch.ones(image.shape[:2], dtype=torch.bool)
        loss = MultiPositiveContrastiveLoss(TEMPERATURE)(cad, image, mask, torch.arange(len(cad)))
    loss.backward()
    return loss.item(), cad.grad, image.grad


def check_equal(num_objects: int) -> None:
    """Raises AssertionError unless loss and gradients agree."""
    cad, image = inputs(num_objects)
    loss, cad_grad, image_grad = step("ours", cad, image)
    expected, expected_cad, expected_image = step("naive", cad, image)
    assert abs(loss - expected) < 1e-5 * expected, (loss, expected)
    for found, wanted in ((cad_grad, expected_cad), (image_grad, expected_image)):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def _alone(kind: str, num_objects: int, sender) -> None:
    torch.set_num_threads(1)
    cad, image = inputs(num_objects)
    small = tuple(tensor.detach()[:32].clone().requires_grad_() for tensor in (cad, image))
    step(kind, *small)  # libraries' own memory
    before, started = peak_memory_mb(), time.process_time()
    step(kind, cad, image)
    sender.send((time.process_time() - started, peak_memory_mb() - before))


def alone(kind: str, num_objects: int) -> tuple[float, float]:
    """One step in a fresh process: CPU seconds, and growth of the peak of its memory, gradients included, in MB."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_alone, args=(kind, num_objects, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _free_memory_mb() -> float:
    import psutil

    return psutil.virtual_memory().available / 2**20


def run(settings: Settings) -> list[Comparison]:
    """Time and memory at both sizes."""
    torch.set_num_threads(1)
    check_equal(96)
    flops = product_flops()
    found = []
    sizes = settings.pick(((1024, 3, 2.0, 4.0), (4096, 1, 3.0, 10.0)), ((512, 1, 2.0, 4.0),))
    for num_objects, rounds, faster, smaller in sizes:
        what = f"contrastive loss, {num_objects:,} × {NUM_VIEWS} × {WIDTH}, forward + backward"
        needed_mb = 8 * 4 * num_objects**2 * NUM_VIEWS / 2**20  # eight whole matrices, more than naive holds at once
        if needed_mb > _free_memory_mb():
            found.append(Comparison(row=6, what=what, against="naive", unit="ms", ours=float("nan"), at_least=faster, note="naive needs more memory than is free"))
            continue
        seconds: dict[str, list[float]] = {"ours": [], "naive": []}
        memory: dict[str, list[float]] = {"ours": [], "naive": []}
        for number in range(rounds):
            for kind in list(seconds) if number % 2 == 0 else list(seconds)[::-1]:
                taken, grown = alone(kind, num_objects)
                seconds[kind].append(taken)
                memory[kind].append(grown)
        # One product forward, two backward.
        share = 3 * 2 * num_objects**2 * NUM_VIEWS * WIDTH / flops / statistics.median(seconds["ours"])
        limit = {"limit_share": share, "limit": "of three products at peak"}
        found.append(compared(6, what, "naive, full logits", seconds["ours"], seconds["naive"], at_least=faster, **limit))
        ratio, low, high = times_better(memory["ours"], memory["naive"])
        found.append(
            Comparison(
                row=6, what=f"memory of it, {num_objects:,} objects", against="naive, full logits", unit="MB", ours=statistics.median(memory["ours"]),
                theirs=statistics.median(memory["naive"]), ratio=ratio, low=low, high=high, num_rounds=rounds, at_least=smaller,
            )  # fmt: skip
        )
    return found


if __name__ == "__main__":
    row_main(run)
