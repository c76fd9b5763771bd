"""A guard against getting slow: a cheap part of the benchmarks as ratios to plain code, with wide bounds, so that a busy machine does not matter.

CPU seconds of this process; a bound counts as missed only when three attempts miss it. Bounds are about half of what was measured.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks import contrastive_loss, mixture_of_experts, point_groups
from benchmarks.measure import seconds_in_turn, times_better
from cad_models.alignment.model_config import HeadConfig
from cad_models.alignment.moe import MixtureOfExperts
from cad_models.alignment.projection import ProjectionEncoder, described, projected_features, projected_pictures
from cad_models.common.retrieval import top_k


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_times_faster(bound: float, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    """Median of three turns above the bound, in one of three attempts."""
    found = []
    for _ in range(3):
        seconds = seconds_in_turn({"ours": ours, "theirs": theirs}, rounds=3)
        found.append(times_better(seconds["ours"], seconds["theirs"])[0])
        if found[-1] >= bound:
            return
    raise AssertionError(f"{bound} times faster was expected, found {', '.join(f'{ratio:.2f}' for ratio in found)}")


def test_patches_are_several_times_faster_than_the_plain_loop():
    points = point_groups.clouds(1, 6_000)
    point_groups.check_equal(point_groups.naive(points), point_groups.ours(points), where="naive")
    assert_times_faster(6, lambda: point_groups.ours(points), lambda: point_groups.naive(points))


def test_compiled_projection_is_faster_than_plain_torch():
    points = torch.cat([point_groups.clouds(1, 6_000), F.normalize(torch.randn(1, 6_000, 3), dim=-1)], dim=-1)
    axes = ProjectionEncoder(4).axes
    assert_times_faster(1.1, lambda: projected_features(points, axes), lambda: described(projected_pictures(points, axes).flatten(0, 1)))


def test_contrastive_loss_is_faster_than_full_logits():
    contrastive_loss.check_equal(64)
    cad, image = contrastive_loss.inputs(512)
    assert_times_faster(1.1, lambda: contrastive_loss.step("ours", cad, image), lambda: contrastive_loss.step("naive", cad, image))


def test_contrastive_loss_holds_no_whole_matrix_of_logits_beyond_its_tiles():
    # What autograd keeps between forward and backward, counted: tiles, at most once the matrix; naive keeps several.
    def kept(kind: str) -> int:
        cad, image = contrastive_loss.inputs(256)
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            if kind == "naive":
                loss = contrastive_loss.naive_loss(cad, image)
            else:
                mask = torch.ones(image.shape[:2], dtype=torch.bool)
                loss = contrastive_loss.MultiPositiveContrastiveLoss(0.07)(cad, image, mask, torch.arange(256))
        assert loss.requires_grad
        return sum(sizes.values()) - image.nbytes

    matrix = 4 * 256 * 256 * contrastive_loss.NUM_VIEWS
    assert kept("ours") < 1.6 * matrix < kept("naive")


def test_routed_experts_are_faster_than_dense_ones():
    torch.manual_seed(0)
    head = MixtureOfExperts(HeadConfig(num_experts=16, top_k=1), in_dim=256, embed_dim=256)
    x, upstream = torch.randn(1024, 256), torch.randn(1024, 256)
    mixture_of_experts.check_equal(head, x[:64], upstream[:64])
    step = mixture_of_experts.step
    assert_times_faster(2, lambda: step(head, x, "ours", upstream), lambda: step(head, x, "dense", upstream))


def test_exact_search_costs_little_more_than_the_product_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (F.normalize(torch.randn(n, 256, generator=generator), dim=1) for n in (256, 20_000))
    # A full conversion of the gallery, or a topk of everything in every chunk, would show here.
    assert_times_faster(0.5, lambda: top_k(queries, gallery, 10), lambda: (queries @ gallery.T).topk(10, dim=1))


def test_one_query_never_converts_the_whole_gallery():
    generator = torch.Generator().manual_seed(0)
    query, gallery = (F.normalize(torch.randn(n, 512, generator=generator), dim=1) for n in (1, 20_000))
    assert_times_faster(1.0, lambda: top_k(query, gallery, 10), lambda: query.double() @ gallery.double().T)
