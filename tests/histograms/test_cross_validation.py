"""Folds without duplicates, and learning within them."""

import numpy as np
import pytest

from cad_models.config import replace_all
from cad_models.histograms.cross_validation import Shapes, cross_validate, fitted, given_split, load_shapes, predicted_classes
from cad_models.histograms.recipe import RECIPE

QUICK = replace_all(
    RECIPE,
    {
        "data.inputs": ["model"], "model.width": 16, "model.embed_dim": 4, "model.num_networks": 2, "optim.ema_decay": 0.0, "batch_size": 8,
        "schedule.num_epochs": 60, "schedule.num_warmup_epochs": 1.0, "optim.lr": 1e-2,
    },
)  # fmt: skip


def shapes(signal, n=30, seed=0):
    """Random histograms; with ``signal`` their first bin tells the class. The last ten are duplicates of the first ten."""
    rng = np.random.default_rng(seed)
    histograms = rng.dirichlet(np.ones(248), (n, 2, 4)).astype(np.float32)
    labels = np.arange(n) % 3
    histograms[..., 24:56] = rng.dirichlet(np.ones(32), (n, 2, 4))
    if signal:
        histograms[np.arange(n), :, :, 24 + labels] += 1
    histograms[-10:] = histograms[:10]
    labels[-10:] = labels[:10]
    groups = np.concatenate([np.arange(n - 10), np.arange(10)])
    return Shapes([str(i) for i in range(n)], ("A", "B", "C"), labels, groups, histograms, np.zeros((n, 2, 3, 64), dtype=np.float32))


def test_signal_is_learned_and_noise_with_duplicates_is_not():
    found = cross_validate(shapes(True), QUICK, num_folds=3, num_repeats=1)
    assert found.model[0] > 0.9 and found.ridge[0] > 0.9
    # Duplicates across folds would be recognised: 20 unique shapes of noise must stay near chance.
    nothing = cross_validate(shapes(False), QUICK, num_folds=3, num_repeats=2)
    assert np.mean(nothing.model) < 0.65


def test_given_split_counts_duplicates_apart():
    given = shapes(False)
    everything, unseen = given_split(given, QUICK, np.arange(20), np.arange(15, 30), num_seeds=1)
    # Objects 15 … 19 are training objects, 20 … 29 duplicates of some: nothing is unseen.
    assert everything.model[0] > 0.8 and np.isnan(unseen.model[0]) and np.isnan(unseen.ridge[0])
    everything, unseen = given_split(given, QUICK, np.arange(8), np.arange(8, 30), num_seeds=1)
    assert everything.model[0] > unseen.model[0]


def test_same_seed_gives_the_same_model():
    given = shapes(True)
    rows = given.histograms[:, 0, :, 24:56].reshape(30, -1)
    models = [fitted(QUICK, rows, given.labels, 3) for _ in range(2)]
    assert all((a == b).all() for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True))
    assert (predicted_classes(models[0], rows, given.labels, rows, 3) == given.labels).mean() > 0.9


def test_loading_names_what_is_left_out(tmp_path, capsys):
    (tmp_path / "Cone").mkdir()
    (tmp_path / "Cone" / "bad.stl").write_bytes(b"x")
    from cad_models.histograms.primitives import write_shapes

    write_shapes(tmp_path, 5, 0)
    (tmp_path / "classes.tsv").unlink()
    loaded = load_shapes(str(tmp_path), 6)
    assert "left out Cone/bad.stl" in capsys.readouterr().out
    assert len(loaded.ids) == 5 and loaded.groups.tolist() == list(range(5)) and loaded.class_names == ("Cone", "Cube", "Cylinder", "Sphere", "Torus")


@pytest.mark.parametrize("arguments", [["--train", "x.tsv"], ["--recipe", "default", "--inputs", "affin"]])
def test_wrong_flags_exit_with_status_2(arguments, monkeypatch):
    from cad_models.histograms import cross_validation

    monkeypatch.setattr("sys.argv", ["cross_validation", "--source", "builtin:5", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cross_validation.main()
    assert stopped.value.code == 2


@pytest.mark.slow
def test_shapes_of_other_triangulations_are_recognised():
    # Learned from generated shapes alone: boxes of twelve triangles, finely cut boxes, cylinders of few sides, thin and thick tori.
    import trimesh.creation as create

    from cad_models.histograms.features import features
    from cad_models.histograms.mesh_features import shape_distributions
    from cad_models.histograms.primitives import SOURCE_CLASSES, generate_shape, random_rotation

    def rows(meshes):
        stored = np.stack([np.stack([np.zeros((3, 64)), shape_distributions(v, f, affine=True)]) for v, f in meshes]).astype(np.float32)
        return features(np.zeros((len(stored), 2, 4, 248), dtype=np.float32), stored, RECIPE.data)

    shapes = [generate_shape(i, 1) for i in range(400)]
    train, labels = rows([(s.vertices, s.faces) for s in shapes]), np.array([SOURCE_CLASSES.index(s.label) for s in shapes])
    learner = fitted(RECIPE, train, labels, 5)
    others = {
        "Cube": [create.box((1, 1, 1)), create.box((1, 1, 1)).subdivide().subdivide()],
        "Cylinder": [create.cylinder(1, 2, sections=20), create.cylinder(1, 3, sections=100)],
        "Cone": [create.cone(1, 2, sections=32)],
        "Sphere": [create.icosphere(3)],
        "Torus": [create.torus(1, 0.15), create.torus(1, 0.4)],
    }
    rng = np.random.default_rng(0)
    named = [(name, mesh) for name, meshes in others.items() for mesh in meshes for _ in range(3)]
    moved = [((m.vertices * rng.uniform(1, 10, 3)) @ random_rotation(rng).T + rng.uniform(-10, 10, 3), np.asarray(m.faces)) for _, m in named]
    found = predicted_classes(learner, train, labels, rows(moved), 5)
    assert [SOURCE_CLASSES[i] for i in found] == [name for name, _ in named]
