"""Ranks, metrics and top-k search against loops over sorted Python lists."""

import pytest
import torch
import torch.nn.functional as F

from cad_models.common import retrieval as retrieval_module
from cad_models.common.retrieval import mean_average_precision, median_rank, ranks, recall_at, top_k


def naive_scores(query, gallery):
    return [torch.dot(query.double(), item.double()).float().item() for item in gallery]


def naive_rank(query, gallery, group, gallery_group):
    scores = naive_scores(query, gallery)
    best = max(score for score, other in zip(scores, gallery_group, strict=True) if other == group)
    return 1 + sum(score >= best for score, other in zip(scores, gallery_group, strict=True) if other != group)


def naive_average_precision(query, gallery, group, gallery_group):
    scored = zip(naive_scores(query, gallery), gallery_group, strict=True)
    ordered = sorted(scored, key=lambda pair: (-pair[0], pair[1] == group))
    precisions, hits = [], 0
    for position, (_, other) in enumerate(ordered, start=1):
        if other == group:
            hits += 1
            precisions.append(hits / position)
    return sum(precisions) / len(precisions)


@pytest.fixture
def retrieval():
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(60, 5, generator=generator).round()  # coarse: many exact ties
    queries = torch.randn(23, 5, generator=generator).round()
    gallery_group = torch.arange(60) % 20
    query_group = torch.arange(23) % 20
    return queries, gallery, query_group, gallery_group


@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
def test_ranks_with_ties_equal_naive_for_every_chunk(retrieval, chunk):
    queries, gallery, query_group, gallery_group = retrieval
    expected = [
        naive_rank(q, gallery, g, gallery_group.tolist()) for q, g in zip(queries, query_group.tolist(), strict=True)
    ]
    assert ranks(*retrieval, chunk=chunk).tolist() == expected


def test_ranks_of_constant_embedding_are_last():
    ones = torch.ones(10, 4)
    assert ranks(ones, ones, torch.arange(10), torch.arange(10)).tolist() == [10] * 10


def test_ranks_of_equal_vectors_tie_wherever_they_stand():
    # 1,283 columns and a width of 1,280: edges of matrix-product kernels, where float32 sums differ in the last bit.
    generator = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(3, 1280, generator=generator), dim=1)
    gallery = F.normalize(torch.randn(1, 1280, generator=generator), dim=1).repeat(1283, 1)
    assert ranks(query, gallery, torch.zeros(3, dtype=torch.int64), torch.arange(1283)).tolist() == [1283] * 3


def test_ranks_query_without_relevant_item_raises_naming_it():
    with pytest.raises(ValueError, match="query 1 has no gallery item"):
        ranks(torch.eye(2), torch.eye(2), torch.tensor([0, 7]), torch.tensor([0, 1]), chunk=1)


def test_recall_and_median_by_hand():
    found = torch.tensor([1, 2, 3, 11])
    assert recall_at(found, (1, 3, 10)) == {"recall@1": 0.25, "recall@3": 0.75, "recall@10": 0.75}
    assert median_rank(found) == 2.5
    assert median_rank(found[:3]) == 2.0


def test_recall_without_queries_raises():
    with pytest.raises(ValueError, match="no queries"):
        recall_at(torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize("chunk", [None, 4])
def test_mean_average_precision_with_ties_equals_naive(retrieval, chunk):
    queries, gallery, query_group, gallery_group = retrieval
    expected = [
        naive_average_precision(q, gallery, g, gallery_group.tolist())
        for q, g in zip(queries, query_group.tolist(), strict=True)
    ]
    assert mean_average_precision(*retrieval, chunk=chunk) == pytest.approx(sum(expected) / len(expected), abs=1e-12)


@pytest.mark.parametrize("k", [1, 3, 60, 100])
@pytest.mark.parametrize("chunk", [None, 13])
def test_top_k_with_ties_equals_sorted_list(retrieval, k, chunk):
    queries, gallery, _, _ = retrieval
    scores, index = top_k(queries, gallery, k, chunk=chunk)
    for query, found_scores, found in zip(queries, scores, index, strict=True):
        expected = sorted(enumerate(naive_scores(query, gallery)), key=lambda pair: (-pair[1], pair[0]))[:k]
        assert found.tolist() == [i for i, _ in expected]
        assert found_scores.tolist() == [score for _, score in expected]


def test_top_k_many_equal_items_beyond_the_candidates_gives_lowest_indices():
    generator = torch.Generator().manual_seed(1)
    item = F.normalize(torch.randn(1, 64, generator=generator), dim=1)
    far = F.normalize(torch.randn(300, 64, generator=generator), dim=1)
    gallery = torch.cat([far[:150], item.repeat(200, 1), far[150:]])
    _, index = top_k(item, gallery, 5, chunk=97)
    assert index.tolist() == [[150, 151, 152, 153, 154]]


def test_top_k_near_ties_below_float32_search_error_equals_exact_order():
    # Items a few float32 steps apart around the query: the float32 search alone misorders them.
    generator = torch.Generator().manual_seed(2)
    query = F.normalize(torch.randn(4, 512, generator=generator), dim=1)
    gallery = F.normalize(query[:1] + 1e-4 * torch.randn(400, 512, generator=generator), dim=1)
    scores, index = top_k(query, gallery, 10, chunk=64)
    exact = (query.double() @ gallery.double().T).float().sort(dim=1, descending=True, stable=True)
    assert torch.equal(index, exact.indices[:, :10])
    assert torch.equal(scores, exact.values[:, :10])


def test_top_k_of_half_precision_gallery_equals_that_of_its_values():
    generator = torch.Generator().manual_seed(3)
    gallery = F.normalize(torch.randn(500, 48, generator=generator), dim=1).half()
    queries = gallery[:7].float()
    found, expected = top_k(queries, gallery, 4, chunk=90), top_k(queries, gallery.float(), 4)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("sizes", [(0, 5), (3, 0)])
def test_top_k_of_nothing_is_empty(sizes):
    scores, index = top_k(torch.ones(sizes[0], 4), torch.ones(sizes[1], 4), 2)
    assert scores.numel() == index.numel() == 0 and len(index) == sizes[0]


def test_top_k_zero_raises():
    with pytest.raises(ValueError, match="k is 0"):
        top_k(torch.eye(2), torch.eye(2), 0)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("clustered", [True, False])
def test_top_k_of_many_queries_with_and_without_bfloat16_units_equals_exact_order(native, clustered, monkeypatch):
    # Clusters of 60 items closer than bfloat16 can tell send their queries on to float32, and to the whole gallery.
    monkeypatch.setattr(retrieval_module, "_multiplies_bfloat16", lambda device: native)
    generator = torch.Generator().manual_seed(3)
    gallery = torch.randn(3000, 96, generator=generator)
    if clustered:
        gallery = gallery[:50].repeat(60, 1) + 1e-4 * gallery
    gallery = F.normalize(gallery, dim=1)
    queries = F.normalize(gallery[:200] + 0.05 * torch.randn(200, 96, generator=generator), dim=1)
    exact = (queries.double() @ gallery.double().T).float().sort(dim=1, descending=True, stable=True)
    for chunk in (None, 320, 333):
        scores, index = top_k(queries, gallery, 10, chunk=chunk)
        assert torch.equal(index, exact.indices[:, :10])
        assert torch.equal(scores, exact.values[:, :10])


def test_scores_above_a_bound_equal_those_found_one_by_one():
    generator = torch.Generator().manual_seed(4)
    scores, bound = torch.randn(7, 96, generator=generator), torch.tensor([-9.0, 0.0, 1.0, 2.0, 9.0, -torch.inf, torch.inf])
    values, columns = retrieval_module._above(scores, bound)
    for row in range(7):
        expected = {(column, scores[row, column].item()) for column in range(96) if scores[row, column] > bound[row]}
        real = values[row] > -torch.inf
        assert {(c, v) for c, v in zip(columns[row][real].tolist(), values[row][real].tolist(), strict=True)} == expected


def test_top_k_bfloat16_error_bound_covers_every_product():
    # The bound is what exactness rests on: no product of the search may be off by more.
    generator = torch.Generator().manual_seed(5)
    queries, gallery = torch.randn(150, 200, generator=generator), 3 * torch.randn(400, 200, generator=generator)
    searched = (queries.bfloat16() @ gallery.bfloat16().T).double()
    exact = queries.double() @ gallery.double().T
    lengths = queries.double().norm(dim=1)[:, None] * gallery.double().norm(dim=1)
    bound = (202 * 2.0**-24 + retrieval_module._BFLOAT16_FACTORS) * lengths + 2.0**-8 * searched.abs()
    assert ((searched - exact).abs() <= bound).all()
