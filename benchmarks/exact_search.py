"""Row 8. Exact search: the 10 best of 100,000 vectors of width 1,280 for 1,000 queries, on one thread, answers identical.

Rival: faiss flat index (inner product). A gallery as embeddings are (clusters of near neighbours), beside one without any structure.
"""

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Comparison, Settings, compared, product_flops, row_main, seconds_in_turn
from cad_models.common.retrieval import top_k

WIDTH, K = 1280, 10


def vectors(num_queries: int, num_items: int, *, clustered: bool) -> tuple[Tensor, Tensor]:
    """Unit queries and gallery; clustered: 2,000 families, queries near a member of one."""
    generator = torch.Generator().manual_seed(0)
    gallery = torch.randn(num_items, WIDTH, generator=generator)
    queries = torch.randn(num_queries, WIDTH, generator=generator)
    if clustered:
        families = F.normalize(torch.randn(2_000, WIDTH, generator=generator), dim=1) * WIDTH**0.5
        member = torch.randint(0, 2_000, (num_items,), generator=generator)
        gallery = 0.5 * gallery + families[member]
        queries = 0.5 * queries + gallery[torch.randint(0, num_items, (num_queries,), generator=generator)]
    return F.normalize(queries, dim=1), F.normalize(gallery, dim=1)


def run(settings: Settings) -> list[Comparison]:
    """Time both kinds of galleries, and a single query."""
    import faiss

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    flops = product_flops("bfloat16")
    found = []
    num_queries, num_items = settings.pick((1_000, 100_000), (200, 5_000))
    for clustered in (True, False):
        queries, gallery = vectors(num_queries, num_items, clustered=clustered)
        index = faiss.IndexFlatIP(WIDTH)
        index.add(gallery.numpy())
        scores, answers = top_k(queries, gallery, K)
        theirs = torch.from_numpy(index.search(queries.numpy(), K)[1])
        # faiss compares float32 sums, ours the exact ones: where two items differ by less than that rounding faiss may swap them.
        swapped = scores.gather(1, scores.sort(dim=1, descending=True).indices) - (queries.unsqueeze(1) @ gallery[theirs].transpose(1, 2)).squeeze(1)
        assert (answers == theirs).float().mean() > 0.99 and swapped.abs().max() < 1e-5, "faiss gives other answers"
        rivals = {"ours": lambda q=queries, g=gallery: top_k(q, g, K), "faiss": lambda q=queries, i=index: i.search(q.numpy(), K)}
        seconds = seconds_in_turn(rivals, rounds=settings.pick(3 if clustered else 2, 1), warm=False)
        share = 2 * num_queries * num_items * WIDTH / flops / statistics.median(seconds["ours"])
        kind = "clustered" if clustered else "unstructured"
        what = f"top-{K} of {num_items:,} × {WIDTH:,} ({kind}), {num_queries:,} queries"
        limit = {"limit_share": share, "limit": "of a bfloat16 product at peak"}
        found.append(compared(8, what, "faiss flat", seconds["ours"], seconds["faiss"], at_least=2, **limit))
        if clustered:
            one = {"ours": lambda q=queries, g=gallery: top_k(q[:1], g, K), "faiss": lambda q=queries, i=index: i.search(q[:1].numpy(), K)}
            seconds = seconds_in_turn(one, rounds=settings.pick(9, 1))
            found.append(compared(8, f"top-{K} of {num_items:,} × {WIDTH:,}, one query", "faiss flat", seconds["ours"], seconds["faiss"]))
        del queries, gallery, index, rivals
    return found


if __name__ == "__main__":
    row_main(run)
