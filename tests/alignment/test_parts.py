"""Generated parts: closed solids, the same bytes for the same seed, no two alike, dimensions as drawn, every feature used."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import trimesh

from cad_models.alignment.families import FAMILIES, Draw
from cad_models.alignment.parts import generate_part, solid_arrays

REPOSITORY = Path(__file__).resolve().parents[2]
PER_FAMILY = 10
SEED = 11


@pytest.fixture(scope="module")
def parts():
    return [generate_part(index, SEED) for index in range(PER_FAMILY * len(FAMILIES))]


def digest(part):
    facts = json.dumps([part.object_id, part.family, part.parameters]).encode()
    return hashlib.sha256(facts + part.vertices.tobytes() + part.faces.tobytes()).hexdigest()


def as_mesh(part):
    return trimesh.Trimesh(part.vertices, part.faces, process=False)


def of_family(parts, family):
    chosen = [part for part in parts if part.family == family]
    assert len(chosen) == PER_FAMILY
    return chosen


def extents(part):
    return np.ptp(part.vertices, axis=0)


def test_parts_are_closed_solids_of_a_sensible_size(parts):
    for part in parts:
        mesh = as_mesh(part)
        what = (part.object_id, part.family, part.parameters)
        assert part.vertices.dtype == np.float64 and part.faces.dtype == np.int32
        assert mesh.is_watertight and mesh.is_winding_consistent, what
        assert 0 < mesh.volume < np.prod(extents(part)), what
        assert 200 <= len(part.faces) <= 20_000, what
        assert 2 < extents(part).max() < 500, what
        assert len(np.unique(part.faces)) == len(part.vertices), what


def test_parts_are_one_body_except_bearings(parts):
    for part in parts:
        bodies = len(as_mesh(part).split(only_watertight=False))
        assert bodies == 1 or part.family == "ball_bearing", (part.object_id, part.family, bodies, part.parameters)


def test_parts_stand_on_the_plane_around_the_axis(parts):
    for part in parts:
        low, high = part.vertices.min(axis=0), part.vertices.max(axis=0)
        np.testing.assert_allclose([low[2], *(low + high)[:2]], 0.0, atol=1e-9)


def test_families_take_turns_and_ids_follow_the_index(parts):
    assert len(FAMILIES) >= 14
    assert set(Counter(part.family for part in parts).values()) == {PER_FAMILY}
    assert parts[123].object_id == "part-000123"
    assert [part.family for part in parts[: len(FAMILIES)]] == list(FAMILIES)


def test_part_is_the_same_in_another_process_on_one_cpu(parts):
    code = (
        "import os, sys\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "sys.path.insert(0, 'tests/alignment')\n"
        "from test_parts import SEED, digest, generate_part\n"
        "for index in range(25): print(digest(generate_part(index, SEED)))"
    )
    other = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert other.stdout.split() == [digest(part) for part in parts[:25]]


def test_part_does_not_depend_on_the_parts_before_it(parts):
    assert digest(generate_part(17, SEED)) == digest(parts[17])
    assert digest(generate_part(17, SEED + 1)) != digest(parts[17])


def test_no_two_parts_are_alike_in_shape(parts):
    """Even up to scale: extents, area and volume, each divided by the size."""
    facts = []
    for part in parts:
        mesh, size = as_mesh(part), np.linalg.norm(extents(part))
        facts.append([*(np.sort(extents(part)) / size), mesh.area / size**2, mesh.volume / size**3])
    facts = np.array(facts)
    distance = np.abs(facts[:, None] - facts[None]).max(axis=-1) + np.eye(len(facts))
    assert distance.min() > 1e-4, [parts[i].object_id for i in np.unravel_index(distance.argmin(), distance.shape)]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_varies_in_proportion_and_complexity(parts, family):
    chosen = of_family(parts, family)
    assert len({len(part.faces) for part in chosen}) >= 3
    slenderness = [extents(part).max() / extents(part).min() for part in chosen]
    assert max(slenderness) / min(slenderness) > 1.15


# What the overall size of a part must be, from its parameters alone.
EXTENTS = {
    "mounting_plate": lambda p: (p["length"], p["width"], None),
    "enclosure": lambda p: (None if p["lugs"] else p["length"], p["width"], p["height"]),
    "t_slot_extrusion": lambda p: (p["cell"] * p["cells_x"], p["cell"] * p["cells_y"], p["cell"] * p["length_ratio"]),
    "l_bracket": lambda p: (p["leg"], p["width"], p["height"]),
    "u_bracket": lambda p: (None if p["ears"] else p["width"], p["depth"], p["height"]),
    "heat_sink": lambda p: (p["length"], p["width"] * (1 + 2 * p["flange_ratio"]), None),
    "impeller": lambda p: (None, None, None if not p["axial"] else p["radius"] * p["height_ratio"]),
    "stepped_shaft": lambda p: (
        None,
        None,
        p["base_radius"] * sum(v for k, v in p.items() if k.startswith("length_ratio")) if p["upright"] else None,
    ),
}


@pytest.mark.parametrize("family", EXTENTS)
def test_extents_follow_the_parameters(parts, family):
    num_compared = 0
    for part in of_family(parts, family):
        for expected, extent in zip(EXTENTS[family](part.parameters), extents(part), strict=True):
            if expected is not None:
                num_compared += 1
                assert extent == pytest.approx(expected, rel=1e-6), (part.object_id, part.parameters)
    assert num_compared >= 3


def test_gear_reaches_the_addendum_circle_and_has_its_teeth(parts):
    for part in of_family(parts, "spur_gear"):
        tip = part.parameters["module"] * (part.parameters["num_teeth"] / 2 + 1)
        radius, angle = np.hypot(*part.vertices[:, :2].T), np.arctan2(*part.vertices[:, 1::-1].T)
        assert tip * 0.97 < radius.max() < tip * 1.03
        bottom = (radius > 0.97 * radius.max()) & (part.vertices[:, 2] < 1e-6)
        gaps = np.diff(np.sort(angle[bottom]))
        assert (gaps > 0.6 * 2 * np.pi / part.parameters["num_teeth"]).sum() in (
            part.parameters["num_teeth"] - 1,
            part.parameters["num_teeth"],
        )


def test_through_hole_of_a_nut_goes_through(parts):
    for part in of_family(parts, "hex_nut"):
        # Slots may cut the chords of the round hole, which are nearer to the axis by this share.
        assert np.hypot(*part.vertices[:, :2].T).min() == pytest.approx(part.parameters["diameter"] * 0.45, rel=3e-3)
        # A solid with one hole through it has the Euler number of a torus.
        assert as_mesh(part).euler_number == 0


class RecordingDraw(Draw):
    """Remembers which parameters are features."""

    def __init__(self, rng):
        super().__init__(rng)
        self.features = {}

    def feature(self, name, probability=0.5):
        self.features[name] = super().feature(name, probability)
        return self.features[name]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_feature_occurs_and_is_absent_and_the_solid_stays_closed(family):
    seen = {}
    for trial in range(60):
        draw = RecordingDraw(np.random.default_rng([5, trial]))
        vertices, faces = solid_arrays(FAMILIES[family], draw)
        mesh = trimesh.Trimesh(vertices, faces, process=False)
        assert mesh.is_watertight and mesh.volume > 0, draw.parameters
        for name, value in draw.features.items():
            seen.setdefault(name, set()).add(value)
    assert seen and all(values == {False, True} for values in seen.values()), seen


def test_draw_records_every_dimension_within_its_range():
    draw = Draw(np.random.default_rng(0))
    values = [draw.real("a", 1, 2), draw.count("b", 3, 5), draw.feature("c", 1.0)]
    assert draw.parameters == {"a": values[0], "b": values[1], "c": 1.0}
    assert 1 <= values[0] <= 2 and values[1] in (3, 4, 5) and values[2] is True
    with pytest.raises(AssertionError, match="drawn twice"):
        draw.real("a", 1, 2)


def test_negative_index_or_seed_is_refused():
    with pytest.raises(ValueError, match="index is -1"):
        generate_part(-1, 0)
