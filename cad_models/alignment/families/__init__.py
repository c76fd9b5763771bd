"""The families of generated parts: each is one function from random draws to a solid."""

from collections.abc import Callable

from manifold3d import Manifold

from cad_models.alignment.families.fasteners import hex_bolt, hex_nut, socket_screw, washer
from cad_models.alignment.families.links import clevis, connecting_rod, hinge, impeller, pull_handle
from cad_models.alignment.families.pipes import ball_bearing, pillow_block, pipe_elbow, pipe_tee
from cad_models.alignment.families.shapes import Draw
from cad_models.alignment.families.sheets import (
    enclosure,
    heat_sink,
    l_bracket,
    mounting_plate,
    t_slot_extrusion,
    u_bracket,
)
from cad_models.alignment.families.turned import flange, knob, pulley, spring, spur_gear, stepped_shaft

__all__ = ["FAMILIES", "Draw"]

FAMILIES: dict[str, Callable[[Draw], Manifold]] = {
    family.__name__: family
    for family in (
        hex_bolt,
        l_bracket,
        spur_gear,
        flange,
        pipe_elbow,
        enclosure,
        stepped_shaft,
        hex_nut,
        mounting_plate,
        pulley,
        pillow_block,
        u_bracket,
        spring,
        heat_sink,
        knob,
        t_slot_extrusion,
        clevis,
        pipe_tee,
        washer,
        socket_screw,
        hinge,
        ball_bearing,
        connecting_rod,
        impeller,
        pull_handle,
    )
}
"""Name of each family and the function that builds it; parts take the families in this order."""
