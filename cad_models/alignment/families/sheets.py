"""Sheet, plate and profile parts: brackets, plates, enclosures, heat sinks, extrusions."""

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
    extruded_along_y,
    placed,
    polygon_section,
    rectangle_section,
    rod,
    slot_section,
    union,
)


def l_bracket(d: Draw) -> Manifold:
    width, leg, height = d.real("width", 15, 60), d.real("leg", 20, 80), d.real("height", 20, 90)
    thickness = d.real("thickness", 2, 7)
    radius = thickness * d.real("bend_ratio", 0.3, 1.5)
    turn = np.linspace(np.pi, 1.5 * np.pi, 9)
    inner = [(thickness + radius + radius * np.cos(a), thickness + radius + radius * np.sin(a)) for a in turn]
    outline = [(0, 0), (leg, 0), (leg, thickness), *inner[::-1], (thickness, height), (0, height)]
    if d.feature("outer_bend", 0.6):
        big = radius + thickness * 0.6
        bend = [(big + big * np.cos(a), big + big * np.sin(a)) for a in turn]
        outline = [*bend, *outline[1:]]
    body = extruded_along_y(polygon_section(outline), width)
    corner = width * d.real("corner_ratio", 0.05, 0.3)
    # Round the outer corners of both legs by intersecting with their plan outlines.
    plan = rectangle_section(2 * leg, width, min(corner, leg * 0.3))
    front = rectangle_section(width, 2 * height, min(corner, height * 0.3))
    body ^= extruded(plan, height)
    body ^= extruded_along_x(front, 4 * leg)
    hole = min(width * d.real("hole_ratio", 0.08, 0.18), leg * 0.12, height * 0.12)
    rows = d.count("hole_columns", 1, 2)
    ys = [0.0] if rows == 1 else [-width * 0.24, width * 0.24]
    cut = (
        slot_section(min(hole * 4, leg * 0.4), hole * 2)
        if d.feature("slots", 0.4)
        else circle_section(hole, HOLE_SEGMENTS)
    )
    x, z = leg * d.real("hole_x", 0.6, 0.68), height * d.real("hole_z", 0.6, 0.75)
    body -= extruded(placed(cut, [(x, y) for y in ys]), 4 * thickness, -thickness)
    body -= extruded_along_x(placed(circle_section(hole, HOLE_SEGMENTS), [(y, z) for y in ys]), 4 * thickness)
    if d.feature("gusset", 0.5):
        reach = d.real("gusset_ratio", 0.35, 0.55)
        rib = polygon_section(
            [(thickness * 0.5, thickness * 0.5), (leg * reach, thickness * 0.5), (thickness * 0.5, height * reach)]
        )
        web = extruded_along_y(rib, thickness)
        offset = width * 0.5 - thickness * 0.5
        if d.feature("two_gussets"):
            body += (web.translate((0, offset, 0)) + web.translate((0, -offset, 0))) ^ block(
                4 * leg, width, 4 * height, (0, 0, 0)
            )
        elif rows == 2:
            body += web
    return body


def u_bracket(d: Draw) -> Manifold:
    width, height, depth = d.real("width", 20, 70), d.real("height", 15, 70), d.real("depth", 12, 60)
    thickness = d.real("thickness", 1.5, 5.5)
    radius = thickness * d.real("bend_ratio", 1.1, 2.2)
    outer = rectangle_section(width, 2 * height, radius)
    inner = rectangle_section(width - 2 * thickness, 2 * height, max(radius - thickness, 0.1)).translate((0, thickness))
    lower = CrossSection.square((2 * width, height), False).translate((-width, -height))
    body = extruded_along_y((outer - inner) ^ lower, depth).translate((0, 0, height))
    if d.feature("ears", 0.45):
        ear = d.real("ear_length", 8, 25)
        plate = rectangle_section(width + 2 * ear, depth, min(depth * 0.2, ear * 0.4)) - rectangle_section(
            width - 1.9 * thickness, 2 * depth
        )
        plate -= placed(
            circle_section(min(ear, depth) * 0.2, HOLE_SEGMENTS), [(s * (width + ear) / 2, 0) for s in (-1, 1)]
        )
        body += extruded(plate, thickness, height - thickness)
    elif d.feature("rounded_arms", 0.4):
        arms = extruded(rectangle_section(4 * width, 2 * depth), height * 0.6) + extruded_along_x(
            CrossSection.batch_hull(
                [
                    rectangle_section(depth, 0.2).translate((0, height * 0.55)),
                    circle_section(depth / 2).translate((0, max(height - depth / 2, height * 0.56))),
                ]
            ),
            8 * width,
        )
        body ^= arms
    hole = min(depth * d.real("hole_ratio", 0.1, 0.22), width * 0.2, height * 0.2)
    side = circle_section(hole, HOLE_SEGMENTS).translate((0, height * d.real("hole_height", 0.5, 0.62)))
    body -= extruded_along_x(side, 2 * width)
    if d.feature("base_slot", 0.5):
        body -= extruded(slot_section(min(width * 0.5, hole * 5), hole * 1.4), 3 * thickness, -thickness)
    else:
        body -= extruded(circle_section(hole * 1.3, HOLE_SEGMENTS), 3 * thickness, -thickness)
    return body


def mounting_plate(d: Draw) -> Manifold:
    length, width, thickness = d.real("length", 40, 140), d.real("width", 25, 90), d.real("thickness", 2, 12)
    short = min(length, width)
    corner = short * d.real("corner_ratio", 0.04, 0.3)
    section = rectangle_section(length, width, corner)
    hole, inset = short * d.real("hole_ratio", 0.035, 0.08), short * d.real("inset_ratio", 0.14, 0.2)
    columns, rows = d.count("hole_columns", 2, 5), d.count("hole_rows", 2, 3)
    hole = min(hole, (length - 2 * inset) / (columns - 1) * 0.22, (width - 2 * inset) / (rows - 1) * 0.22)
    xs, ys = (
        np.linspace(-length / 2 + inset, length / 2 - inset, columns),
        np.linspace(-width / 2 + inset, width / 2 - inset, rows),
    )
    places = [(x, y) for x in xs for y in ys if abs(x) > length / 2 - inset - 1e-6 or abs(y) > width / 2 - inset - 1e-6]
    if d.feature("missing_hole", 0.25):
        places = places[1:]
    section -= placed(circle_section(hole, HOLE_SEGMENTS), places)
    inner = short * 0.5 - inset - hole * 1.8
    centre = d.count("centre", 0, 3)  # closed, round window, two slots, rectangular window
    if centre == 1:
        section -= circle_section(inner * d.real("window_ratio", 0.5, 0.95), ROUND_SEGMENTS)
    elif centre == 2:
        slot = slot_section((length - 2 * inset - 4 * hole) * d.real("slot_ratio", 0.4, 0.9), inner * 0.35)
        section -= placed(slot, [(0, -inner * 0.5), (0, inner * 0.5)])
    elif centre == 3:
        x, y = (length / 2 - inset - hole * 1.8) * d.real("window_x", 0.5, 1.8), inner * d.real("window_y", 0.8, 1.8)
        section -= rectangle_section(x, y, min(x, y) * 0.15)
    if d.feature("edge_notch", 0.3):
        at = inset * 0.45
        section -= rectangle_section(short * d.real("notch_ratio", 0.15, 0.4), 2 * at).translate((0.0, width / 2))
    body = extruded(section, thickness)
    if d.feature("countersinks", 0.4):
        sink = rod(hole, min(hole, thickness * 0.6), 0, 1.7 * hole, HOLE_SEGMENTS).translate(
            (0, 0, thickness - min(hole, thickness * 0.6) + 1e-3)
        )
        body -= union(sink.translate((float(x), float(y), 0)) for x, y in places)
    if d.feature("rib", 0.3):
        rib = block(length, thickness * 0.8, thickness * 1.6, (0, width / 2 - thickness * 0.4, thickness))
        body += rib ^ extruded(rectangle_section(length, width, corner), 9 * thickness)
    return body


def enclosure(d: Draw) -> Manifold:
    length, width, height = d.real("length", 40, 120), d.real("width", 30, 90), d.real("height", 12, 60)
    wall = d.real("wall", 1.5, 3.5)
    corner = wall + min(length, width) * d.real("corner_ratio", 0.03, 0.18)
    body = extruded(rectangle_section(length, width, corner), height)
    body -= extruded(rectangle_section(length - 2 * wall, width - 2 * wall, corner - wall), height, wall)
    boss, pin = wall * d.real("boss_ratio", 1.1, 1.6), wall * 0.5
    reach = (length / 2 - wall - boss * 0.8, width / 2 - wall - boss * 0.8)
    places = [(sx * reach[0], sy * reach[1]) for sx in (-1, 1) for sy in (-1, 1)]
    top = height * d.real("boss_height", 0.5, 0.97)
    bosses = extruded(placed(circle_section(boss, HOLE_SEGMENTS), places), top - wall * 0.5, wall * 0.5) ^ extruded(
        rectangle_section(length, width, corner), height
    )
    body += bosses
    body -= extruded(placed(circle_section(pin, HOLE_SEGMENTS), places), height * 2, wall * 1.5)
    if d.feature("port", 0.6):
        port = rectangle_section(
            width * d.real("port_width", 0.15, 0.5), height * d.real("port_height", 0.2, 0.5), height * 0.05
        )
        shift = width * d.real("port_shift", -0.1, 0.1)
        body -= extruded_along_x(port.translate((shift, height * 0.5)), 4 * wall).translate((length / 2, 0, 0))
    if d.feature("cable_hole", 0.5):
        gland = circle_section(min(height, width) * d.real("cable_ratio", 0.1, 0.2), HOLE_SEGMENTS)
        body -= extruded_along_x(gland.translate((0, height * 0.5)), 4 * wall).translate((-length / 2, 0, 0))
    if d.feature("vents", 0.5):
        vents = d.count("num_vents", 3, 8)
        slot = rectangle_section(length * 0.45 / vents, height * d.real("vent_height", 0.3, 0.6))
        places = [(x, height * 0.55) for x in np.linspace(-length * 0.3, length * 0.3, vents)]
        body -= extruded_along_y(placed(slot, places), 4 * wall).translate((0, width / 2, 0))
    if d.feature("lugs", 0.45):
        lug = d.real("lug_length", 8, 16)
        tabs = rectangle_section(length + 2 * lug, lug * 1.5, lug * 0.5) - rectangle_section(length - wall, width)
        tabs -= placed(circle_section(lug * 0.25, HOLE_SEGMENTS), [(s * (length + lug) / 2, 0) for s in (-1, 1)])
        body += extruded(tabs, wall * 1.2)
    if d.feature("partition", 0.35):
        at = length * d.real("partition_at", -0.25, 0.25)
        body += block(wall * 0.8, width - wall, height * 0.7, (at, 0, height * 0.35 + wall * 0.25))
    return body


def heat_sink(d: Draw) -> Manifold:
    length, width, height = d.real("length", 20, 90), d.real("width", 20, 90), d.real("height", 8, 45)
    base = height * d.real("base_ratio", 0.12, 0.35)
    fins = d.count("num_fins", 5, 16)
    pitch = width / fins
    thickness = pitch * d.real("fin_ratio", 0.25, 0.55)
    crown = d.feature("crown", 0.35)  # middle fins higher
    solids = [block(length, width, base, (0, 0, base / 2))]
    for y in np.linspace(-(width - thickness) / 2, (width - thickness) / 2, fins):
        top = height * (1.0 - 0.5 * abs(y) / width) if crown else height
        solids.append(block(length, thickness, top - base / 2, (0, float(y), (top + base / 2) / 2)))
    body = union(solids)
    if d.feature("cross_cut", 0.5):
        cuts = d.count("num_cuts", 1, 7)
        gap = length / (cuts + 1) * d.real("cut_ratio", 0.2, 0.5)
        xs = np.linspace(-length / 2, length / 2, cuts + 2)[1:-1]
        body -= union(block(gap, 2 * width, 2 * height, (float(x), 0, height + base)) for x in xs)
    if d.feature("clip_channel", 0.35):
        body -= block(
            length * 0.12, 2 * width, 2 * height, (length * d.real("channel_at", -0.3, 0.3), 0, height + base)
        )
    flange = width * d.real("flange_ratio", 0.12, 0.3)
    hole = flange * d.real("hole_ratio", 0.15, 0.3)
    plate = rectangle_section(length, width + 2 * flange, flange * 0.3)
    spread = d.count("hole_pairs", 1, 2)
    xs = [0.0] if spread == 1 else [-length * 0.35, length * 0.35]
    plate -= placed(circle_section(hole, 32), [(x, s * (width + flange) / 2) for x in xs for s in (-1, 1)])
    return body + extruded(plate, base * 0.7)


def t_slot_extrusion(d: Draw) -> Manifold:
    cell = d.real("cell", 15, 45)
    opening, inside = cell * d.real("opening_ratio", 0.2, 0.3), cell * d.real("inside_ratio", 0.42, 0.56)
    lip, depth = cell * d.real("lip_ratio", 0.06, 0.11), cell * d.real("depth_ratio", 0.26, 0.32)
    count_x, count_y = d.count("cells_x", 1, 3), d.count("cells_y", 1, 2)
    length = cell * d.real("length_ratio", 0.5, 5)
    # The T slot opens at y = cell/2 and narrows towards the core.
    half = cell / 2
    shape = [
        (-opening / 2, half + 1),
        (-opening / 2, half - lip),
        (-inside / 2, half - lip),
        (-inside / 2, half - depth * 0.65),
    ]
    shape += [(-opening * 0.4, half - depth), (opening * 0.4, half - depth)]
    shape += [
        (inside / 2, half - depth * 0.65),
        (inside / 2, half - lip),
        (opening / 2, half - lip),
        (opening / 2, half + 1),
    ]
    slot = polygon_section(shape)
    section = rectangle_section(cell * count_x, cell * count_y, cell * d.real("corner_ratio", 0.04, 0.12))
    xs, ys = (np.arange(count_x) - (count_x - 1) / 2) * cell, (np.arange(count_y) - (count_y - 1) / 2) * cell
    closed = d.feature("closed_side", 0.3)
    cuts = []
    for x in xs:
        cuts.append(slot.translate((x, (count_y - 1) * cell / 2)))
        if not closed:
            cuts.append(slot.rotate(180).translate((x, -(count_y - 1) * cell / 2)))
    for y in ys:
        cuts += [
            slot.rotate(-90).translate(((count_x - 1) * cell / 2, y)),
            slot.rotate(90).translate((-(count_x - 1) * cell / 2, y)),
        ]
    bore = cell * d.real("bore_ratio", 0.06, 0.13)
    cuts += [circle_section(bore, HOLE_SEGMENTS).translate((x, y)) for x in xs for y in ys]
    if d.feature("corner_bores", 0.4):
        for x in xs:
            for y in ys:
                cuts.append(
                    placed(
                        circle_section(cell * 0.055, 16),
                        [(x + sx * cell * 0.4, y + sy * cell * 0.4) for sx in (-1, 1) for sy in (-1, 1)],
                    )
                )
    solid = extruded(section - CrossSection.batch_boolean(cuts, OpType.Add), length)
    if d.feature("cross_hole", 0.3):
        solid -= extruded_along_x(circle_section(cell * 0.12, HOLE_SEGMENTS), 8 * cell).translate(
            (0, 0, length * d.real("cross_at", 0.3, 0.7))
        )
    return solid
