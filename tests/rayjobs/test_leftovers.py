"""Which placement groups are left over, and that they are given back while a job goes on."""

import itertools
import time

import pytest

from rayjobs.leftovers import HeldRoom, _listed, free_leftovers, is_left_over


class TrainController:
    """Named as Ray Train's."""

    def hold(self) -> str:
        import ray
        from ray.util.placement_group import placement_group

        group = placement_group([{"CPU": 1.0}])
        ray.get(group.ready())
        return group.id.hex()


class Other(TrainController):
    """Anybody's."""


@pytest.mark.parametrize("name, dead, own, job_dead", list(itertools.product(("TrainController", "Other", ""), (True, False), (True, False), (True, False))))
def test_only_room_of_dead_controllers_of_this_job_or_of_one_that_ended(name, dead, own, job_dead):
    room = HeldRoom(group="ab", actor_class=name, actor_is_dead=dead, job="01" if own else "02", job_is_dead=job_dead)
    assert is_left_over(room, "01") == (name == "TrainController" and dead and (own or job_dead))


@pytest.mark.ray
def test_room_of_a_killed_controller_is_freed_and_that_of_others_is_not(local_ray):
    import ray
    from ray.util.placement_group import placement_group, placement_group_table

    # By these names Ray, and so what is tested, knows them.
    holders = [ray.remote(num_cpus=0)(cls).remote() for cls in (TrainController, TrainController, Other)]
    killed, alive, other = ray.get([holder.hold.remote() for holder in holders])
    drivers_own = placement_group([{"CPU": 1.0}])
    ray.get(drivers_own.ready())
    for holder in (holders[0], holders[2]):
        ray.kill(holder)
    deadline = time.monotonic() + 30
    while not (found := free_leftovers()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == [killed]
    while (states := {group: entry["state"] for group, entry in placement_group_table().items()})[killed] != "REMOVED" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert states[killed] == "REMOVED"
    assert [states[group] for group in (alive, other, drivers_own.id.hex())] == ["CREATED"] * 3
    assert free_leftovers() == [] and {room.group for room in _listed()} == {alive, other, drivers_own.id.hex()}
