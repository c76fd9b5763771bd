"""Which objects make which batch: once an epoch, the same for every number of workers, resumable."""

import numpy as np
import pytest

from cad_models.order import StreamOrder, WholeOrder, num_shards, object_rng, shuffled


def global_batch(order: WholeOrder, epoch: int, step: int, world_size: int) -> np.ndarray:
    shares = [order.rows(epoch, step, rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {order.batch_size // world_size}
    return np.concatenate(shares)


@pytest.mark.parametrize(
    "batch_size, world_size, expected",
    [(32, 1, 8), (32, 2, 8), (32, 8, 8), (12, 1, 6), (12, 2, 6), (12, 3, 6), (12, 4, 4), (7, 1, 7), (1, 1, 1), (48, 16, 16), (22, 11, 11)],
)
def test_num_shards_is_the_most_that_fit(batch_size, world_size, expected):
    assert num_shards(batch_size, world_size) == expected


@pytest.mark.parametrize("batch_size, world_size, remedy", [(10, 4, "12"), (3, 8, "8")])
def test_num_shards_of_a_batch_that_cannot_be_shared_names_a_size_that_can(batch_size, world_size, remedy):
    with pytest.raises(ValueError, match=f"--batch-size {batch_size} .*--scale.num-workers {world_size}.* as {remedy}"):
        num_shards(batch_size, world_size)


@pytest.mark.parametrize("num_rows, batch_size", [(37, 8), (64, 16), (8, 8), (100, 12)])
def test_whole_order_takes_every_row_at_most_once_an_epoch(num_rows, batch_size):
    order = WholeOrder(num_rows, batch_size, seed=3)
    for epoch in range(3):
        seen = np.concatenate([global_batch(order, epoch, step, 1) for step in range(order.num_steps)])
        assert len(seen) == order.num_steps * batch_size > num_rows - batch_size
        assert len(np.unique(seen)) == len(seen) and seen.min() >= 0 and seen.max() < num_rows


def test_whole_order_is_the_same_for_every_number_of_workers():
    order = WholeOrder(70, 16, seed=1)
    for step in range(order.num_steps):
        whole = np.sort(global_batch(order, 2, step, 1))
        for world_size in (2, 4, 8, 16):
            np.testing.assert_array_equal(np.sort(global_batch(order, 2, step, world_size)), whole)


def test_whole_order_differs_between_epochs_and_seeds():
    order = WholeOrder(64, 8, seed=1)
    first = order.rows(0, 0, 0, 1)
    assert not np.array_equal(np.sort(first), np.sort(order.rows(1, 0, 0, 1)))
    assert not np.array_equal(np.sort(first), np.sort(WholeOrder(64, 8, seed=2).rows(0, 0, 0, 1)))
    np.testing.assert_array_equal(first, WholeOrder(64, 8, seed=1).rows(0, 0, 0, 1))


PARTS = [4, 0, 7, 3, 5, 6, 1, 9, 8, 2, 7, 7, 5, 3, 4, 6, 8, 8, 1, 2, 6, 6, 5, 9]


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_stream_order_deals_every_part_to_one_shard(shards):
    windows = StreamOrder(PARTS, 8, seed=5).windows(1, shards)
    assert len(windows) == shards
    dealt = [part for mine in windows for window in mine for part in window.parts]
    assert sorted(dealt) == [p for p, rows in enumerate(PARTS) if rows]
    for shard, mine in enumerate(windows):
        start = 0
        for window in mine:
            assert (window.shard, window.start) == (shard, start) and len(window.parts) <= 4
            start += sum(PARTS[p] for p in window.parts)


def test_stream_order_windows_do_not_depend_on_the_workers_and_differ_between_epochs():
    order = StreamOrder(PARTS, 16, seed=5)
    assert [num_shards(16, w) for w in (1, 2, 4, 8)] == [8] * 4
    assert order.num_steps(0, 1) == order.num_steps(0, 2) == order.num_steps(0, 4) > 0
    assert order.windows(0, 8) == order.windows(0, 8) != order.windows(1, 8)
    # Two windows of the same parts are shuffled apart: in another epoch, and in another shard.
    window = order.windows(0, 8)[0][0]
    rows = sum(PARTS[p] for p in window.parts)
    assert sorted(shuffled(rows, window)) == list(range(rows))
    assert len({w.seed for epoch in range(3) for mine in order.windows(epoch, 8) for w in mine}) == sum(
        len(mine) for epoch in range(3) for mine in order.windows(epoch, 8)
    )


def test_stream_order_bounds_the_epoch_by_the_shard_with_the_fewest_rows():
    order = StreamOrder(PARTS, 16, seed=5)
    rows = [sum(PARTS[p] for w in mine for p in w.parts) for mine in order.windows(3, 8)]
    assert order.num_steps(3, 2) == min(rows) // 2
    # Dealt by rows: with parts of at most 9, no shard lags by more than one part.
    assert max(rows) - min(rows) <= 9


@pytest.mark.parametrize("epoch", range(5))
def test_stream_order_with_one_small_last_part_loses_little(epoch):
    order = StreamOrder([16] * 8 + [3], 32, seed=0)
    assert order.num_steps(epoch, 2) >= 3  # of 4: the shard that begins with the part of 3 rows gets another


def test_stream_order_with_fewer_parts_than_shards_has_no_step():
    assert StreamOrder([16] * 5, 32, seed=0).num_steps(0, 1) == 0


def test_object_rng_depends_on_seed_epoch_and_object_alone():
    draws = {(s, e, k): object_rng(s, e, k).random() for s in (0, 1) for e in (0, 1) for k in (0, 1, 2**20)}
    assert len(set(draws.values())) == len(draws)
    assert object_rng(1, 1, 2**20).random() == draws[1, 1, 2**20]
