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
_BLOCK_ELEMENTS_CPU = 1 << 19
_BLOCK_ELEMENTS_ACCELERATOR = 1 << 24
# The same for candidates' vectors: they stay in the cache between being gathered and multiplied.
_CANDIDATE_ELEMENTS = 1 << 18
# Scores of one chunk of a search.
_SEARCH_ELEMENTS = 1 << 22
# Columns of a chunk whose maximum is looked at first.
_BLOCK = 32
# Candidates beyond k that a search hands to the exact comparison.
_EXTRA_CANDIDATES = 32
# With fewer queries, converting the gallery costs more than the faster product saves.
_FEWEST_FOR_BFLOAT16 = 128
# Relative error of a product whose two factors were rounded to bfloat16's eight bits, with a margin for their own product.
_BFLOAT16_FACTORS = 2.0**-8 * 1.01
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

    Exact: a search in bfloat16 (many queries, where the processor multiplies such numbers faster) or float32 proposes candidates, which are
    compared exactly; a query for which it could have missed one is searched again more precisely, in the end compared with the whole gallery.
    ``k`` beyond the gallery's size is cut to it. ``chunk`` is the number of gallery items scored at a time. Raises ``ValueError`` for ``k`` below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}: ask for at least one answer a query")
    k = min(k, len(gallery))
    scores = torch.empty(len(queries), k, dtype=torch.float32, device=queries.device)
    index = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
    left = torch.arange(len(queries) if k else 0, device=queries.device)
    for dtype in (torch.bfloat16, torch.float32):
        if dtype == torch.bfloat16 and not (len(left) >= _FEWEST_FOR_BFLOAT16 and _multiplies_bfloat16(queries.device)):
            continue
        if len(left):
            found, candidates, certain = _searched(queries[left].float(), gallery, k, dtype, chunk)
            scores[left], index[left] = found, candidates
            left = left[~certain]
    if len(left):
        for row in left.split(max(1, _block_elements(queries) // len(gallery))):
            exact = _exact_scores(queries[row], gallery)
            every = torch.arange(len(gallery), device=exact.device).expand(len(row), -1)
            scores[row], index[row] = _ordered(exact, every, k)
    return scores, index


def _searched(queries: Tensor, gallery: Tensor, k: int, dtype: torch.dtype, chunk: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``k`` of what a search in ``dtype`` proposes, compared exactly; and for which queries nothing better can have been missed."""
    num_candidates = min(k + _EXTRA_CANDIDATES, len(gallery))
    values, candidates, longest = _proposed(queries, gallery, num_candidates, dtype, chunk)
    scores = torch.empty_like(values)
    rows = max(1, _CANDIDATE_ELEMENTS // max(1, num_candidates * queries.shape[1]))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        # index_select copies whole rows; indexing by a matrix takes twice as long.
        vectors = gallery.index_select(0, candidates[part].flatten()).view(*candidates[part].shape, -1).double()
        scores[part] = torch.bmm(vectors, queries[part].double().unsqueeze(-1)).squeeze(-1).float()
    # What was not proposed scored at most `worst` in the search, so at most `worst + error` in truth. The error of an inner product is below
    # |query| * |item| times: dim * 2^-24 for a sum in float32, and the rounding of the factors. A bfloat16 product is rounded itself, too.
    worst = values.amin(dim=1)
    error = (queries.shape[1] + 2) * 2.0**-24
    error += _BFLOAT16_FACTORS if dtype == torch.bfloat16 else _INPUT_ROUNDING[torch.get_float32_matmul_precision()]
    error = error * queries.norm(dim=1) * longest
    if dtype == torch.bfloat16:
        error = error + 2.0**-8 * worst.abs()
    scores, candidates = _ordered(scores, candidates, k)
    certain = (scores[:, -1] - worst > error) | (num_candidates == len(gallery))
    return scores, candidates, certain


def _proposed(
    queries: Tensor, gallery: Tensor, num_candidates: int, dtype: torch.dtype, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The highest scores in ``dtype`` (as float32) of each query, unordered, and their items; and the length of the longest item."""
    chunk = chunk or max(num_candidates, _SEARCH_ELEMENTS // max(1, len(queries)) // _BLOCK * _BLOCK)
    factors = queries.to(dtype)
    values = queries.new_empty(len(queries), 0)
    candidates = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    longest = queries.new_zeros(())
    for start in range(0, len(gallery), chunk):
        part = gallery[start : start + chunk].float()
        longest = torch.maximum(longest, torch.linalg.vector_norm(part, dim=1).max())
        scores = factors @ part.to(dtype).T
        if values.shape[1] < num_candidates or len(part) % _BLOCK:
            found = scores.topk(min(num_candidates, scores.shape[1]), dim=1)
            new_values, new_items = found.values.float(), found.indices
        else:
            new_values, new_items = _above(scores, values.amin(dim=1))
        values = torch.cat([values, new_values], dim=1)
        candidates = torch.cat([candidates, new_items + start], dim=1)
        if values.shape[1] > num_candidates:
            kept = values.topk(num_candidates, dim=1)
            values, candidates = kept.values, candidates.gather(1, kept.indices)
    return values, candidates, longest


def _above(scores: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of each row above its bound, and their columns: float32 and int64 [rows, most in a row], filled up with -inf and 0.

    Few are left after the first chunk, and finding them through the maxima of blocks is several times faster than topk of everything. A block
    is a set of columns at equal distances, so that the maxima are of whole vectors.
    """
    blocks = scores.unflatten(1, (_BLOCK, -1))
    row, block = (blocks.amax(dim=1).float() > bound.unsqueeze(1)).nonzero(as_tuple=True)
    values = blocks[row, :, block].float()
    hit, place = (values > bound[row].unsqueeze(1)).nonzero(as_tuple=True)
    values, column, row = values[hit, place], place * blocks.shape[2] + block[hit], row[hit]
    count = torch.bincount(row, minlength=len(scores))
    slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    width = int(count.max()) if len(row) else 0
    padded = torch.full((len(scores), width), -torch.inf, device=scores.device)
    columns = torch.zeros(len(scores), width, dtype=torch.int64, device=scores.device)
    padded[row, slot], columns[row, slot] = values, column
    return padded, columns


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products have units of their own, so that they are faster than float32's, and are summed in float32.

    Only on CPUs: elsewhere parts of a sum may be rounded to bfloat16, which the error bound does not cover.
    """
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


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
