"""The contract that every room keeps, whatever it is about."""

import dataclasses
import inspect
import json
import pickle
import re
from pathlib import Path

import numpy as np
import optuna
import pyarrow as pa
import pytest
import torch

from cad_models.checkpoint import load_member, write_member
from cad_models.common.encoders import build_encoder
from cad_models.common.images import decode_image
from cad_models.config import differences, from_dict, paths, replace_all, to_dict, value_at
from cad_models.dataset import DatasetFolder, EmbeddingsManifest, Manifest, build_table, tensor_field
from cad_models.learner import Learner
from cad_models.order import object_rng
from cad_models.task import LABEL_INDEX, InferOptions, Reject, Row, Task
from cad_models.tasks import TASKS
from rayjobs.cli import parse_job
from rayjobs.infer import InferJob
from rayjobs.named_runs import command_line
from rayjobs.train import TrainJob

NUM_OBJECTS = 6
SEED = 3

pytestmark = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@dataclasses.dataclass
class Prepared:
    """What a handful of a task's own built-in objects become."""

    task: Task
    rows: list[Row]
    columns: dict[str, np.ndarray]
    signature: dict


_PREPARED: dict[str, Prepared] = {}


def small_recipe(task: Task):
    """The smoke recipe with less of what only costs time; a room without such a path keeps its own."""
    wanted = {"data.num_points": 128, "model.num_points": 64, "data.num_views": 3, "data.num_query_views": 2, "data.image_size": 48}
    known = paths(task.smoke)
    return replace_all(task.smoke, {path: value for path, value in wanted.items() if path in known})


@pytest.fixture
def prepared(task) -> Prepared:
    if task.name not in _PREPARED:
        _PREPARED[task.name] = _prepare(task)
    return _PREPARED[task.name]


def _prepare(task: Task) -> Prepared:
    recipe = small_recipe(task)
    items = task.list_raw(f"builtin:{NUM_OBJECTS}:seed={SEED}").items
    rows = [task.prepare(item, recipe) for item in items]
    tables = {"objects": _table(task.schemas(recipe)["objects"], [row.objects for row in rows], items)}
    embeddings = None
    if task.embed_columns:
        encoder = build_encoder("hog")
        fields, values = [], [{} for _ in rows]
        for column in (*task.embed_columns, *task.changed_embed_columns(recipe)):
            fields += [tensor_field(column.name, "float16", (-1, encoder.width)), pa.field(column.count, pa.int64())]
            for value, row in zip(values, rows, strict=True):
                pictures = [decode_image(image) for image in row.views[column.source[1]]]
                if column.change is not None:
                    rngs = [np.random.default_rng(copy) for copy in range(column.copies)]
                    pictures = [column.change(picture, rng) for picture in pictures for rng in rngs]
                value[column.name] = encoder.encode(pictures)
                value[column.count] = len(value[column.name])
        tables["embeddings"] = _table(pa.schema(fields), values, items)
        embeddings = EmbeddingsManifest(encoder="hog", encoder_digest=encoder.digest, width=encoder.width, dataset_digest="d", parts=[])
    labels = [row.objects.get("label", item.label) for row, item in zip(rows, items, strict=True)]
    manifest = Manifest(
        task=task.name, settings=task.prepare_settings(recipe), settings_digest="s", parts=[], num_objects=len(rows), num_groups=len(rows),
        num_quarantined=0, num_ignored=0, splits={"train": len(rows)},
        labels={name: {"train": labels.count(name)} for name in sorted(set(labels)) if name},
    )  # fmt: skip
    if LABEL_INDEX in task.columns(recipe)["objects"]:
        indices = [manifest.class_names.index(label) if label else -1 for label in labels]
        tables["objects"] = tables["objects"].append_column(LABEL_INDEX, pa.array(indices, pa.int64()))
    signature = task.signature(recipe, {"manifest": manifest, "embeddings": embeddings})
    return Prepared(task, rows, task.examples(tables, recipe), signature)


def _table(schema: pa.Schema, values: list[dict], items) -> pa.Table:
    own = [pa.field(name, pa.string()) for name in ("object_id", "group_id", "split", "label") if name not in schema.names]
    rows = [{"object_id": i.object_id, "group_id": i.object_id, "split": "train", "label": i.label, **v} for i, v in zip(items, values, strict=True)]
    return build_table(pa.schema([*own, *schema]), rows)


def fresh_learner(prepared: Prepared, seed: int = 0) -> Learner:
    torch.manual_seed(seed)
    return prepared.task.learner(small_recipe(prepared.task), prepared.signature)


def batch_of(prepared: Prepared, *, train: bool):
    rngs = [object_rng(0, 0, key) for key in range(NUM_OBJECTS)] if train else None
    return prepared.task.collate(prepared.columns, small_recipe(prepared.task), rngs=rngs)


# --- the class ----------------------------------------------------------------------------------------------------------------------------
def test_task_is_final_and_complete(task):
    assert TASKS[task.name] is task and not inspect.isabstract(type(task))
    # Other tests' stand-ins may derive from it; the program's classes may not.
    assert [c for c in type(task).__subclasses__() if c.__module__.startswith(("cad_models", "rayjobs"))] == []
    assert task.score.name in task.best_metrics.values() and task.score.name.split("/")[0] in task.split_names
    assert type(task.smoke) is type(task.recipe)
    assert pickle.loads(pickle.dumps(task)).name == task.name


def test_what_the_task_names_exists(task):
    assert task.reference_split in ("", *task.split_names) and set(task.report_splits) <= set(task.split_names)
    assert len(set(task.combine_rules)) == len(task.combine_rules) > 0
    # A member alone, and loose members, are combined by the first rule: it must do without fitting.
    assert set(task.fitted_rules) < set(task.combine_rules) and task.combine_rules[0] not in task.fitted_rules
    assert issubclass(task.infer_options, InferOptions) and pickle.loads(pickle.dumps(task.infer_options())) == task.infer_options()
    for path, value in paths(task.infer_options()).items():
        flag = f"--options.{path.replace('_', '-')}"
        words = [f"--options.no-{path.replace('_', '-')}"] if value is True else [flag] if value is False else [flag, str(value)]
        options = parse_job(InferJob, ["--task", task.name, "--queries", "q", *words]).options
        assert type(options) is task.infer_options and (getattr(options, path) is not value or not isinstance(value, bool))


def test_named_runs_are_recipes_and_their_dry_run_gives_the_same_job(task):
    for name, run in task.runs.items():
        assert name and " " not in name and run.note
        told = parse_job(TrainJob, ["--task", task.name, "--run", name, "--dataset", "my ds"])
        assert told.recipe == replace_all(task.recipe, run.changes) and told.seeds == run.seeds
        again = parse_job(TrainJob, command_line(told)[2:])
        assert again == dataclasses.replace(told, run="")
        # The user's flags win.
        assert parse_job(TrainJob, ["--task", task.name, "--run", name, "--dry-run", "--batch-size", "3"]).recipe.batch_size == 3


def test_recipes_survive_json_and_smoke_is_smaller(task):
    for recipe in (task.recipe, task.smoke):
        assert differences(from_dict(type(recipe), to_dict(recipe)), recipe) == []
    assert task.smoke.schedule.num_epochs <= 3


def test_every_searched_path_exists_and_takes_the_suggested_values(task):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(30):
        values = task.search_space(study.ask())
        recipe = replace_all(task.recipe, values)  # raises for a path that is not there
        seen |= values.keys()
        assert all(value_at(recipe, path) == value for path, value in values.items())
    assert len(seen) >= 3


def test_baseline_recipes_are_other_recipes_of_the_task(task):
    for name, recipe in task.baseline_recipes(task.recipe).items():
        assert name and type(recipe) is type(task.recipe) and differences(task.recipe, recipe)


# --- prepare ------------------------------------------------------------------------------------------------------------------------------
def test_builtin_objects_prepare_to_rows_of_the_schema(task, prepared):
    kinds = task.schemas(small_recipe(task))
    assert all(isinstance(row, Row) and row.rejects == [] for row in prepared.rows)
    for kind, schema in kinds.items():
        table = build_table(schema, [getattr(row, kind) for row in prepared.rows])
        assert table.num_rows == NUM_OBJECTS


def test_preparing_again_gives_the_same_values(task, prepared):
    item = task.list_raw(f"builtin:{NUM_OBJECTS}:seed={SEED}").items[1]
    again, before = task.prepare(item, small_recipe(task)), prepared.rows[1]
    for kind, schema in task.schemas(small_recipe(task)).items():
        assert build_table(schema, [getattr(again, kind)]).equals(build_table(schema, [getattr(before, kind)]))


def test_inspections_find_the_same_object_under_another_name(task):
    recipe = small_recipe(task)
    items = task.list_raw("builtin:3").items
    found = [task.inspect(item, recipe) for item in (*items, dataclasses.replace(items[1], object_id="copy", source="copy"))]
    assert task.duplicates(found) == [0, 1, 2, 1]
    near = task.near_duplicates(found)
    assert near == sorted(near, key=lambda pair: pair[2]) and all(0 <= i < j < 4 for i, j, _ in near)
    assert not near or (1, 3) in {(i, j) for i, j, _ in near}
    assert not any(isinstance(i, Reject) for i in found) and all(i.complexity > 0 for i in found)


def test_prepare_settings_are_json_and_follow_the_recipe(task):
    settings = task.prepare_settings(task.recipe)
    assert json.loads(json.dumps(settings)) == settings
    assert settings != task.prepare_settings(task.smoke)


# --- train --------------------------------------------------------------------------------------------------------------------------------
def test_examples_have_one_row_an_object_and_leave_out_what_is_not_read(task, prepared):
    assert {len(column) for column in prepared.columns.values()} == {NUM_OBJECTS}


def test_every_parameter_gets_a_finite_gradient(task, prepared):
    learner = fresh_learner(prepared).train()
    optimized = set()
    for turn, optimizer in learner.optimizers(small_recipe(task)).items():
        learner.zero_grad(set_to_none=True)
        scalars = learner(batch_of(prepared, train=True), turn)
        assert all(value.dim() == 0 and torch.isfinite(value) for value in scalars.values())
        scalars["loss"].backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in parameters)
        optimized |= {id(p) for p in parameters}
    assert optimized == {id(p) for p in learner.parameters() if p.requires_grad}
    assert set(learner.turns) == set(learner.optimizers(small_recipe(task)))


@pytest.mark.slow
def test_learner_overfits_one_batch(task, prepared):
    learner = fresh_learner(prepared)
    learner.adapt(iter([batch_of(prepared, train=False)]))
    learner.train()
    optimizers = learner.optimizers(small_recipe(task))
    batch = batch_of(prepared, train=True)
    losses = []
    for _ in range(40):
        for turn in learner.turns:
            loss = learner(batch, turn)["loss"]
            optimizers[turn].zero_grad()
            loss.backward()
            optimizers[turn].step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


def test_predictions_are_deterministic_and_survive_a_checkpoint(task, prepared, tmp_path):
    learner = fresh_learner(prepared, seed=1)
    batch = batch_of(prepared, train=False)
    learner.adapt(iter([batch]))
    learner.eval()
    recipe = small_recipe(task)
    directory = Path(tmp_path / "member")
    write_member(directory, task=task, recipe=recipe, signature=prepared.signature, metrics={}, artifacts=learner.artifacts())
    member = load_member(directory)
    assert member.recipe == recipe
    with torch.inference_mode():
        first, second, loaded = learner.predict(batch), learner.predict(batch), member.learner.predict(batch)
    for name in first:
        assert len(first[name]) == NUM_OBJECTS
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], loaded[name])


def test_evaluation_gives_the_metrics_that_the_task_names(task, prepared):
    with torch.inference_mode():
        predicted = {n: t.numpy() for n, t in fresh_learner(prepared).eval().predict(batch_of(prepared, train=False)).items()}
    beside = predicted if task.reference_split else None
    metrics = task.evaluate(predicted, beside)
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())
    assert {metric.split("/", 1)[1] for metric in task.best_metrics.values()} <= metrics.keys()
    details = task.details(predicted, class_names=prepared.signature.get("class_names", ()))
    assert not details.keys() & metrics.keys() and all(np.isfinite(value) for value in details.values())
    for name in {name.removesuffix("_low") for name in details if name.endswith("_low")}:
        assert details[f"{name}_low"] <= (metrics | details)[name] <= details[f"{name}_high"]
    assert task.evaluate(task.combine([predicted]), beside) == pytest.approx(metrics)
    twice = task.combine([predicted, predicted], weights=[1.0, 3.0])
    combined = task.evaluate(twice, twice if task.reference_split else None)
    assert combined == pytest.approx(metrics)  # a member beside itself says nothing new
    columns = prepared.columns if task.reference_split else None
    for name, reference in task.references(prepared.columns, small_recipe(task), columns).items():
        assert name and {n for n in reference} <= metrics.keys()


def final_predictions(prepared: Prepared, seed: int) -> dict[str, np.ndarray]:
    """What a learner says of a split when a run ends."""
    learner, batch = fresh_learner(prepared, seed).eval(), batch_of(prepared, train=False)
    with torch.inference_mode():
        usual, more = learner.predict(batch), learner.predict_more(batch)
    assert not usual.keys() & more.keys()
    return {name: tensor.numpy() for name, tensor in (usual | more).items()}


def test_what_a_run_tells_at_its_end_are_finite_figures_within_their_bounds(task, prepared):
    predicted = final_predictions(prepared, 0)
    assert {len(column) for column in predicted.values()} == {NUM_OBJECTS}
    metrics = task.evaluate(predicted, predicted if task.reference_split else None)
    rule = task.combine_rules[0]
    combined = task.combine([predicted], rule=rule, fitted=task.fit_rule([predicted], rule=rule))
    for details in (task.details(predicted), task.details(combined)):
        assert not details.keys() & metrics.keys() and all(np.isfinite(value) for value in details.values())
        for name in {name.removesuffix("_low") for name in details if name.endswith("_low")}:
            assert details[f"{name}_low"] <= (metrics | details)[name] <= details[f"{name}_high"]


def test_every_rule_combines_what_it_was_fitted_on(task, prepared):
    members = [final_predictions(prepared, seed) for seed in (0, 1)]
    for rule in task.combine_rules:
        fitted = task.fit_rule(members, rule=rule)
        assert json.loads(json.dumps(fitted)) == fitted  # it is kept in ensemble.json
        assert fitted or rule not in task.fitted_rules
        together = task.combine(members, rule=rule, fitted=fitted)
        assert {len(column) for column in together.values()} == {NUM_OBJECTS}
        beside = together if task.reference_split else None
        assert all(np.isfinite(value) for value in task.evaluate(together, beside).values())
        single = task.fit_rule(members[:1], rule=rule)
        assert task.combine(members[:1], rule=rule, fitted=single).keys() == together.keys()


def test_report_is_named_files_that_do_not_differ_from_time_to_time(task, prepared):
    with torch.inference_mode():
        predicted = {n: t.numpy() for n, t in fresh_learner(prepared).eval().predict(batch_of(prepared, train=False)).items()}
    splits = dict.fromkeys((*task.report_splits, task.reference_split))
    if not task.report_splits:
        assert type(task).report is Task.report  # else nobody asks for it
        return
    beside = predicted if task.reference_split else None
    metrics = {f"{split}/{name}": value for split in task.report_splits for name, value in task.evaluate(predicted, beside).items()}

    def report():
        return task.report(
            {split: predicted for split in splits if split}, recipe=small_recipe(task), signature=prepared.signature, metrics=metrics
        )

    files = report()
    assert "index.html" in files and files == report()
    page = files["index.html"].decode()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)


def test_learner_names_how_much_it_wants_to_see_first(task, prepared):
    asked = fresh_learner(prepared).adapt_objects
    assert asked is None or asked >= 0


def test_same_seed_gives_the_same_weights(task, prepared):
    a, b, c = fresh_learner(prepared, 5).state_dict(), fresh_learner(prepared, 5).state_dict(), fresh_learner(prepared, 6).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_dataset_folder_of_another_task_is_known_by_its_manifest(task, prepared, tmp_path):
    folder = DatasetFolder(str(tmp_path / "ds"))
    manifest = Manifest(
        task=task.name, settings={}, settings_digest="s", parts=[], num_objects=0, num_groups=0, num_quarantined=0, num_ignored=0, splits={}
    )  # fmt: skip
    folder.write_manifest(manifest)
    assert folder.manifest() == manifest and folder.manifest().digest == manifest.digest
