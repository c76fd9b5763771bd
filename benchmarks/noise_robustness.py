"""Macro-F1 of trained image classifiers on generated pictures with more and more salt-and-pepper noise.

    PYTHONPATH=. python benchmarks/noise_robustness.py --member outputs/runs/plain/best/macro_f1 --member outputs/runs/noisy/best/macro_f1

The pictures are clean ones of a seed that no training used, the same for all members; noise is added at the original size, before anything else.
"""

import argparse
from pathlib import Path

import numpy as np

from cad_models.checkpoint import load_member
from cad_models.images.answers import member_probabilities
from cad_models.images.data import squeezed
from cad_models.images.metrics import classification_metrics
from cad_models.images.patterns import class_of, generate_picture

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)


def noisy(pixels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A share of the pixels made black or white."""
    where = rng.random(pixels.shape[:2]) < share
    changed = pixels.copy()
    changed[where] = rng.integers(0, 2, (int(where.sum()), 1)) * 255
    return changed


def main() -> None:
    """Print a table: a row a member, a column a share of noise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--member", action="append", required=True, help="checkpoint folder; repeat to compare")
    parser.add_argument("--count", type=int, default=400, help="pictures")
    parser.add_argument("--seed", type=int, default=9001)
    flags = parser.parse_args()
    members = [load_member(Path(path)) for path in flags.member]
    pictures = [generate_picture(i, flags.seed, max_noise=0.0) for i in range(flags.count)]
    print("share of noise  " + "  ".join(f"{share:6.2f}" for share in SHARES))
    for path, member in zip(flags.member, members, strict=True):
        names = member.signature["class_names"]
        label = np.array([names.index(class_of(i, flags.seed)) for i in range(flags.count)])
        scores = []
        for share in SHARES:
            stored = np.stack(
                [squeezed(noisy(picture, share, np.random.default_rng((flags.seed, i))), member.signature["stored_size"]) for i, picture in enumerate(pictures)]
            )
            chunks = [member_probabilities(member, stored[start : start + 64], tta="none", device="cpu") for start in range(0, flags.count, 64)]
            scores.append(classification_metrics(np.concatenate(chunks), label)["macro_f1"])
        print("macro-F1        " + "  ".join(f"{score:6.3f}" for score in scores) + f"  {path}")


if __name__ == "__main__":
    main()
