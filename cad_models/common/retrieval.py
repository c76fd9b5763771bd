"""Exact retrieval: ranks, the metrics made of them, and top-k search.

Scores are inner products (cosines for unit vectors). Ranks count from 1. What is compared is the inner product summed
in float64 and rounded to float32: rounding errors of the summation, which differ between machines, block sizes and
positions in a matrix, are below that rounding, so equal vectors get equal scores and results do not depend on how the
work is cut.
"""

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

# Bound on the elements of one block of scores: on a CPU what its caches hold (larger ones are slower, and cost memory that grows with the split).
_BLOCK_ELEMENTS_CPU = 1 << 20
_BLOCK_ELEMENTS_ACCELERATOR = 1 << 24
# The same for candidates' vectors: they stay in the cache between being gathered and multiplied.
_CANDIDATE_ELEMENTS = 1 << 18
# Candidates beyond k that the float32 search hands to the exact comparison.
_EXTRA_CANDIDATES = 32
# Relative error of a product whose factors torch.set_float32_matmul_precision lets be TF32 or bfloat16.
_INPUT_ROUNDING = {"highest": 0.0, "high": 2.0**-10, "medium": 2.0**-7}


def ranks(
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    query_group: Int[Tensor, " queries"],
    gallery_group: Int[Tensor, " gallery"],
    *,
    chunk: int | None = None,
) -> Int64[Tensor, " queries"]:
    """Rank (from 1) of each query's best relevant gallery item; relevant = of the same group.

    Ties count against the query: the rank is 1 plus the number of irrelevant items that score at least as high as the
    best relevant one, so a constant embedding is not rewarded. ``chunk`` is the number of queries compared at a time.

    Raises ``ValueError`` when a query has no relevant item.

    >>> gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    >>> ranks(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), gallery, torch.tensor([0, 1]), torch.tensor([0, 1, 2])).tolist()
    [1, 2]
    """
    result = []
    for rows, scores, relevant in _scored(queries, gallery, query_group, gallery_group, chunk):
        best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1)
        _require_relevant(relevant, rows)
        result.append(1 + ((scores >= best.unsqueeze(1)) & ~relevant).sum(dim=1))
    return torch.cat(result) if result else query_group.new_zeros(0, dtype=torch.int64)


def recall_at(ranks: Int[Tensor, " queries"], ks: tuple[int, ...] = (1, 3, 5, 10)) -> dict[str, float]:
    """Share of the queries whose rank is at most k, as ``{"recall@k": share}``; raises ``ValueError`` without queries.

    >>> recall_at(torch.tensor([1, 2, 4]), (1, 3))
    {'recall@1': 0.3333333333333333, 'recall@3': 0.6666666666666666}
    """
    _require_queries(ranks)
    return {f"recall@{k}": (ranks <= k).sum().item() / len(ranks) for k in ks}


def median_rank(ranks: Int[Tensor, " queries"]) -> float:
    """Median rank, the mean of the two middle ones for an even number. Raises ``ValueError`` without queries."""
    _require_queries(ranks)
    ordered = ranks.sort().values
    return (ordered[(len(ranks) - 1) // 2].item() + ordered[len(ranks) // 2].item()) / 2


def mean_average_precision(
    queries: Float[Tensor, "queries dim"],
    gallery: Float[Tensor, "gallery dim"],
    query_group: Int[Tensor, " queries"],
    gallery_group: Int[Tensor, " gallery"],
    *,
    chunk: int | None = None,
) -> float:
    """Mean over the queries of the mean precision at each of their relevant items; ties count against the query.

    Raises ``ValueError`` without queries, or when a query has no relevant item.
    """
    _require_queries(queries)
    total = 0.0
    for rows, scores, relevant in _scored(queries, gallery, query_group, gallery_group, chunk):
        _require_relevant(relevant, rows)
        # Irrelevant items first, then by score with a stable sort: among equal scores the irrelevant ones come first.
        order = relevant.to(torch.int8).sort(dim=1, stable=True).indices
        order = order.gather(1, scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
        hit = relevant.gather(1, order).double()
        position = torch.arange(1, hit.shape[1] + 1, device=hit.device)
        total += ((hit * hit.cumsum(dim=1) / position).sum(dim=1) / hit.sum(dim=1)).sum().item()
    return total / len(queries)


def top_k(
    queries: Float[Tensor, "queries dim"], gallery: Float[Tensor, "gallery dim"], k: int, *, chunk: int | None = None
) -> tuple[Float[Tensor, "queries k"], Int64[Tensor, "queries k"]]:
    """Scores (float32) and gallery indices of each query's ``k`` best items, best first; ties go to the lower index.

    Exact: a float32 search proposes candidates, which are compared exactly; a query for which float32 could have
    missed one is compared with the whole gallery. ``k`` beyond the gallery's size is cut to it. ``chunk`` is the
    number of gallery items scored at a time. Raises ``ValueError`` for ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least one answer a query")
    k = min(k, len(gallery))
    queries32 = queries.float()
    num_candidates = min(k + _EXTRA_CANDIDATES, len(gallery))
    chunk = chunk or max(num_candidates, _block_elements(queries) // max(1, len(queries)))
    values = queries32.new_empty(len(queries), 0)
    candidates = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    longest = queries32.new_zeros(())
    for start in range(0, len(gallery), chunk):
        part = gallery[start : start + chunk].float()
        longest = torch.maximum(longest, part.norm(dim=1).max())
        scores = queries32 @ part.T
        found = scores.topk(min(num_candidates, scores.shape[1]), dim=1)
        values = torch.cat([values, found.values], dim=1)
        candidates = torch.cat([candidates, found.indices + start], dim=1)
        if values.shape[1] > num_candidates:
            kept = values.topk(num_candidates, dim=1)
            values, candidates = kept.values, candidates.gather(1, kept.indices)
    scores = torch.empty_like(values)
    rows = max(1, _CANDIDATE_ELEMENTS // max(1, num_candidates * queries.shape[1]))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        proposed = gallery[candidates[part]].double()
        scores[part] = torch.bmm(proposed, queries[part].double().unsqueeze(-1)).squeeze(-1).float()
    scores, candidates = _ordered(scores, candidates, k)
    if num_candidates < len(gallery):
        # What was not proposed scored at most `worst` in float32, so at most `worst + error` in truth: the error of
        # an inner product of `dim` terms is below dim * 2^-24 * |query| * |item|.
        worst = values.amin(dim=1)
        error = (queries.shape[1] + 2) * 2.0**-24 + _INPUT_ROUNDING[torch.get_float32_matmul_precision()]
        uncertain = (scores[:, -1] - worst <= error * queries32.norm(dim=1) * longest).nonzero().squeeze(1)
        for row in uncertain.split(max(1, _block_elements(queries) // len(gallery))):
            exact = _exact_scores(queries[row], gallery)
            index = torch.arange(len(gallery), device=exact.device).expand(len(row), -1)
            scores[row], candidates[row] = _ordered(exact, index, k)
    return scores, candidates


def _ordered(scores: Tensor, index: Tensor, k: int) -> tuple[Tensor, Tensor]:
    by_index = index.sort(dim=1)
    by_score = scores.gather(1, by_index.indices).sort(dim=1, descending=True, stable=True)
    return by_score.values[:, :k], by_index.values.gather(1, by_score.indices[:, :k])


def _exact_scores(queries: Tensor, gallery: Tensor) -> Tensor:
    return (queries.double() @ gallery.double().T).float()


def _scored(queries: Tensor, gallery: Tensor, query_group: Tensor, gallery_group: Tensor, chunk: int | None):
    chunk = chunk or max(1, _block_elements(queries) // max(1, len(gallery)))
    gallery = gallery.double()
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        scores = (queries[rows].double() @ gallery.T).float()
        yield rows, scores, query_group[rows].unsqueeze(1) == gallery_group


def _block_elements(queries: Tensor) -> int:
    return _BLOCK_ELEMENTS_CPU if queries.device.type == "cpu" else _BLOCK_ELEMENTS_ACCELERATOR


def _require_relevant(relevant: Tensor, rows: slice) -> None:
    without = (~relevant.any(dim=1)).nonzero()
    if len(without):
        raise ValueError(
            f"query {rows.start + without[0].item()} has no gallery item of its group: leave queries without a rank out"
        )


def _require_queries(queries: Tensor) -> None:
    if not len(queries):
        raise ValueError("there are no queries: a metric over none has no value")
