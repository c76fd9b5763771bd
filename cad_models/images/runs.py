"""The source system's published runs by name, with their hyper-parameters: Adam at a constant 1e-3, batches of 64, 128 x 128 pixels, early stopping on the
validation macro-F1."""

from typing import Any

from cad_models.task import NamedRun

_COMMON: dict[str, Any] = {
    "batch_size": 64,
    "data.image_size": 128,
    "loss.class_weights": "none",
    "loss.label_smoothing": 0.0,
    "model.dropout": 0.3,
    "model.high_pass": False,
    "optim.lr": 1e-3,
    "optim.head_lr": 1e-3,
    "optim.weight_decay": 0.0,
    "optim.grad_clip_norm": 0.0,
    "optim.ema_decay": 0.0,
    "schedule.num_epochs": 300,
    "schedule.num_warmup_epochs": 0.0,
    "schedule.min_lr_ratio": 1.0,
}


def _run(model: str, preset: str, patience: int, seeds: tuple[int, ...], note: str) -> NamedRun:
    changes = {**_COMMON, "model.name": model, "data.augment.preset": preset, "schedule.patience_evals": patience}
    return NamedRun(changes=changes, seeds=seeds, note=note)


RUNS = {
    "simple_cnn_seed_105": _run("simple_cnn", "baseline", 20, (105,), "the source's first: one seed (published val F1 about 0.937 on 50,000 faces)"),
    "ensemble_1": _run("simple_cnn", "ensemble_1", 15, (76, 100, 123), "published val F1 0.9213 / 0.9149 / 0.9219 on 50,000 faces"),
    "ensemble_2": _run("simple_cnn", "ensemble_2", 50, (76, 100, 123), "published val F1 0.9376 / 0.9386 / 0.9428 on 50,000 faces"),
    "ensemble_3": _run("simple_cnn", "ensemble_2", 50, (76, 100, 101, 102, 103, 123), "ensemble_2 with three more seeds"),
    "simple_cnn_v2": _run(
        "simple_cnn_v2", "ensemble_2", 50, (100, 101, 102, 103, 104), "published val F1 0.9529 / 0.9514 / 0.9571 / 0.9535 / 0.9583 on 50,000 faces"
    ),
}
