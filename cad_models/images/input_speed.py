"""Pictures per second of the input pipeline, beside a plain torch DataLoader with the same torchvision transforms, in turn in one process.

    python -m cad_models.images.input_speed                      # 600 generated pictures of about 256 pixels
    python -m cad_models.images.input_speed --source photos/ --image-size 128 --preset ensemble_2 --num-workers 2

Three contestants make batches of normalised float32 tensors, shuffled, with random changes:

- ours: decoded pictures in memory, compiled changes in ``--num-workers`` threads, bytes normalised by the learner's first module;
- DataLoader: ``--num-workers`` processes that decode JPEG files with Pillow and apply torchvision's transforms (what the source system did);
- DataLoader, decoded: the same over pictures decoded once, held in memory as arrays of the size that is stored.

The decoding that ours did once is not counted; it is printed beside. Each round runs all three, so that a busy machine slows all alike.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image

from cad_models.images.augment import augmented
from cad_models.images.data import squeezed
from cad_models.images.model import IMAGENET_MEAN, IMAGENET_STD, InputNormaliser
from cad_models.images.recipe import AugmentConfig

_PRESETS = ("none", "baseline", "ensemble_1", "ensemble_2")


class EncodedPictures(torch.utils.data.Dataset):
    """JPEG files in memory, decoded at each access."""

    def __init__(self, files: list[bytes], transform: Callable) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(io.BytesIO(self.files[index])).convert("RGB"))


class DecodedPictures(torch.utils.data.Dataset):
    """Arrays in memory."""

    def __init__(self, pixels: np.ndarray, transform: Callable) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.fromarray(self.pixels[index]))


def torchvision_transform(preset: str, size: int) -> Callable:
    """The source system's transforms of a preset."""
    from torchvision import transforms as t

    first = {"baseline": t.RandomResizedCrop(size, (0.9, 1.0)), "ensemble_2": t.RandomResizedCrop(size, (0.8, 1.0))}.get(preset, t.Resize((size, size)))
    steps: list[Callable] = [first]
    if preset != "none":
        steps += [t.RandomHorizontalFlip(), t.RandomRotation(15)]
    if preset == "ensemble_2":
        steps += [t.ColorJitter(0.2, 0.2, 0.2), t.RandomAdjustSharpness(2.0, 0.3)]
    return t.Compose([*steps, t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def our_batches(pixels: np.ndarray, sizes: np.ndarray, image_size: int, preset: str, batch_size: int, num_threads: int, epoch: int) -> Iterator[torch.Tensor]:
    """An epoch as the training loop makes it: one generator a picture, bytes, then the learner's normalisation."""
    normaliser, config = InputNormaliser(IMAGENET_MEAN, IMAGENET_STD, with_high_pass=False), AugmentConfig(preset=preset)
    order = np.random.default_rng(epoch).permutation(len(pixels))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rngs = [np.random.default_rng((0, epoch, int(i))) for i in chosen]
        yield normaliser(torch.from_numpy(augmented(pixels[chosen], sizes[chosen], image_size, config, rngs, num_threads=num_threads)))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="builtin:600", help="folder of pictures, zip, CSV, or builtin:<N>")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--stored-size", type=int, default=160)
    parser.add_argument("--preset", choices=_PRESETS, default="ensemble_2")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=2, help="processes of the DataLoader, threads of ours")
    parser.add_argument("--num-rounds", type=int, default=5)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    files = _files(flags.source)
    started = time.perf_counter()
    decoded = [np.array(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    stored = np.stack([squeezed(pixels, flags.stored_size) for pixels in decoded])
    sizes = np.array([pixels.shape[1::-1] for pixels in decoded], dtype=np.int32)
    once = time.perf_counter() - started
    transform = torchvision_transform(flags.preset, flags.image_size)

    def loader(dataset: torch.utils.data.Dataset) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(dataset, flags.batch_size, shuffle=True, num_workers=flags.num_workers, persistent_workers=flags.num_workers > 0)

    encoded, held = loader(EncodedPictures(files, transform)), loader(DecodedPictures(stored, transform))
    contestants: dict[str, Callable[[int], Iterator[torch.Tensor]]] = {
        "ours": lambda epoch: our_batches(stored, sizes, flags.image_size, flags.preset, flags.batch_size, flags.num_workers, epoch),
        "DataLoader": lambda epoch: iter(encoded),
        "DataLoader, decoded": lambda epoch: iter(held),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(-1, flags.num_rounds):  # the first starts processes and compiles: not counted
        for name, batches in contestants.items():
            started = time.perf_counter()
            count = sum(len(batch) for batch in batches(round_number + 1))
            if round_number >= 0:
                rates[name].append(count / (time.perf_counter() - started))
    height, width = decoded[0].shape[:2]
    print(
        f"{len(files)} pictures (the first {width} x {height}), preset {flags.preset}, {flags.image_size} x {flags.image_size}, batches of {flags.batch_size}, "
        f"{flags.num_workers} workers, {flags.num_rounds} rounds; decoding once took {once:.1f} s"
    )
    for name, values in rates.items():
        ratios = np.array(rates["ours"]) / np.array(values)
        print(f"{name:20s} median {np.median(values):8.0f} pictures/s (rounds {min(values):.0f} to {max(values):.0f}); ours is {np.median(ratios):.2f} times as fast")


def _files(source: str) -> list[bytes]:
    from cad_models.images.patterns import encoded_picture
    from cad_models.images.sources import list_source, read_uri

    items = list_source(source).items
    if source.startswith("builtin:"):
        made = []
        for item in items:
            index, seed = map(int, item.uri.removeprefix("builtin:").split(":"))
            picture = Image.open(io.BytesIO(encoded_picture(index, seed)))
            sink = io.BytesIO()
            picture.resize((256, 256)).save(sink, format="JPEG", quality=90)
            made.append(sink.getvalue())
        return made
    return [read_uri(item.uri) for item in items]


if __name__ == "__main__":
    main()
