"""The one training loop that every task runs: resume -> steps -> evaluate -> keep the best -> checkpoint. It knows no task by name.

It runs as Ray Train's ``train_loop_per_worker`` on any number of workers, or in this very process (``--scale.num-workers 0``), with the same numbers:
order, augmentation and dropout depend on seed, epoch, step and object, never on who computes them or on when it was interrupted.

A run's folder::

    recipe.json        what was asked, to refuse a changed recipe on resume
    metrics.jsonl      one line an evaluation: {"step", "epoch", "metrics"}; delivered to MLflow by the driver
    progress.json      where training is, written every few seconds
    last/              the checkpoint to resume from
    best/<name>/       the best by each of the task's metrics: weights without trainer state
    training_history.csv, training_history.png      the same as a table, and at the end as curves
    report/            what the task has to show of the best checkpoint: pictures, pages
    result.json        written last: its existence means that the run is complete
"""

import contextlib
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cad_models.checkpoint import load_member, read_weights, start_from, write_member
from cad_models.common.ema import ExponentialMovingAverage
from cad_models.common.memory import keep_freed_memory, release_freed_memory
from cad_models.common.schedule import lr_factor
from cad_models.config import Recipe, differences, from_dict, to_dict
from cad_models.dataset import Folder
from cad_models.learner import ADAPT_BATCH, Learner
from cad_models.order import object_rng
from cad_models.task import Columns, Task
from cad_models.tasks import TASKS
from rayjobs.batching import fitting_batch_size, prefetched, regrouped
from rayjobs.gradients import autocast_for, cached_backward, checked_micro_batch_size, same_everywhere, seed_of_step
from rayjobs.history import CSV_NAME, PNG_NAME, history_csv, history_png
from rayjobs.loop_state import LoopState
from rayjobs.predictions import final_figures, fitted_alone, predict_split, rank, split_metrics, world_size
from rayjobs.streams import ROW_KEY, SplitStream
from rayjobs.system_metrics import system_metrics
from rayjobs.telemetry import show

_STOP_POLL_STEPS = 8
_PROGRESS_S = 2.0
_LEAVING_POLL_S = 5.0


class TrainingDiverged(ValueError):
    """Loss or gradients stopped being finite."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """All that a worker needs; picklable."""

    task: str
    recipe: Recipe
    signature: dict[str, Any]
    train: SplitStream
    val: SplitStream
    test: SplitStream
    run_folder: str
    num_threads: int = 1
    checkpoint_every_steps: int = 0
    """Also save within an epoch, every so many steps; 0 = at the ends of epochs."""
    report: bool = True
    """Whether the task's report is made at the end."""

    @property
    def reference(self) -> SplitStream | None:
        """The split that the task's metrics are measured against, if it has one."""
        split = TASKS[self.task].reference_split
        return getattr(self, split) if split else None


def check_recipe(config: LoopConfig) -> None:
    """Note in the run's folder what was asked for. Raises ValueError, naming both sides, when the folder holds a run of something else."""
    folder, recipe = Folder(config.run_folder), config.recipe
    data = {name: config.signature.get(name) for name in ("dataset_digest", "encoder_digest")}
    asked = {"task": config.task, "recipe": to_dict(recipe), **data}
    if not folder.exists("recipe.json"):
        folder.write_json("recipe.json", asked)
        return
    before = folder.read_json("recipe.json")
    if before["task"] != asked["task"]:
        raise ValueError(f"{folder.uri} holds a run of task {before['task']}, not {asked['task']}: choose another --name")
    changes = differences(from_dict(type(recipe), before["recipe"]), recipe)
    changes += [f"{name.replace('_', ' ')}: {before.get(name)} -> {now}" for name, now in data.items() if before.get(name) != now]
    if changes:
        raise ValueError(
            f"{folder.uri} holds a run of another recipe ({'; '.join(changes)}): choose another --name, or delete that folder to start over"
        )


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """What Ray Train starts in every worker; ``config["loop"]`` is a `LoopConfig`."""
    import ray.train
    import ray.train.torch

    loop: LoopConfig = config["loop"]
    folder = Folder(loop.run_folder)
    if folder.exists("error.json"):  # restarted, though trying again cannot help
        return
    device = ray.train.torch.get_device()

    def report(metrics: dict[str, float]) -> None:
        ray.train.report(metrics)

    def node_is_leaving() -> bool:
        return ray.train.get_preemption_info() is not None

    try:
        Training(loop, device=device, report=report, node_is_leaving=node_is_leaving).run()
    except ValueError as error:
        # When another worker is lost, Ray Train takes the process group from under this one's feet, and torch calls that a ValueError too.
        if ray.train.get_context().get_world_size() > 1 and not dist.is_initialized():
            raise
        # A user's mistake or diverged numbers: trying again cannot help, so it must not look like a lost worker to Ray Train. A worker that is
        # alone with it (one broken part file) lets the others go, who would wait for it until their timeout.
        folder.write_json("error.json", {"error": str(error)})
        if dist.is_initialized():
            dist.destroy_process_group()


class Training:
    """One run, as one worker sees it.

    Args:
        report: Called with the metrics after each evaluation, on every worker.
        node_is_leaving: Whether the cluster has announced that a worker's node will go (a spot machine's notice): asked now and then, on every worker
            alike, for they wait for each other in it. A checkpoint is saved at once, and training goes on until the node is gone.
    """

    def __init__(
        self,
        config: LoopConfig,
        *,
        device: torch.device | str = "cpu",
        report: Callable[[dict[str, float]], None] = lambda metrics: None,
        node_is_leaving: Callable[[], bool] = lambda: False,
    ):
        self.config, self.device, self.report = config, torch.device(device), report
        self.node_is_leaving, self._asked, self._saved_for_leaving = node_is_leaving, time.monotonic(), False
        self.task: Task = TASKS[config.task]
        self.recipe = config.recipe
        self.folder = Folder(config.run_folder)
        self.rank, self.world_size = rank(), world_size()
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads)
        torch.manual_seed(self.recipe.seed)
        self.learner: Learner = self.task.learner(self.recipe, config.signature).to(self.device)
        self.micro_batch_size = checked_micro_batch_size(self.learner, self.recipe.optim.micro_batch_size)
        self.optimizers = self.learner.optimizers(self.recipe)
        self.peak_lrs = {turn: [group["lr"] for group in opt.param_groups] for turn, opt in self.optimizers.items()}
        decay = self.recipe.optim.ema_decay
        self.ema = ExponentialMovingAverage(self.learner, decay) if decay > 0 else None
        self.autocast = autocast_for(self.recipe.precision, self.device)
        self.state = LoopState()
        self.batch_size = fitting_batch_size(self.recipe, config.train, self.world_size)
        # NCCL moves no CPU objects; a second, gloo group carries predictions and the stop signal.
        self.cpu_group = dist.new_group(backend="gloo") if self.world_size > 1 else None

    def run(self) -> None:
        """Train to the end, or to a stop request; resumes by itself."""
        if self.folder.exists("result.json"):
            return
        keep_freed_memory()
        self._resume()
        model: nn.Module = self.learner
        if self.world_size > 1 and self.micro_batch_size:
            same_everywhere(self.learner.state_dict().values())
        elif self.world_size > 1:
            model = nn.parallel.DistributedDataParallel(self.learner, device_ids=[self.device] if self.device.type == "cuda" else None)
        schedule = self.recipe.schedule
        while self.state.epoch < schedule.num_epochs and not self._out_of_patience():
            if not self._epoch(model):
                self._save_last()
                self.report({"stopped": 1.0, "epoch": float(self.state.epoch)})
                return
            self.state.epoch += 1
            self.state.step = 0
            if self.state.epoch % schedule.eval_every_epochs == 0 or self.state.epoch == schedule.num_epochs:
                self._evaluate_and_keep()
            else:
                self._save_last()
        self._finish()

    # one epoch ----------------------------------------------------------------------------------------------------------------------------
    def _epoch(self, model: nn.Module) -> bool:
        """One pass over the training split from where the state stands; False = stopped on request."""
        state, recipe, config = self.state, self.recipe, self.config
        steps = config.train.num_steps(state.epoch, self.batch_size, self.world_size)
        if steps == 0:
            raise ValueError(
                f"--batch-size {self.batch_size} leaves no step in an epoch of the {config.train.num_rows} objects of the train split "
                f"({sum(map(bool, config.train.part_rows))} parts) on {self.world_size} workers: use a smaller one, fewer workers, or hold the "
                "split in memory (--scale.cache-gb)"
            )
        warmup_steps = round(recipe.schedule.num_warmup_epochs * steps)
        num_steps = recipe.schedule.num_epochs * steps
        self.learner.train()
        started, first_step, shown = time.monotonic(), state.step, -math.inf
        batches = config.train.batches(state.epoch, self.batch_size, self.rank, self.world_size, first_step=state.step)
        for batch in prefetched(self._collated(batches)):
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            # Dropout must not depend on what was drawn before: a resumed run draws the same. Workers differ, as their objects do.
            seed_of_step(recipe.seed, state.global_step, self.rank)
            # Streamed epochs may differ by a few steps: the schedule goes by the share of the epochs that is done.
            position = state.epoch * steps + state.step
            factor = lr_factor(position, num_steps=num_steps, num_warmup_steps=warmup_steps, min_ratio=recipe.schedule.min_lr_ratio)
            scalars: dict[str, Tensor] = {}
            for turn in self.learner.turns:
                scalars |= self._step(model, batch, turn, factor)
            state.add(scalars)
            if self.ema is not None:
                self.ema.update(self.learner)
            state.step += 1
            state.global_step += 1
            if self.rank == 0 and time.monotonic() - shown > _PROGRESS_S:
                shown = time.monotonic()
                rate = (state.step - first_step) * self.batch_size / max(1e-9, shown - started)
                self._write_progress(steps, rate)
            if state.global_step % _STOP_POLL_STEPS == 0 and state.step < steps:
                if self._stop_requested():
                    return False
                self._save_if_a_node_leaves()
            if config.checkpoint_every_steps and state.global_step % config.checkpoint_every_steps == 0 and state.step < steps:
                self._save_last()
        state.objects_per_s = (state.step - first_step) * self.batch_size / max(1e-9, time.monotonic() - started)
        return not self._stop_requested() or state.epoch + 1 == recipe.schedule.num_epochs

    def _collated(self, batches: Iterator[Columns]) -> Iterator[dict[str, Tensor]]:
        epoch, seed = self.state.epoch, self.recipe.seed
        for columns in batches:
            keys = columns.pop(ROW_KEY)
            yield self.task.collate(columns, self.recipe, rngs=[object_rng(seed, epoch, int(key)) for key in keys])

    def _step(self, model: nn.Module, batch: dict[str, Tensor], turn: str, factor: float) -> dict[str, Tensor]:
        optimizer = self.optimizers[turn]
        for group, peak in zip(optimizer.param_groups, self.peak_lrs[turn], strict=True):
            group["lr"] = peak * factor
        optimizer.zero_grad(set_to_none=True)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.micro_batch_size:
            seed = functools.partial(seed_of_step, self.recipe.seed, self.state.global_step, self.rank)
            scalars = cached_backward(self.learner, batch, self.micro_batch_size, seed=seed, autocast=self.autocast)
        else:
            with self.autocast():
                scalars = model(batch, turn)
            scalars["loss"].backward()
        limit = self.recipe.optim.grad_clip_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)
        # Reading the norm waits for a GPU: there every 16th step is soon enough to catch NaN.
        if self.device.type == "cpu" or self.state.global_step % 16 == 0:
            self._check_finite({"grad_norm": float(norm), "loss": float(scalars["loss"].detach())})
        optimizer.step()
        prefix = "" if len(self.learner.turns) == 1 else f"{turn}/"
        return {f"{prefix}{name}": value.detach() for name, value in scalars.items()} | {f"{prefix}grad_norm": norm.detach()}

    def _check_finite(self, values: dict[str, float]) -> None:
        if all(map(math.isfinite, values.values())):
            return
        found = ", ".join(f"{name} {value}" for name, value in values.items() if not math.isfinite(value))
        raise TrainingDiverged(
            f"training diverged at step {self.state.global_step} (epoch {self.state.epoch + 1}): {found}; lower --optim.lr "
            f"({self.recipe.optim.lr:g}) or --optim.head-lr ({self.recipe.optim.head_lr:g}), or lengthen --schedule.num-warmup-epochs"
        )

    # evaluation ---------------------------------------------------------------------------------------------------------------------------
    def _evaluate_and_keep(self) -> None:
        state = self.state
        with self._averaged():
            started = time.monotonic()
            config = self.config
            metrics = split_metrics(
                self.task, self.recipe, self.learner, config.val, self.device, "val", reference=config.reference, group=self.cpu_group
            )
            release_freed_memory()  # training goes on with as much as it had
            metrics = self._shared(metrics)
            metrics |= {f"train/{name}": value for name, value in self._mean_scalars().items()}
            self._check_finite({name: value for name, value in metrics.items() if name.endswith(("loss", "grad_norm"))})
            metrics |= {"train/objects_per_s": state.objects_per_s, "val/seconds": time.monotonic() - started}
            metrics |= {f"train/lr_{turn}": opt.param_groups[0]["lr"] for turn, opt in self.optimizers.items()}
            metrics |= system_metrics()
            state.reset_sums()
            improved = self._improved(metrics)
            state.evals_without_better = 0 if self._score_folder in improved else state.evals_without_better + 1
            metrics |= {f"best/{self.task.best_metrics[name]}": value for name, value in state.best.items()}
            metrics = {name: float(value) for name, value in metrics.items()}
            state.history.append({"step": state.global_step, "epoch": state.epoch, "metrics": metrics})
            if self.rank == 0:
                for name in improved:
                    self._publish(f"best/{name}", metrics)
        # The best come before the checkpoint: killed in between, the epoch is repeated and writes the very same best again.
        self._save_last(metrics)
        if self.rank == 0:
            self._write_history()
            self._write_progress(0, state.objects_per_s)
            self._show(metrics)
        self.report({**metrics, "epoch": float(state.epoch)})

    def _improved(self, metrics: dict[str, float]) -> list[str]:
        improved = []
        for name, metric in self.task.best_metrics.items():
            value, best = metrics[metric], self.state.best.get(name)
            # All of a task's best metrics are better in the score's direction.
            if self.task.score.better(value, best):
                self.state.best[name] = value
                improved.append(name)
        return improved

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the learner has the averaged weights: those that are evaluated and kept."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied_to(self.learner)

    @property
    def _score_folder(self) -> str:
        return next(name for name, metric in self.task.best_metrics.items() if metric == self.task.score.name)

    def _out_of_patience(self) -> bool:
        patience = self.recipe.schedule.patience_evals
        return 0 < patience <= self.state.evals_without_better

    def _write_history(self) -> None:
        self.folder.write_bytes("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in self.state.history).encode())
        self.folder.write_bytes(CSV_NAME, history_csv(self.task, self.state.history))

    def _finish(self) -> None:
        if self._score_folder not in self.state.best:
            raise ValueError(f"no evaluation gave a finite {self.task.score.name}: there is no best checkpoint")
        self._barrier()
        with self.folder.fetched(f"best/{self._score_folder}") as directory:
            best = load_member(directory, device=str(self.device))
        reported = self.task.report_splits if self.config.report else ()
        predicted = {
            name: predict_split(self.task, self.recipe, best.learner, getattr(self.config, name), self.device, more=True, group=self.cpu_group)
            for name in dict.fromkeys(("val", "test", *reported, self.task.reference_split))
            if name and getattr(self.config, name).num_rows
        }
        if self.rank == 0:
            reference = predicted.get(self.task.reference_split)
            test = final_figures(self.task, fitted_alone(self.task, predicted), reference, self.config.signature) if "test" in predicted else {}
            metrics = {**best.metrics, **test}
            self._write_history()  # a run that was killed just before its last line has it now
            self.folder.write_bytes(PNG_NAME, history_png(self.task, self.state.history, title=self.folder.uri.rsplit("/", 1)[1]))
            shown = {name: predicted[name] for name in dict.fromkeys((*reported, self.task.reference_split)) if name in predicted}
            if reported and shown:
                self._write_report(self.task.report(shown, recipe=self.recipe, signature=self.config.signature, metrics=metrics))
            score, patience = self.task.score.name, self.recipe.schedule.patience_evals
            result = {
                "score": self.state.best[self._score_folder],
                "score_name": score,
                "best": f"best/{self._score_folder}",
                "member_digest": best.digest,
                "metrics": metrics,
                "num_epochs": self.state.epoch,
                "num_steps": self.state.global_step,
                "ended": f"no better {score} in {patience} evaluations (--schedule.patience-evals {patience})"
                if self._out_of_patience() and self.state.epoch < self.recipe.schedule.num_epochs
                else "all epochs are done",
            }
            self.folder.write_json("result.json", result)
        self._barrier()

    def _write_report(self, files: dict[str, bytes]) -> None:
        self.folder.delete("report")  # of a finish that was killed
        for name, data in files.items():
            self.folder.write_bytes(f"report/{name}", data)

    # checkpoints --------------------------------------------------------------------------------------------------------------------------
    def _publish(self, name: str, metrics: dict[str, float], state: dict[str, Any] | None = None) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "checkpoint"
            write_member(
                directory,
                task=self.task,
                recipe=self.recipe,
                signature=self.config.signature,
                metrics=metrics,
                artifacts=self.learner.artifacts(),
            )
            if state is not None:
                torch.save(state, directory / "trainer_state.pt")
            self.folder.publish(name, directory)

    def _save_last(self, metrics: dict[str, float] | None = None) -> None:
        # All workers resume from one file: with the workers' mean, for some scalars (the experts' load) are each worker's own.
        sums = self._mean_sums()
        if self.rank == 0:
            state = {
                "loop": {**self.state.to_dict(), "sums": sums},
                "optimizers": {turn: optimizer.state_dict() for turn, optimizer in self.optimizers.items()},
                "weights": {name: tensor.clone() for name, tensor in self.learner.state_dict().items()},
                "ema": None if self.ema is None else self.ema.state_dict(),
            }
            with self._averaged():
                self._publish("last", metrics or {}, state)
        self._barrier()

    def _resume(self) -> None:
        if self.rank == 0:
            check_recipe(self.config)
            for name in ("last", *(f"best/{n}" for n in self.task.best_metrics)):
                self.folder.recover(name)
        self._barrier()
        if not self.folder.exists("last/trainer_state.pt"):  # by its name the last that appears on an object store: a kill may leave the others
            self._begin()
            return
        with self.folder.fetched("last") as directory:
            saved = torch.load(directory / "trainer_state.pt", map_location=self.device, weights_only=True)
            for name in self.learner.artifacts():
                read_weights(directory / f"{name}.safetensors")  # a broken file is found now, not at the end
        self.learner.load_state_dict(saved["weights"])
        for turn, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][turn])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])
        self.state = LoopState.from_dict(saved["loop"])

    def _begin(self) -> None:
        if self.recipe.init_from:
            start_from(self.learner, self.recipe.init_from)
        if self.learner.adapt_objects != 0:
            self.learner.adapt(self._adapt_batches())
        if self.ema is not None:
            self.ema = ExponentialMovingAverage(self.learner, self.ema.decay)

    def _adapt_batches(self) -> Iterator[dict[str, Tensor]]:
        for columns in regrouped(self.config.train.parts(0, 1), ADAPT_BATCH, limit=self.learner.adapt_objects):  # every worker the same
            del columns[ROW_KEY]
            yield {name: tensor.to(self.device) for name, tensor in self.task.collate(columns, self.recipe, rngs=None).items()}

    # small things -------------------------------------------------------------------------------------------------------------------------
    def _mean_scalars(self) -> dict[str, float]:
        return {name: value / self.state.num_summed for name, value in self._mean_sums().items()}

    def _mean_sums(self) -> dict[str, float]:
        """The running sums, averaged over the workers; every worker must ask."""
        names = sorted(self.state.sums)
        values = torch.tensor([float(self.state.sums[n]) for n in names], dtype=torch.float64)
        if self.cpu_group is not None:
            dist.all_reduce(values, group=self.cpu_group)
            values /= self.world_size
        return dict(zip(names, values.tolist(), strict=True))

    def _shared(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.cpu_group is None:
            return metrics
        box = [metrics]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def _stop_requested(self) -> bool:
        # RESIZE: the same, to start again with more workers.
        return self._first_says(self.rank == 0 and (self.folder.exists("STOP") or self.folder.exists("RESIZE")))

    def _save_if_a_node_leaves(self) -> None:
        due = self._first_says(time.monotonic() - self._asked > _LEAVING_POLL_S)
        if not due:
            return
        self._asked = time.monotonic()
        leaving = self.node_is_leaving()
        if leaving and not self._saved_for_leaving:
            self._save_last()
        self._saved_for_leaving = leaving

    def _first_says(self, answer: bool) -> bool:
        """Rank 0's answer, on every worker."""
        box = torch.tensor([int(answer)])
        if self.cpu_group is not None:
            dist.broadcast(box, src=0, group=self.cpu_group)
        return bool(box.item())

    def _barrier(self) -> None:
        if self.cpu_group is not None:
            dist.barrier(group=self.cpu_group)

    def _show(self, metrics: dict[str, float]) -> None:
        score = self.task.score.name
        values = {
            "cad_train_epoch": self.state.epoch,
            "cad_train_loss": metrics.get("train/loss", math.nan),
            "cad_train_objects_per_s": self.state.objects_per_s,
            "cad_train_workers": self.world_size,
            "cad_val_score": metrics[score],
            "cad_val_best_score": self.state.best.get(self._score_folder, math.nan),
        }
        show(values, task=self.task.name, run=self.folder.uri.rsplit("/", 1)[1])

    def _write_progress(self, steps: int, rate: float) -> None:
        loss = float(self.state.sums["loss"]) / self.state.num_summed if self.state.num_summed and "loss" in self.state.sums else None
        self.folder.write_json(
            "progress.json",
            {
                "time": time.time(),
                "epoch": self.state.epoch,
                "num_epochs": self.recipe.schedule.num_epochs,
                "step": self.state.step,
                "num_steps": steps,
                "loss": loss if loss is None or math.isfinite(loss) else None,
                "objects_per_s": rate,
            },
        )
