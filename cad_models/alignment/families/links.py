"""Links and levers, hinges, handles, impellers."""

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
    keyway_cutter,
    placed,
    polygon_section,
    rectangle_section,
    rod,
    threaded_rod,
    tube_along,
    twisted_bar,
    union,
)


def clevis(d: Draw) -> Manifold:
    width, gap_ratio = d.real("width", 12, 40), d.real("gap_ratio", 0.3, 0.55)
    fork, pin = width * d.real("fork_ratio", 0.9, 2.2), width * d.real("pin_ratio", 0.16, 0.28)
    body_length, end = width * d.real("body_ratio", 0.3, 1.1), width * 0.5
    side = CrossSection.batch_hull(
        [circle_section(end).translate((0, fork)), rectangle_section(width, 0.2).translate((0, -body_length + 0.1))]
    )
    body = (
        extruded_along_x(side, width)
        if not d.feature("round_body", 0.4)
        else (extruded_along_x(side, width) ^ rod(width * 0.58, 9 * width, -4.5 * width))
    )
    slot = rectangle_section(width * gap_ratio, 2 * fork + 2 * end, width * gap_ratio * 0.45).translate((0, fork + end))
    body -= extruded_along_y(slot, 4 * width)
    hole = circle_section(pin, HOLE_SEGMENTS).translate((0, fork))
    body -= extruded_along_x(hole, 4 * width)
    shank, length = width * d.real("shank_ratio", 0.22, 0.42), width * d.real("shank_length", 0.4, 2.5)
    if d.feature("threaded_bore", 0.35):
        body -= rod(shank * 0.8, body_length + 2, -body_length - 1, -1, HOLE_SEGMENTS)
    elif d.feature("thread", 0.4):
        body += threaded_rod(shank, length, shank * 0.4).translate((0, 0, -body_length - length + 0.1))
    else:
        body += rod(shank, length + 0.1, -body_length - length)
    if d.feature("pin", 0.35):
        body += extruded_along_x(circle_section(pin * 0.98, HOLE_SEGMENTS).translate((0, fork)), width * 1.25)
        body += extruded_along_x(circle_section(pin * 1.5, HOLE_SEGMENTS).translate((0, fork)), width * 0.12).translate(
            (-width * 0.55, 0, 0)
        )
    if d.feature("bosses", 0.35):
        boss = extruded_along_x(
            (circle_section(pin * 1.5) - circle_section(pin, HOLE_SEGMENTS)).translate((0, fork)), width * 0.16
        )
        body += boss.translate((width * 0.54, 0, 0)) + boss.translate((-width * 0.54, 0, 0))
    return body


def hinge(d: Draw) -> Manifold:
    length, leaf, thickness = d.real("length", 25, 100), d.real("leaf", 12, 45), d.real("thickness", 1.5, 4)
    barrel = thickness * d.real("barrel_ratio", 1.1, 1.8)
    knuckles = d.count("num_knuckles", 2, 4) * 2 - 1
    opening = d.real("opening_deg", 60, 180)
    pitch = length / knuckles
    rows = d.count("hole_columns", 2, 4)
    hole = min(leaf * d.real("hole_ratio", 0.08, 0.14), length / rows * 0.3)

    def leaf_solid(parity: int) -> Manifold:
        outline = rectangle_section(leaf * 2, length * 0.99, min(leaf, length) * 0.12).translate(
            (leaf + barrel * 0.4 - leaf * 0.5, 0)
        )
        outline ^= CrossSection.square((4 * leaf, 2 * length)).translate((0, -length))
        rows_y = np.linspace(-length * 0.36, length * 0.36, rows)
        stagger = leaf * 0.1
        outline -= placed(
            circle_section(hole, 24), [(leaf * 0.8 + (stagger if k % 2 else -stagger), y) for k, y in enumerate(rows_y)]
        )
        plate = extruded(outline, thickness, -thickness / 2)
        solids = [plate]
        for k in range(knuckles):
            y = -length / 2 + (k + 0.5) * pitch
            if k % 2 == parity:
                solids.append(extruded_along_y(circle_section(barrel, 32), pitch * 0.97).translate((0, y, 0)))
        body = union(solids)
        cut = [
            block(2.3 * barrel, pitch * 1.03, 3 * barrel, (0, -length / 2 + (k + 0.5) * pitch, 0))
            for k in range(knuckles)
            if k % 2 != parity
        ]
        return body - union(cut)

    pin = extruded_along_y(circle_section(barrel * 0.5, 24), length * (1.06 if d.feature("long_pin", 0.4) else 1.0))
    first = leaf_solid(0)
    second = leaf_solid(1)
    body = union([first, second.rotate((0, -opening, 0)), pin])
    if d.feature("finial", 0.3):
        ball = Manifold.sphere(barrel * 1.1, 20)
        body += ball.translate((0, length * 0.52, 0)) + ball.translate((0, -length * 0.52, 0))
    return body


def connecting_rod(d: Draw) -> Manifold:
    big, small = d.real("big_radius", 10, 26), d.real("small_radius", 5, 14)
    span = (big + small) * d.real("span_ratio", 1.25, 2.6)
    thickness = small * d.real("thickness_ratio", 0.6, 1.5)
    web = min(small, big) * d.real("web_ratio", 0.9, 1.5)
    tip = min(web * d.real("taper", 0.6, 1.0), 1.7 * small)
    beam = polygon_section([(0, -web / 2), (span, -tip / 2), (span, tip / 2), (0, web / 2)])
    waist = d.real("beam_height", 0.45, 0.95)
    body = union(
        [
            extruded(circle_section(big, 64), thickness),
            extruded(circle_section(small), thickness).translate((span, 0, 0)),
            extruded(beam, thickness * waist, thickness * (1 - waist) / 2),
        ]
    )
    if d.feature("pocket", 0.5):
        depth = thickness * waist * 0.3
        low, high = big * 1.12, span - small * 1.15
        inside = [(low, -web * 0.26), (high, -tip * 0.24), (high, tip * 0.24), (low, web * 0.26)]
        if high - low > 2:
            pocket = extruded(polygon_section(inside), depth)
            body = body - pocket.translate((0, 0, thickness * (1 + waist) / 2 - depth + 1e-3))
            body -= pocket.translate((0, 0, thickness * (1 - waist) / 2 - 1e-3))
    bolts = d.feature("split_cap", 0.35)
    if bolts:
        ears = rectangle_section(big * 0.7, big * 2.7, big * 0.12)
        body += extruded(ears, thickness)
    body -= rod(big * d.real("big_bore", 0.55, 0.8), 3 * thickness, -thickness, -1, ROUND_SEGMENTS)
    body -= rod(small * d.real("small_bore", 0.4, 0.75), 3 * thickness, -thickness, -1, HOLE_SEGMENTS).translate(
        (span, 0, 0)
    )
    if bolts:
        body -= extruded_along_x(
            placed(circle_section(big * 0.1, 20), [(s * big * 1.18, thickness / 2) for s in (-1, 1)]), 4 * big
        )
    if d.feature("keyway", 0.3):
        body -= block(big * 0.5, big * 0.25, 3 * thickness, (-big * 0.65, 0, thickness / 2))
    if d.feature("third_arm", 0.25):
        turn = d.real("third_angle_deg", 70, 170)
        reach = span * d.real("third_ratio", 0.5, 0.9)
        arm = union(
            [
                extruded(circle_section(small * 0.8), thickness).translate((reach, 0, 0)),
                block(reach, tip, thickness * waist, (reach / 2, 0, thickness / 2)),
            ]
        )
        arm -= rod(small * 0.4, 3 * thickness, -thickness, -1, HOLE_SEGMENTS).translate((reach, 0, 0))
        body += arm.rotate((0, 0, turn)) - rod(big * 0.9, 3 * thickness, -thickness)
    return body


def impeller(d: Draw) -> Manifold:
    radius = d.real("radius", 15, 60)
    hub, height = radius * d.real("hub_ratio", 0.2, 0.4), radius * d.real("height_ratio", 0.2, 0.6)
    blades = d.count("num_blades", 3, 9)
    thickness = radius * d.real("blade_ratio", 0.03, 0.07)
    if d.feature("axial", 0.5):
        # Propeller blades: a bar twisted along the axis of rotation.
        sweep = d.real("sweep_deg", 25, 75)
        blade = twisted_bar(radius * 0.98, thickness * 2, height * 0.9, sweep)
        body = union(
            [
                rod(hub, height),
                *(blade.rotate((0, 0, 360 * k / blades)).translate((0, 0, height * 0.05)) for k in range(blades)),
            ]
        )
        if d.feature("ring", 0.35):
            body += extruded(
                circle_section(radius, 64) - circle_section(radius * 0.93, 64), height * 0.9, height * 0.05
            )
    else:
        # Blades curved in plan, on a back plate.
        curve = d.real("curve", 0.3, 1.1)
        s = np.linspace(0, 1, 14)
        r, a = hub * 0.9 + (radius * 0.97 - hub * 0.9) * s, curve * s
        centre = np.stack([r * np.cos(a), r * np.sin(a)], 1)
        tangent = np.gradient(centre, axis=0)
        side = (
            np.stack([-tangent[:, 1], tangent[:, 0]], 1)
            / np.linalg.norm(tangent, axis=1, keepdims=True)
            * thickness
            / 2
        )
        blade = polygon_section(np.concatenate([centre - side, (centre + side)[::-1]]))
        plan = CrossSection.batch_boolean([blade.rotate(360 * k / blades) for k in range(blades)], OpType.Add)
        plate = height * d.real("plate_ratio", 0.08, 0.2)
        body = union([extruded(plan, height), rod(radius, plate, 0, -1, 64), rod(hub, height * 1.1)])
        if d.feature("shroud", 0.35):
            body += extruded(circle_section(radius, 64) - circle_section(radius * 0.62, 64), plate, height - plate)
    bore = hub * d.real("bore_ratio", 0.3, 0.65)
    body -= rod(bore, 4 * height, -height, -1, HOLE_SEGMENTS)
    if d.feature("keyway", 0.4):
        body -= keyway_cutter(bore, bore * 0.5, height * 1.1)
    return body


def pull_handle(d: Draw) -> Manifold:
    span, rise = d.real("span", 40, 140), d.real("rise", 18, 50)
    bar = rise * d.real("bar_ratio", 0.1, 0.2)
    bend = min(rise, span / 2) * d.real("bend_ratio", 0.35, 0.8)
    turn = np.linspace(0, np.pi / 2, 9)
    left = np.stack([-span / 2 + bend - bend * np.cos(turn), rise - bend + bend * np.sin(turn)], 1)
    profile = np.concatenate([[[-span / 2, 0.0]], left, (left * [-1, 1])[::-1], [[span / 2, 0.0]]])
    path = np.stack([profile[:, 0], np.zeros(len(profile)), profile[:, 1]], 1)
    tangent = np.gradient(path, axis=0)
    tangent[0], tangent[-1] = (0, 0, 1), (0, 0, -1)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    across = np.tile([0.0, 1.0, 0.0], (len(path), 1))
    body = tube_along(path, across, np.cross(tangent, across), bar, 24)
    foot = bar * d.real("foot_ratio", 1.3, 2.4)
    base = bar * d.real("foot_height", 0.4, 1.2)
    round_feet = d.feature("round_feet", 0.6)
    shape = circle_section(foot) if round_feet else rectangle_section(2 * foot, 2 * foot, foot * 0.3)
    body += extruded(placed(shape, [(-span / 2, 0), (span / 2, 0)]), base)
    if d.feature("grip", 0.45):
        grip = extruded_along_x(circle_section(bar * d.real("grip_ratio", 1.2, 1.7)), (span - 2 * bend) * 0.8 + bar)
        body += grip.translate((0, 0, rise))
    if d.feature("foot_plates", 0.4):
        plate = rectangle_section(foot * 4.2, foot * 2, foot * 0.6) - placed(
            circle_section(foot * 0.35, 20), [(-foot * 1.5, 0), (foot * 1.5, 0)]
        )
        body += extruded(placed(plate, [(-span / 2, 0), (span / 2, 0)]), base * 0.6)
    else:
        body -= extruded(
            placed(circle_section(bar * 0.4, 20), [(-span / 2, 0), (span / 2, 0)]), base * 0.9, -base * 0.1
        )
    return body
