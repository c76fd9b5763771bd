"""Projected pictures of clouds: compiled code against plain code, what hides what, what turning changes, the encoder on top."""

import math

import pytest
import torch

from cad_models.alignment import projection
from cad_models.alignment.learner import AlignmentLearner
from cad_models.alignment.model import parameter_groups
from cad_models.alignment.projection import (
    SIZE,
    WIDTH,
    ProjectionEncoder,
    described,
    plain_features,
    projected_features,
    projected_pictures,
)
from cad_models.alignment.recipe import AlignmentModel, AlignmentRecipe
from cad_models.common.cameras import Camera, ring_cameras


def axes(cameras: list[Camera]) -> torch.Tensor:
    return torch.tensor([camera.axes().tolist() for camera in cameras], dtype=torch.float32)


def boxes(batch: int = 2, num_points: int = 3_000, seed: int = 0) -> torch.Tensor:
    """Points and normals on boxes within the unit sphere."""
    generator = torch.Generator().manual_seed(seed)
    points = 2 * torch.rand(batch, num_points, 3, generator=generator) - 1
    side = torch.randint(3, (batch, num_points, 1), generator=generator)
    sign = points.gather(2, side).sign()
    points.scatter_(2, side, sign)
    normals = torch.zeros_like(points).scatter_(2, side, sign)
    extents = 0.2 + 0.8 * torch.rand(batch, 1, 3, generator=generator)
    return torch.cat([points * extents / math.sqrt(3), normals], dim=2)


def plate(height: float, tilt_deg: float, num_side: int = 80, half: float = 0.4) -> torch.Tensor:
    """A square plate across the z axis; its normals lean so much."""
    line = torch.linspace(-half, half, num_side)
    x, y = torch.meshgrid(line, line, indexing="ij")
    tilt = math.radians(tilt_deg)
    normal = torch.tensor([math.sin(tilt), 0.0, math.cos(tilt)]).expand(num_side**2, 3)
    return torch.cat([torch.stack([x.ravel(), y.ravel(), torch.full((num_side**2,), height)], dim=1), normal], dim=1)


TOP = [Camera(azimuth_deg=0.0, elevation_deg=90.0)]


def test_compiled_features_are_those_of_the_plain_code():
    points, cameras = boxes(3), axes(ring_cameras(7))
    plain = plain_features(points, cameras)
    assert plain.shape == (3, 7, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain_features(points, cameras), plain)
    found = projected_features(points, cameras)
    assert found.shape == (3, 7, WIDTH) and found.dtype == torch.float32
    # A point on the border of two pixels may fall to either side by rounding.
    same = torch.nn.functional.cosine_similarity(found, plain, dim=-1)
    assert same.min() > 0.999 and same.median() > 1 - 1e-5


def test_features_of_a_cloud_depend_neither_on_the_others_nor_on_threads():
    points, cameras = boxes(4, 500), axes(ring_cameras(3))
    whole = projected_features(points, cameras)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(torch.cat([projected_features(points[i : i + 1], cameras) for i in range(4)]), whole)
            assert torch.equal(projected_features(points, cameras), whole)
    finally:
        torch.set_num_threads(before)


def test_part_fills_the_picture_and_faces_are_as_dark_as_they_lean():
    for tilt in (0.0, 60.0):
        (picture,) = projected_pictures(plate(0.0, tilt).unsqueeze(0), axes(TOP))[0]
        expected = 1 - 0.7 * math.cos(math.radians(tilt))
        assert picture[SIZE // 2, SIZE // 2].item() == pytest.approx(expected, abs=1e-3)
        assert picture[4:-4, 4:-4].sub(expected).abs().max() < 1e-3
        assert picture[0].max() == picture[-1].max() == picture[:, 0].max() == picture[:, -1].max() == 0


def test_what_lies_behind_does_not_show():
    front, behind = plate(0.3, 0.0), plate(-0.3, 60.0, half=0.3)
    alone, both = (projected_pictures(cloud.unsqueeze(0), axes(TOP))[0, 0] for cloud in (front, torch.cat([front, behind])))
    torch.testing.assert_close(both, alone)
    # From below the smaller plate covers the middle of the larger one.
    (below,) = projected_pictures(torch.cat([front, behind]).unsqueeze(0), axes([Camera(azimuth_deg=0.0, elevation_deg=-90.0)]))[0]
    assert below[SIZE // 2, SIZE // 2].item() == pytest.approx(0.65, abs=1e-3)


def test_normals_may_point_to_either_side():
    points = boxes(1)
    turned = torch.cat([points[..., :3], -points[..., 3:]], dim=-1)
    cameras = axes(ring_cameras(4))
    assert torch.equal(projected_features(points, cameras), projected_features(turned, cameras))


def test_half_of_the_description_does_not_change_when_the_picture_is_turned():
    pictures = projected_pictures(boxes(1), axes(ring_cameras(3)))[0]
    first, quarter = described(pictures), described(torch.rot90(pictures, 1, dims=(1, 2)))
    square, polar = slice(0, 1024), slice(1024, None)
    assert torch.nn.functional.cosine_similarity(first[:, polar], quarter[:, polar]).min() > 0.9999
    assert torch.nn.functional.cosine_similarity(first[:, square], quarter[:, square]).max() < 0.95
    torch.testing.assert_close(first[:, square].norm(dim=1), torch.ones(3))
    torch.testing.assert_close(first[:, polar].norm(dim=1), torch.ones(3))


def test_one_point_many_times_and_a_blank_picture_give_finite_features():
    cameras = axes(ring_cameras(2))
    assert projected_features(boxes(1)[:, :1].repeat(1, 20, 1), cameras).isfinite().all()
    assert described(torch.zeros(1, SIZE, SIZE)).abs().max() == 0


def test_cloud_turned_with_its_camera_gives_the_same_picture():
    points = boxes(1)
    cameras = [Camera(azimuth_deg=azimuth, elevation_deg=20.0) for azimuth in (10.0, 100.0)]
    quarter = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    turned = torch.cat([points[..., :3] @ quarter.T, points[..., 3:] @ quarter.T], dim=-1)
    first = projected_features(points, axes(cameras[:1]))
    second = projected_features(turned, axes(cameras[1:]))
    assert torch.nn.functional.cosine_similarity(first, second, dim=-1).min() > 0.999


def test_no_clouds_have_no_features():
    assert projected_features(boxes(1)[:0], axes(ring_cameras(2))).shape == (0, 2, WIDTH)
    assert ProjectionEncoder(6)(boxes(1)[:0]).shape == (0, 6)


def test_encoder_gives_unit_vectors_and_a_gradient_to_every_parameter():
    torch.manual_seed(0)
    encoder, points = ProjectionEncoder(6), boxes(5, 600)
    encoder.adapt(points)
    features = (projected_features(points, encoder.axes) - encoder.mean) / encoder.std
    assert features.flatten(0, 1).mean(dim=0).abs().max() < 1e-3 and features.flatten(0, 1).std(dim=0).max() < 1.01
    found = encoder(points)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5))
    found[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    groups = {group["name"] for group in parameter_groups(encoder, lr=1.0, head_lr=2.0, weight_decay=0.1)}
    assert groups == {"head", "head_no_decay"}  # layers on fixed features learn as fast as the experts
    expected = torch.nn.functional.normalize(encoder.proj(features), dim=-1).mean(dim=1)
    expected = expected + projection._PAIRS_WEIGHT * torch.nn.functional.normalize(encoder.pairs(points), dim=-1)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1))


@pytest.mark.parametrize("side_vectors", [False, True])
def test_learner_adapts_learns_and_survives_its_own_files(side_vectors):
    recipe = AlignmentRecipe(model=AlignmentModel(size="projection", side_vectors=side_vectors, embed_dim=8, num_points=64, num_experts=2))
    torch.manual_seed(0)
    learner = AlignmentLearner(recipe, 5)
    views = torch.randn(6, 3, 5)
    batch = {"points": boxes(6, 64), "group": torch.arange(6), "views": views, "view_mask": torch.ones(6, 3, dtype=torch.bool)}
    learner.adapt(iter([{**batch, "query_views": views, "query_mask": batch["view_mask"]}]))
    learner(batch, "model")["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learner.parameters())
    other = AlignmentLearner(recipe, 5)
    other.load_artifacts(learner.artifacts())
    assert torch.equal(other.eval().embed_cad(batch["points"]), learner.eval().embed_cad(batch["points"]))


def test_encoder_with_side_vectors_keeps_what_it_would_average():
    torch.manual_seed(0)
    encoder, points = ProjectionEncoder(6, side_vectors=True), boxes(4, 600)
    encoder.adapt(points)
    found = encoder(points)
    assert found.shape == (4, projection.NUM_CAMERAS, 6)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(4, projection.NUM_CAMERAS))
    pairs = torch.nn.functional.normalize(encoder.pairs(points), dim=-1)
    for k in range(projection.NUM_CAMERAS):
        view = encoder.proj((projected_features(points, encoder.axes[k : k + 1])[:, 0] - encoder.mean) / encoder.std)
        expected = torch.nn.functional.normalize(view, dim=-1) + projection._PAIRS_WEIGHT * pairs
        torch.testing.assert_close(found[:, k], torch.nn.functional.normalize(expected, dim=-1))


def test_features_that_members_share_give_the_very_same_vectors():
    recipe = AlignmentRecipe(model=AlignmentModel(size="projection", side_vectors=True, embed_dim=8, num_points=64, num_experts=2))
    points = boxes(3, 64)
    first, second = AlignmentLearner(recipe, 5).eval(), AlignmentLearner(recipe, 5).eval()
    features = first.cad_features(points)
    assert torch.equal(second.stored_cad(points, features=features), second.stored_cad(points))
    assert not torch.equal(second.stored_cad(points), first.stored_cad(points))
    pairs = AlignmentLearner(AlignmentRecipe(model=AlignmentModel(size="pairs", embed_dim=8, num_points=64)), 5)
    assert pairs.cad_features(points) is None


def test_recipe_refuses_side_vectors_of_encoders_without_sides():
    with pytest.raises(ValueError, match="projection with --model.side-vectors"):
        AlignmentModel(size="pairs", side_vectors=True)


def test_recipe_refuses_projection_without_normals():
    with pytest.raises(ValueError, match="xyz\\+normals with --model.size projection"):
        AlignmentModel(size="projection", channels="xyz")
