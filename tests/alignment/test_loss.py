"""The contrastive loss against a double loop over objects and views: values, gradients, masks, duplicates, tiles."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from cad_models.alignment.loss import MultiPositiveContrastiveLoss
from cad_models.alignment.sides import SHARPNESS
from cad_models.common import contrastive
from cad_models.common.contrastive import two_way_logsumexp
from tests.shared import REPOSITORY


def naive_loss(cad, image, view_mask, group, scale, positives):
    """One logit at a time, as the definition reads."""

    def cosine(mesh, picture):
        if mesh.dim() == 1:
            return mesh @ picture
        return (sum((SHARPNESS * side @ picture).exp() for side in mesh) / len(mesh)).log() / SHARPNESS

    objects, views, _ = image.shape
    present = [(j, v) for j in range(objects) for v in range(views) if view_mask[j, v]]
    allowed = [[i == j or group[i] != group[j] for j in range(objects)] for i in range(objects)]
    cad_terms, image_terms = [], []
    for i in range(objects):
        logit = {(j, v): scale * cosine(cad[i], image[j, v]) for j, v in present if allowed[i][j]}
        own = [logit[i, v] for v in range(views) if view_mask[i, v]]
        if not own:
            continue
        total = sum(value.exp() for value in logit.values())
        if positives == "outside":
            cad_terms.append(sum(-(value.exp() / total).log() for value in own) / len(own))
        else:
            cad_terms.append(-(sum(value.exp() for value in own) / total).log())
    for j, v in present:
        total = sum((scale * cosine(cad[i], image[j, v])).exp() for i in range(objects) if allowed[i][j])
        image_terms.append(-((scale * cosine(cad[j], image[j, v])).exp() / total).log())
    return (sum(cad_terms) / len(cad_terms) + sum(image_terms) / len(image_terms)) / 2


def random_batch(objects=6, views=4, dim=8, seed=0, dtype=torch.float64, sides=()):
    generator = torch.Generator().manual_seed(seed)
    cad = F.normalize(torch.randn(objects, *sides, dim, generator=generator, dtype=dtype), dim=-1).requires_grad_()
    image = F.normalize(torch.randn(objects, views, dim, generator=generator, dtype=dtype), dim=-1).requires_grad_()
    return cad, image, torch.ones(objects, views, dtype=torch.bool), torch.arange(objects) * 1_000_003 - 2**62


def value_and_gradients(loss, *inputs):
    gradients = torch.autograd.grad(loss, inputs)
    return loss.detach(), gradients


@pytest.mark.parametrize("sides", [(), (1,), (3,)])
@pytest.mark.parametrize("positives", ["outside", "inside"])
@pytest.mark.parametrize("case", ["full", "unequal views", "duplicates", "object without views"])
def test_loss_value_and_gradients_equal_double_loop(case, positives, sides):
    cad, image, view_mask, group = random_batch(sides=sides)
    if case != "full":
        view_mask[1, 2:] = False
        view_mask[4, 0] = False
    if case == "duplicates":
        group[3] = group[0]
        group[5] = group[0]
    if case == "object without views":
        view_mask[2] = False
    loss = MultiPositiveContrastiveLoss(0.1, positives=positives).double()
    value, gradients = value_and_gradients(loss(cad, image, view_mask, group), cad, image)
    expected, expected_gradients = value_and_gradients(
        naive_loss(cad, image, view_mask, group, loss.scale.detach(), positives), cad, image
    )
    torch.testing.assert_close(value, expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-7, rtol=0)


def naive_loss_between_images(image, view_mask, group, scale):
    """One image and one logit at a time."""
    objects, views, _ = image.shape
    present = [(j, v) for j in range(objects) for v in range(views) if view_mask[j, v]]
    terms = []
    for i, v in present:
        own = [(scale * image[i, v] @ image[j, w]).exp() for j, w in present if j == i and w != v]
        others = [(scale * image[i, v] @ image[j, w]).exp() for j, w in present if group[j] != group[i]]
        if own:
            terms.append(-(sum(own) / (sum(own) + sum(others))).log())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("temperature", [0.1, 0.02])  # small logits and large ones are summed in different ways
@pytest.mark.parametrize("case", ["full", "unequal views", "duplicates", "objects with one view or none"])
def test_loss_between_images_value_and_gradients_equal_double_loop(case, temperature):
    _, image, view_mask, group = random_batch()
    if case != "full":
        view_mask[1, 2:] = False
        view_mask[4, 0] = False
    if case == "duplicates":
        group[3] = group[0]
        group[5] = group[0]
    if case == "objects with one view or none":
        view_mask[0, 1:] = False
        view_mask[2] = False
    loss = MultiPositiveContrastiveLoss(temperature, learned=True).double()
    value, gradients = value_and_gradients(loss.between_images(image, view_mask, group), image)
    expected, expected_gradients = value_and_gradients(naive_loss_between_images(image, view_mask, group, loss.scale.detach()), image)
    torch.testing.assert_close(value, expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-7, rtol=0)


def test_loss_between_images_has_hand_value():
    # Objects e1 and e2, two equal views each, scale 1: one positive of logit 1, two negatives of logit 0.
    image = torch.eye(2).unsqueeze(1).repeat(1, 2, 1)
    actual = MultiPositiveContrastiveLoss(temperature=1.0).between_images(image, torch.ones(2, 2, dtype=torch.bool), torch.arange(2))
    assert actual.item() == pytest.approx(math.log(math.e + 2) - 1, abs=1e-6)


@pytest.mark.parametrize("case", ["one view each", "one object", "no views", "only duplicates"])
def test_loss_between_images_without_pairs_is_zero_with_finite_gradient(case):
    _, image, view_mask, group = random_batch(dtype=torch.float32)
    if case == "one view each":
        view_mask[:, 1:] = False
    elif case == "one object":
        view_mask[1:] = False
    elif case == "no views":
        view_mask[:] = False
    else:
        group[:] = 5
    value, (gradient,) = value_and_gradients(MultiPositiveContrastiveLoss().between_images(image, view_mask, group), image)
    assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("positives", ["outside", "inside"])
def test_loss_one_view_equals_symmetric_cross_entropy(positives):
    cad, image, view_mask, group = random_batch(views=1, dtype=torch.float32)
    logits = cad @ image[:, 0].T / 0.07
    target = torch.arange(len(cad))
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    actual = MultiPositiveContrastiveLoss(positives=positives)(cad, image, view_mask, group)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_loss_two_objects_two_views_has_hand_value():
    # Objects e1 and e2, their views equal to them, scale 1: every positive logit is 1, every negative 0.
    cad = torch.eye(2)
    image = torch.eye(2).unsqueeze(1).repeat(1, 2, 1)
    cad_to_image = math.log(2 * math.e + 2) - 1
    image_to_cad = math.log(math.e + 1) - 1
    loss = MultiPositiveContrastiveLoss(temperature=1.0)
    actual = loss(cad, image, torch.ones(2, 2, dtype=torch.bool), torch.arange(2))
    assert actual.item() == pytest.approx((cad_to_image + image_to_cad) / 2, abs=1e-6)


@pytest.mark.parametrize("kept", [0, 30, 1 << 20])
@pytest.mark.parametrize("scale", [-3.0, 20.0, 80.0])
@pytest.mark.parametrize("tile", [(1, 1), (2, 5), (7, 3), (100, 100)])
def test_two_way_logsumexp_in_tiles_equals_whole_matrix(monkeypatch, tile, scale, kept):
    # Scales on both sides of what is exponentiated as it is; tiles kept, some of them, and none.
    monkeypatch.setattr(contrastive, "_KEPT_ELEMENTS", kept)
    cad, image, _, group = random_batch(objects=7, views=3)
    group[2] = group[5]
    columns = image.flatten(0, 1)
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    row_owner, column_owner = torch.arange(7), torch.arange(7).repeat_interleave(3)
    masked = (group.unsqueeze(1) == group[column_owner]) & (row_owner.unsqueeze(1) != column_owner)
    logits = (scale * cad @ columns.T).masked_fill(masked, -torch.inf)
    weights = torch.randn(28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([logits.logsumexp(1), logits.logsumexp(0)])
    actual = torch.cat(
        two_way_logsumexp(
            cad,
            columns,
            scale,
            row_owner=row_owner,
            column_owner=column_owner,
            row_group=group,
            column_group=group[column_owner],
            tile=tile,
        )
    )
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    inputs = (cad, image, scale)
    torch.testing.assert_close(
        torch.autograd.grad(actual @ weights, inputs),
        torch.autograd.grad(expected @ weights, inputs),
        atol=1e-11,
        rtol=0,
    )


def test_loss_of_duplicates_alone_with_a_viewless_one_is_zero_and_finite():
    # The second object has neither a view nor anything to be compared with: its row is -inf throughout.
    cad, image, view_mask, group = random_batch(objects=2)
    view_mask[1], group[1] = False, group[0]
    value, gradients = value_and_gradients(
        MultiPositiveContrastiveLoss(positives="inside")(cad, image, view_mask, group), cad, image
    )
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


@pytest.mark.parametrize("temperature", [0.01, 0.025, 0.07])
def test_loss_in_float32_tiles_equals_float64_in_one(monkeypatch, temperature):
    cad, image, view_mask, group = random_batch(objects=40, views=5, dim=32)
    loss = MultiPositiveContrastiveLoss(temperature)
    exact, exact_gradients = value_and_gradients(loss(cad, image, view_mask, group), cad, image)
    monkeypatch.setattr(contrastive, "_TILE_CPU", (16, 48))
    cad32, image32 = cad.detach().float().requires_grad_(), image.detach().float().requires_grad_()
    value, gradients = value_and_gradients(loss(cad32, image32, view_mask, group), cad32, image32)
    # At scale 100 a float32 logit is exact to about 1e-5.
    assert value.item() == pytest.approx(exact.item(), abs=2e-5)
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.07, 0.01])
def test_loss_memory_of_backward_does_not_grow_with_the_matrix(monkeypatch, temperature):
    # What autograd keeps beyond a bounded number of tiles: nothing of the size objects x images.
    monkeypatch.setattr(contrastive, "_KEPT_ELEMENTS", 0)
    cad, image, view_mask, group = random_batch(objects=64, views=16, dim=4, dtype=torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        MultiPositiveContrastiveLoss(temperature)(cad, image, view_mask, group).backward()
    assert max(sizes) <= 64 * 16 * 4 < 64 * 64 * 16


def test_loss_masked_views_and_their_content_do_not_matter():
    cad, image, view_mask, group = random_batch()
    view_mask[:, 3] = False
    loss = MultiPositiveContrastiveLoss().double()
    value = loss(cad, image, view_mask, group)
    with torch.no_grad():
        other = image.clone()
        other[:, 3] = 1e3
    assert torch.equal(loss(cad, other, view_mask, group), value)
    torch.testing.assert_close(loss(cad, image[:, :3], view_mask[:, :3], group), value, atol=1e-12, rtol=0)


def test_loss_without_any_view_is_zero_with_zero_gradient():
    cad, image, view_mask, group = random_batch()
    value, gradients = value_and_gradients(
        MultiPositiveContrastiveLoss()(cad, image, torch.zeros_like(view_mask), group), cad, image
    )
    assert value.item() == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_loss_of_a_single_object_is_finite_and_pulls_nothing():
    cad, image, view_mask, group = random_batch(objects=1)
    value, gradients = value_and_gradients(
        MultiPositiveContrastiveLoss(positives="inside")(cad, image, view_mask, group), cad, image
    )
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def test_loss_under_bfloat16_autocast_keeps_float32_logits():
    cad, image, view_mask, group = random_batch(dtype=torch.float32)
    loss = MultiPositiveContrastiveLoss()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(cad, image, view_mask, group)
    actual = value_and_gradients(inside, cad, image)
    expected = value_and_gradients(loss(cad, image, view_mask, group), cad, image)
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


def test_learned_temperature_gradient_equals_finite_difference():
    cad, image, view_mask, group = random_batch()
    loss = MultiPositiveContrastiveLoss(0.2, learned=True).double()
    loss(cad, image, view_mask, group).backward()
    step, center = 1e-6, loss.log_scale.item()
    values = []
    for offset in (step, -step):
        loss.log_scale.data.fill_(center + offset)
        values.append(loss(cad, image, view_mask, group).item())
    assert loss.log_scale.grad.item() == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-8)


def test_learned_temperature_beyond_bound_is_clamped_and_can_come_back():
    cad, image, view_mask, group = random_batch()
    loss = MultiPositiveContrastiveLoss(learned=True, max_scale=20.0)
    loss.log_scale.data.fill_(10.0)
    loss(cad, image, view_mask, group).backward()
    assert loss.scale.item() == pytest.approx(20.0, rel=1e-6)
    assert loss.log_scale.grad.item() != 0


def test_fixed_temperature_has_no_parameter():
    assert not list(MultiPositiveContrastiveLoss(0.05).parameters())
    assert MultiPositiveContrastiveLoss(0.05).scale.item() == pytest.approx(20.0)


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"temperature": 0.001}, {"positives": "both"}])
def test_loss_impossible_settings_raise(arguments):
    with pytest.raises(Exception, match="temperature|positives"):
        MultiPositiveContrastiveLoss(**arguments)


_LARGE = """
import resource, torch
from cad_models.alignment.loss import MultiPositiveContrastiveLoss
generator = torch.Generator().manual_seed(0)
cad, image = (torch.empty(*shape).normal_(generator=generator) for shape in ((4096, 1280), (4096, 24, 1280)))
for tensor in (cad, image):
    tensor.div_(tensor.norm(dim=-1, keepdim=True)).requires_grad_()
loss = MultiPositiveContrastiveLoss()(cad, image, torch.ones(4096, 24, dtype=torch.bool), torch.arange(4096))
loss.backward()
assert cad.grad.abs().max() > 0 and image.grad.abs().max() > 0
print(loss.item(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_loss_of_a_large_batch_fits_in_4_gb():
    done = subprocess.run([sys.executable, "-c", _LARGE], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    loss, peak_kb = done.stdout.split()
    # Random vectors: every answer is about as good as another.
    assert math.isfinite(float(loss)) and float(loss) == pytest.approx((math.log(4096 * 24) + math.log(4096)) / 2, abs=0.2)
    assert int(peak_kb) * 1024 < 4e9
