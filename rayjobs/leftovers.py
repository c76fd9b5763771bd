"""Room in the cluster that nobody uses and Ray does not give back.

Ray Train's controller, an actor, holds its workers' room in a placement group. Ray frees that when the *job* ends. A trial's controller that is killed, with its trial or its node, leaves it
held for as long as the search goes on, and sometimes after that: a search that loses trials again and again would come to wait for room that its dead
trials hold. Ray Train starts a process a training to watch for this; where it steps in it does not end itself, and it does not know of groups whose workers
were just starting. So trainings start without it, and whoever started them looks here now and then.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

_CONTROLLER = "TrainController"


@dataclass(frozen=True, kw_only=True)
class HeldRoom:
    """A placement group, and the actor that made it."""

    group: str
    """Its identifier, hexadecimal."""
    actor_class: str
    """Class of the actor; empty when a driver made the group."""
    actor_is_dead: bool
    job: str
    job_is_dead: bool


def is_left_over(room: HeldRoom, own_job: str) -> bool:
    """Whether a training's controller made it and is gone, in this job or in one that ended."""
    return room.actor_class == _CONTROLLER and room.actor_is_dead and (room.job == own_job or room.job_is_dead)


def free_leftovers(listed: Callable[[], Iterator[HeldRoom]] | None = None, remove: Callable[[str], None] | None = None) -> list[str]:
    """Give back the room that dead controllers hold; needs Ray.

    Args:
        listed: What there is; None = asked of Ray.
        remove: Frees a group; None = Ray's.

    Returns:
        Identifiers of the groups that were removed.
    """
    import ray

    own_job = ray.get_runtime_context().get_job_id()
    found = [room.group for room in (listed or _listed)() if is_left_over(room, own_job)]
    for group in found:
        (remove or _remove)(group)
    return found


def _listed() -> Iterator[HeldRoom]:
    import ray

    # Ray's public tables name neither a group's creator nor what became of it.
    from ray._private.state import state
    from ray.core.generated import gcs_pb2

    accessor = state._connect_and_get_accessor()
    gone = {gcs_pb2.PlacementGroupTableData.PlacementGroupState.REMOVED}
    groups = [gcs_pb2.PlacementGroupTableData.FromString(data) for data in accessor.get_placement_group_table()]
    groups = [group for group in groups if group.state not in gone and not group.is_detached]
    if not groups:
        return
    dead_jobs = {job["JobID"] for job in state.job_table() if job["IsDead"]}
    for group in groups:
        # One by one: the table of all actors grows with everything that the cluster has done.
        data = accessor.get_actor_info(ray.ActorID(group.creator_actor_id)) if group.creator_actor_id else None
        actor = None if data is None else gcs_pb2.ActorTableData.FromString(data)
        job = group.creator_job_id.hex()
        yield HeldRoom(
            group=group.placement_group_id.hex(),
            actor_class="" if actor is None else actor.class_name,
            actor_is_dead=actor is not None and actor.state == gcs_pb2.ActorTableData.ActorState.DEAD,
            job=job,
            job_is_dead=job in dead_jobs,
        )


def _remove(group: str) -> None:
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))
