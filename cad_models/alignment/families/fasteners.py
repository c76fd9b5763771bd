"""Fasteners: bolts, screws, nuts, washers."""

import numpy as np
from manifold3d import CrossSection, Manifold, OpType

from cad_models.alignment.families.shapes import (
    HOLE_SEGMENTS,
    ROUND_SEGMENTS,
    Draw,
    block,
    circle_section,
    extruded,
    extruded_along_x,
    hex_chamfered,
    hexagon_section,
    polygon_section,
    rectangle_section,
    revolved,
    rod,
    threaded_rod,
    union,
)


def hex_bolt(d: Draw) -> Manifold:
    diameter = d.real("diameter", 4, 16)
    length = diameter * d.real("length_ratio", 1.5, 6)
    flats, head = diameter * d.real("flats_ratio", 1.5, 1.9), diameter * d.real("head_ratio", 0.5, 0.85)
    threaded = length * d.real("thread_share", 0.3, 0.95)
    solids = [hex_chamfered(extruded(hexagon_section(flats), head), flats, head, False)]
    if d.feature("flange", 0.4):
        solids.append(rod(flats * d.real("flange_ratio", 0.62, 0.8), head * 0.25, 0, flats * 0.55))
    if d.feature("thread", 0.6):
        solids.append(threaded_rod(diameter / 2, threaded, diameter * 0.22).translate((0, 0, -length)))
    else:
        solids.append(rod(diameter * 0.44, threaded, -length))
    solids.append(rod(diameter / 2, length - threaded + 0.01 * length, -(length - threaded) - 0.005 * length))
    body = union(solids)
    if d.feature("cotter_hole", 0.25):
        hole = extruded_along_x(circle_section(diameter * 0.14, HOLE_SEGMENTS), 3 * diameter)
        body -= hole.translate((0, 0, -length + diameter * 0.5))
    if d.feature("drive_slot", 0.2):
        body -= block(3 * flats, diameter * 0.22, head * 0.7, (0, 0, head))
    return body.rotate((180, 0, 0)) if d.feature("head_down") else body


def socket_screw(d: Draw) -> Manifold:
    diameter = d.real("diameter", 3, 14)
    length = diameter * d.real("length_ratio", 1.2, 6)
    head_radius = diameter * d.real("head_ratio", 0.75, 1.0)
    head = diameter * d.real("head_height_ratio", 0.6, 1.1)
    style = d.count("head_style", 0, 2)  # cylinder, button, countersunk
    if style == 0:
        c = head * 0.1
        profile = [(0, 0), (head_radius, 0), (head_radius, head - c), (head_radius - c, head), (0, head)]
    elif style == 1:
        angles = np.linspace(0, np.pi / 2, 12)
        flat = head_radius * 0.45
        profile = [(0, 0)] + [
            (flat + (head_radius - flat) * np.cos(a), head * (0.15 + 0.85 * np.sin(a))) for a in angles
        ]
        profile = [(0, 0), (head_radius, 0), *profile[1:], (0, head)]
    else:
        profile = [(0, 0), (diameter / 2, 0), (head_radius * 1.1, head * 0.9), (head_radius * 1.1, head), (0, head)]
    if d.feature("thread", 0.6):
        shank = threaded_rod(diameter / 2, length, diameter * 0.2)
    else:
        tip = diameter * 0.1
        shank = rod(diameter * 0.42, tip, 0, diameter / 2) + rod(diameter / 2, length - tip, tip)
    body = revolved(profile) + shank.translate((0, 0, -length + 0.005))
    if d.feature("cross_drive", 0.3):
        cross = rectangle_section(head_radius * 1.1, head_radius * 0.24) + rectangle_section(
            head_radius * 0.24, head_radius * 1.1
        )
        body -= extruded(cross, head, head * 0.5)
    else:
        body -= extruded(hexagon_section(diameter * d.real("socket_ratio", 0.65, 0.85)), head, head * 0.45)
    if d.feature("dog_point", 0.3):
        body += rod(diameter * 0.3, diameter * 0.4, -length - diameter * 0.35)
    return body.rotate((180, 0, 0)) if d.feature("head_down") else body


def hex_nut(d: Draw) -> Manifold:
    diameter = d.real("diameter", 4, 24)
    flats, height = diameter * d.real("flats_ratio", 1.45, 1.9), diameter * d.real("height_ratio", 0.35, 1.3)
    body = hex_chamfered(extruded(hexagon_section(flats), height), flats, height, True)
    top = height
    if d.feature("collar", 0.35):
        top = height * d.real("collar_ratio", 1.15, 1.5)
        body += rod(flats * 0.46, top - height * 0.5, height * 0.5, flats * 0.42)
    if d.feature("flange", 0.35):
        radius = flats * d.real("flange_ratio", 0.65, 0.9)
        thick = height * 0.12
        body += rod(radius, thick) + rod(radius, height * 0.2, thick, flats * 0.5)
    body -= rod(diameter / 2 * 0.9, top + 2, -1)
    sink = diameter * d.real("countersink_ratio", 0.02, 0.12)
    body -= rod(diameter / 2 * 0.9 + sink, sink, 0, diameter / 2 * 0.9)
    body -= rod(diameter / 2 * 0.9, sink, top - sink, diameter / 2 * 0.9 + sink)
    if d.feature("castle", 0.3):
        width = diameter * d.real("castle_slot_ratio", 0.15, 0.28)
        bars = union(block(4 * diameter, width, height * 0.4, (0, 0, 0)).rotate((0, 0, 60 * k + 30)) for k in range(3))
        body -= bars.translate((0, 0, top))
    return body


def washer(d: Draw) -> Manifold:
    bore = d.real("bore_radius", 2, 12)
    outer = bore * d.real("outer_ratio", 1.6, 3.2)
    thickness = bore * d.real("thickness_ratio", 0.12, 0.6)
    section = circle_section(outer, 64)
    if d.feature("square", 0.2):
        section = rectangle_section(2 * outer, 2 * outer, outer * 0.15)
    if d.feature("tab", 0.25):
        width = outer * d.real("tab_ratio", 0.4, 1.0)
        section += rectangle_section(outer * 1.2, width, width * 0.2).translate((outer * 1.1, 0))
    if d.feature("external_teeth", 0.25):
        teeth = d.count("num_teeth", 8, 20)
        notch = polygon_section(
            [
                (outer * 0.78, -0.05 * outer),
                (outer * 2, -0.25 * outer),
                (outer * 2, 0.25 * outer),
                (outer * 0.78, 0.05 * outer),
            ]
        )
        section -= CrossSection.batch_boolean([notch.rotate(360 * (k + 0.5) / teeth) for k in range(teeth)], OpType.Add)
    section -= circle_section(bore, ROUND_SEGMENTS)
    if d.feature("bore_key", 0.25):
        section -= rectangle_section(bore, bore * 0.5).translate((-bore * 0.9, 0))
    if d.feature("cone", 0.25):
        # A disc spring: height grows towards the bore.
        rise = outer * d.real("cone_ratio", 0.12, 0.35)
        solid = extruded(section, thickness).refine_to_length(outer * 0.25)
        scale = rise / outer

        def lift(points: np.ndarray) -> np.ndarray:
            radius = np.sqrt(points[:, 0] ** 2 + points[:, 1] ** 2)
            return np.stack([points[:, 0], points[:, 1], points[:, 2] - scale * radius], axis=1)

        return solid.warp_batch(lift)
    solid = extruded(section, thickness)
    if d.feature("split", 0.25):
        gap = block(3 * outer, bore * 0.25, 4 * thickness, (-1.5 * outer, 0, thickness / 2))
        solid -= gap.rotate((35, 0, 0))
    return solid
