"""The renderer against a ray caster, analytic areas, its own invariances, and refusals of broken meshes."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh

from cad_models.common.rendering import Camera, render_views, ring_cameras

REPOSITORY = Path(__file__).resolve().parents[2]
FRONT = Camera(azimuth_deg=0.0, elevation_deg=0.0)
ORTHOGRAPHIC_FRONT = Camera(azimuth_deg=0.0, elevation_deg=0.0, fov_deg=0.0)
DARK = 85  # lines are darker, lit surfaces and white are brighter


def arrays(mesh):
    return np.asarray(mesh.vertices), np.asarray(mesh.faces)


def box(extents, center=(0.0, 0.0, 0.0)):
    return arrays(trimesh.creation.box(extents=extents, transform=trimesh.transformations.translation_matrix(center)))


def joined(*meshes):
    vertices = np.concatenate([v for v, _ in meshes])
    offsets = np.cumsum([0] + [len(v) for v, _ in meshes])
    return vertices, np.concatenate([f + o for (_, f), o in zip(meshes, offsets, strict=False)])


def silhouette(picture):
    return (picture != 255).any(axis=-1)


def ray_cast(vertices, faces, camera, size):
    """Nearest face hit by the ray through each pixel's centre (-1 = none): Möller and Trumbore, one pixel at a time."""
    center = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
    points = (vertices - center) / np.linalg.norm(vertices - center, axis=1).max()
    a, e = np.radians([camera.azimuth_deg, camera.elevation_deg])
    toward = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    right = np.cross([0.0, 0.0, 1.0], toward)
    right /= np.linalg.norm(right)
    up = np.cross(toward, right)
    half = np.tan(np.radians(camera.fov_deg / 2))
    eye = toward / np.sin(np.arctan((1 - camera.margin) * half))
    p, q, r = (points[faces[:, k]] for k in range(3))
    edge1, edge2 = q - p, r - p
    hits = np.full((size, size), -1)
    for row in range(size):
        for column in range(size):
            x, y = (2 * (column + 0.5) / size - 1) * half, (1 - 2 * (row + 0.5) / size) * half
            ray = x * right + y * up - toward
            h = np.cross(ray, edge2)
            with np.errstate(divide="ignore", invalid="ignore"):
                f = 1.0 / (edge1 * h).sum(axis=1)
                s = eye - p
                u = f * (s * h).sum(axis=1)
                w = np.cross(s, edge1)
                v = f * (w @ ray)
                t = f * (edge2 * w).sum(axis=1)
                inside = (u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0)
            if inside.any():
                hits[row, column] = int(np.where(inside, t, np.inf).argmin())
    return hits


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(
    "mesh",
    [
        trimesh.creation.box(extents=(1, 2, 3)),
        trimesh.creation.torus(1.0, 0.35, major_sections=16, minor_sections=10),
        trimesh.creation.annulus(r_min=0.4, r_max=1.0, height=0.1, sections=12),
    ],
    ids=["box", "torus", "annulus"],
)
def test_silhouette_equals_ray_caster(mesh):
    vertices, faces = arrays(mesh)
    for camera in (ring_cameras()[3], ring_cameras()[14], Camera(azimuth_deg=200.0, elevation_deg=35.0, fov_deg=70.0)):
        picture = render_views(vertices, faces, [camera], size=64, supersampling=1)[0]
        assert iou(silhouette(picture), ray_cast(vertices, faces, camera, 64) >= 0) >= 0.995


def test_visible_faces_equal_ray_caster_through_their_brightness():
    """Two tilted plates that cut each other: which is in front changes within the picture."""
    plate = np.array([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    quads = np.array([[0, 1, 2], [0, 2, 3]])
    tilt = [trimesh.transformations.rotation_matrix(np.radians(angle), [1, 0.2, 0])[:3, :3] for angle in (30, -40)]
    vertices, faces = joined((plate @ tilt[0].T, quads), (plate @ tilt[1].T, quads))
    camera = Camera(azimuth_deg=20.0, elevation_deg=55.0)
    picture = render_views(vertices, faces, [camera], size=64, supersampling=1)[0, :, :, 0].astype(int)
    hits = ray_cast(vertices, faces, camera, 64) // 2
    surface = (picture > DARK) & (picture < 255)
    levels = [np.median(picture[surface & (hits == body)]) for body in (0, 1)]
    assert abs(levels[0] - levels[1]) > 10
    assert (abs(picture - levels[0]) < abs(picture - levels[1]))[surface].tolist() == (hits == 0)[surface].tolist()
    assert (surface & (hits == 0)).sum() > 200 and (surface & (hits == 1)).sum() > 200


def test_sphere_covers_its_analytic_disc():
    vertices, faces = arrays(trimesh.creation.icosphere(subdivisions=4))
    for camera in (FRONT, ORTHOGRAPHIC_FRONT, ring_cameras()[20]):
        picture = render_views(vertices, faces, [camera], size=800, supersampling=1)[0]
        area = np.pi * ((1 - camera.margin) * 400.0) ** 2
        assert abs(silhouette(picture).sum() / area - 1) < 0.005
        assert picture[:15].min() == 255 and picture[:, -15:].min() == 255  # the margin stays free


def test_orthographic_cube_face_covers_its_analytic_square():
    vertices, faces = box((1, 1, 1))
    picture = render_views(vertices, faces, [ORTHOGRAPHIC_FRONT], size=400, supersampling=1)[0]
    side = 0.96 * 200 / np.sqrt(0.75)  # half the diagonal is the radius of the bounding sphere
    rows, columns = np.nonzero(silhouette(picture))
    assert abs(np.ptp(rows) + 1 - side) <= 1 and abs(np.ptp(columns) + 1 - side) <= 1


@pytest.mark.parametrize("fov_deg", [0.0, 30.0])
def test_camera_shows_the_side_it_is_named_after(fov_deg):
    """A cube with a small knob on its +x side, above the middle, towards +y."""
    vertices, faces = joined(box((2, 2, 2)), box((0.8, 0.4, 0.4), (1.4, 0.6, 0.4)))

    def dark(azimuth, roll=0.0):
        camera = Camera(azimuth_deg=azimuth, elevation_deg=0.0, roll_deg=roll, fov_deg=fov_deg)
        picture = render_views(vertices, faces, [camera], size=128)[0]
        return silhouette(picture), picture[..., 0] < DARK

    mask, lines = dark(0.0)
    rows, columns = np.nonzero(lines[20:108, 20:108] & _eroded(mask, 6)[20:108, 20:108])
    assert rows.mean() + 20 < 62 and columns.mean() + 20 > 66  # knob up and to the right, where +y is
    mask, lines = dark(180.0)
    assert not (lines & _eroded(mask, 6)).any()  # hidden behind the cube
    mask, _ = dark(90.0)
    columns = np.nonzero(mask.any(axis=0))[0]
    rows = np.nonzero(mask[:, columns[2]])[0]
    assert rows.mean() < 64  # sticks out to the left, above the middle
    mask, _ = dark(90.0, roll=90.0)
    rows = np.nonzero(mask.any(axis=1))[0]
    assert np.nonzero(mask[rows[2]])[0].mean() > 64  # rolled camera: left becomes the top, and up becomes the right


def _eroded(mask, radius):
    out = mask.copy()
    for _ in range(radius):
        out[1:-1, 1:-1] &= out[:-2, 1:-1] & out[2:, 1:-1] & out[1:-1, :-2] & out[1:-1, 2:]
        out[0] = out[-1] = out[:, 0] = out[:, -1] = False
    return out


def test_hidden_body_changes_nothing_and_visible_body_does():
    cube = box((2, 2, 2))
    alone = render_views(*cube, ring_cameras(6), size=96)
    np.testing.assert_array_equal(render_views(*joined(cube, box((1, 1, 1))), ring_cameras(6), size=96), alone)
    pierced = render_views(*joined(cube, box((2.2, 1, 1))), [FRONT], size=96)
    assert (pierced != render_views(*cube, [FRONT], size=96)).any()


def test_winding_does_not_change_a_byte():
    mesh = trimesh.creation.capsule(height=1.0, radius=0.4, count=[12, 12])
    vertices, faces = arrays(mesh)
    expected = render_views(vertices, faces, ring_cameras(4), size=96)
    np.testing.assert_array_equal(render_views(vertices, faces[:, ::-1].copy(), ring_cameras(4), size=96), expected)
    mixed = faces.copy()
    mixed[::2] = mixed[::2, ::-1]
    mixed[1::3] = np.roll(mixed[1::3], 1, axis=1)
    np.testing.assert_array_equal(render_views(vertices, mixed, ring_cameras(4), size=96), expected)


def test_triangle_soup_looks_like_the_indexed_mesh():
    vertices, faces = arrays(trimesh.creation.icosphere(subdivisions=2))
    soup = vertices[faces].reshape(-1, 3)
    pictures = render_views(soup, np.arange(len(soup)).reshape(-1, 3), ring_cameras(4), size=96).astype(int)
    assert abs(pictures - render_views(vertices, faces, ring_cameras(4), size=96)).max() <= 1


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e36, 1e300, 1e-300])
def test_scale_does_not_change_the_picture(scale):
    vertices, faces = box((1, 2, 3), center=(0.5, 0.25, 4.0))
    expected = render_views(vertices, faces, ring_cameras(3), size=96).astype(int)
    difference = abs(render_views(vertices * scale, faces, ring_cameras(3), size=96) - expected)
    assert (difference > 1).mean() < 1e-3


def test_other_types_and_layouts_of_input_give_the_same_picture():
    vertices, faces = box((1, 2, 3))
    expected = render_views(vertices, faces, [FRONT], size=64)
    for v, f in (
        (vertices.astype(np.float32), faces.astype(np.int32)),
        (np.asfortranarray(vertices), np.asfortranarray(faces)),
        (np.repeat(vertices, 2, axis=0)[::2], faces.astype(np.uint32)),
    ):
        f.flags.writeable = False
        np.testing.assert_array_equal(render_views(v, f, [FRONT], size=64), expected)


def test_bytes_repeat_in_another_process():
    code = (
        "import hashlib, trimesh, numpy as np\n"
        "from cad_models.common.rendering import render_views, ring_cameras\n"
        "m = trimesh.creation.torus(1.0, 0.3)\n"
        "p = render_views(np.asarray(m.vertices), np.asarray(m.faces), ring_cameras(6), size=96)\n"
        "print(hashlib.sha256(p.tobytes()).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    here = render_views(*arrays(trimesh.creation.torus(1.0, 0.3)), ring_cameras(6), size=96)
    assert other.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest()


def test_creases_are_dark_and_smooth_surfaces_are_not():
    camera = Camera(azimuth_deg=30.0, elevation_deg=35.0)
    cube = render_views(*box((1, 1, 1)), [camera], size=128)[0]
    inside = _eroded(silhouette(cube), 8)
    dark_cube = (cube[..., 0] < DARK) & inside
    assert 60 < dark_cube.sum() < 600  # three edges meet in the corner that faces the camera
    sphere = render_views(*arrays(trimesh.creation.icosphere(subdivisions=3)), [camera], size=128)[0]
    assert not ((sphere[..., 0] < DARK) & _eroded(silhouette(sphere), 3)).any()
    cylinder = render_views(*arrays(trimesh.creation.cylinder(radius=1, height=3, sections=16)), [FRONT], size=128)[0]
    assert not ((cylinder[..., 0] < DARK) & _eroded(silhouette(cylinder), 3)).any()  # sides meet at 22 degrees


def test_smooth_surface_has_no_facets():
    """Along the middle row of a coarse cylinder the brightness changes little by little, not in 16 steps."""
    vertices, faces = arrays(trimesh.creation.cylinder(radius=1, height=3, sections=16))
    row = render_views(vertices, faces, [FRONT], size=128)[0, 64, :, 0].astype(int)
    lit = row[(row > DARK) & (row < 255)]
    assert len(lit) > 40 and abs(np.diff(lit)).max() <= 8 and np.ptp(lit) > 20


def test_depth_step_between_parallel_faces_is_a_line():
    """Seen from above, a pad on a plate has the plate's brightness: only its outline shows it."""
    above = Camera(azimuth_deg=0.0, elevation_deg=90.0, fov_deg=0.0)
    plate = box((2, 2, 0.2))
    inside = np.zeros((128, 128), bool)
    inside[34:94, 34:94] = True
    pad = render_views(*joined(plate, box((0.6, 0.6, 0.1), (0, 0, 0.12))), [above], size=128, supersampling=1)
    pad = pad[0, ..., 0] < DARK
    assert 140 < (pad & inside).sum() < 260  # four sides of about 26 pixels, two pixels wide
    alone = render_views(*plate, [above], size=128, supersampling=1)[0, ..., 0] < DARK
    assert not (alone & inside).any()


def test_overlap_within_one_smooth_body_is_a_line():
    """A torus seen from the side hides part of itself; the border of the near part is drawn over the far part."""
    vertices, faces = arrays(trimesh.creation.torus(1.0, 0.3, major_sections=96, minor_sections=48))
    camera = Camera(azimuth_deg=0.0, elevation_deg=10.0)  # too low to see through the hole
    column = render_views(vertices, faces, [camera], size=128, supersampling=1)[0, :, 64, 0]
    assert np.ptp(np.nonzero(column != 255)[0]) + 1 == (column != 255).sum()
    line_starts = np.nonzero(np.diff((column < DARK).astype(int)) == 1)[0]
    assert len(line_starts) == 3  # far outline, border of the near part, near outline
    assert 8 < line_starts[1] - line_starts[0] and 8 < line_starts[2] - line_starts[1]


def test_single_triangle_is_seen_from_both_sides():
    vertices = np.array([[0.0, 0, 0], [0, 2, 0], [0, 0, 1]])
    faces = np.array([[0, 1, 2]])
    behind = Camera(azimuth_deg=180.0, elevation_deg=0.0, fov_deg=0.0)
    front, back = render_views(vertices, faces, [ORTHOGRAPHIC_FRONT, behind], size=65, supersampling=1)
    assert silhouette(front).sum() > 400
    assert iou(silhouette(front), silhouette(back)[:, ::-1]) > 0.97
    assert silhouette(front)[:, :33].sum() > 2 * silhouette(front)[:, 33:].sum()  # the tall side is at y = 0: left


def test_degenerate_faces_are_skipped_without_a_trace():
    vertices, faces = box((1, 1, 1))
    vertices = np.concatenate([vertices, [[0, 0, 0.5], [0.1, 0, 0.5], [0.2, 0, 0.5]]])
    extra = np.array([[0, 0, 1], [2, 2, 2], [8, 9, 10]])
    np.testing.assert_array_equal(
        render_views(vertices, np.concatenate([extra, faces]), ring_cameras(3), size=64),
        render_views(vertices[:8], faces, ring_cameras(3), size=64),
    )


def test_face_seen_edge_on_draws_at_most_a_line():
    vertices = np.array([[-1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    picture = render_views(vertices, np.array([[0, 1, 2]]), [FRONT], size=64)[0]
    assert silhouette(picture).any(axis=1).sum() <= 1


def test_unused_vertices_count_for_nothing():
    vertices, faces = box((1, 1, 1))
    padded = np.concatenate([vertices[:3], [[np.nan, 1e30, 0.0]], vertices[3:]])
    shifted = np.where(faces >= 3, faces + 1, faces)
    np.testing.assert_array_equal(render_views(padded, shifted, [FRONT], size=64), render_views(vertices, faces, [FRONT], size=64))


@pytest.mark.parametrize(
    ("vertices", "faces", "message"),
    [
        (np.eye(3), np.array([[0, 1, 3]]), "0 to 3, but there are 3"),
        (np.eye(3), np.array([[-1, 1, 2]]), "-1 to 2"),
        (np.array([[0.0, 0, np.nan], [1, 0, 0], [0, 1, 0]]), np.array([[0, 1, 2]]), "1 of 3 vertices are not finite"),
        (np.array([[0.0, 0, np.inf], [1, 0, 0], [0, 1, 0]]), np.array([[0, 1, 2]]), "not finite"),
        (np.eye(3), np.zeros((0, 3), int), "no faces"),
        (np.ones((3, 3)), np.array([[0, 1, 2]]), "no extent"),
        (np.arange(9.0).reshape(3, 3), np.array([[0, 1, 2]]), "none of the 1 faces has an area"),
    ],
    ids=["index-high", "index-negative", "nan", "inf", "empty", "point", "collinear"],
)
def test_broken_mesh_is_refused_with_a_reason(vertices, faces, message):
    with pytest.raises(ValueError, match=message):
        render_views(vertices, faces, [FRONT], size=32)


def test_options_out_of_range_are_refused():
    mesh = box((1, 1, 1))
    with pytest.raises(ValueError, match="supersampling 0"):
        render_views(*mesh, [FRONT], supersampling=0)
    with pytest.raises(ValueError, match="color"):
        render_views(*mesh, [FRONT], color=(300, 0, 0))
    assert render_views(*mesh, [], size=32).shape == (0, 32, 32, 3)


def test_random_soups_never_leave_the_frame_or_crash():
    rng = np.random.default_rng(0)
    for _ in range(20):
        num_vertices = int(rng.integers(3, 40))
        vertices = rng.normal(size=(num_vertices, 3)) * 10.0 ** rng.integers(-6, 6, size=3)
        faces = rng.integers(0, num_vertices, size=(int(rng.integers(1, 60)), 3))
        if np.ptp(faces, axis=1).max() == 0:
            continue
        for camera in (FRONT, ORTHOGRAPHIC_FRONT, Camera(azimuth_deg=10.0, elevation_deg=-90.0, fov_deg=120.0)):
            try:
                picture = render_views(vertices, faces, [camera], size=48)[0]
            except ValueError as error:
                assert "has an area" in str(error)
                continue
            border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
            assert (border == 255).mean() > 0.97
