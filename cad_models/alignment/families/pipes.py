"""Pipes, bearings and their housings."""

import numpy as np
from manifold3d import Manifold

from cad_models.alignment.families.shapes import (
    HOLE_SEGMENTS,
    Draw,
    block,
    circle_section,
    extruded,
    extruded_along_y,
    placed,
    placed_around,
    polygon_section,
    rectangle_section,
    revolved,
    rod,
    slot_section,
    union,
)


def _pipe_end(outer: float, bore: float, style: int, size: float) -> Manifold:
    """A plain, collared or flanged pipe end that stands on z = 0 and goes up by ``size``, bore not yet cut."""
    solid = rod(outer, size)
    if style == 1:
        solid += rod(outer * 1.25, size * 0.45)
    elif style == 2:
        ring = outer * 1.85
        plate = circle_section(ring, 64) - placed_around(
            circle_section((ring - outer) * 0.24, 20), 6, (ring + outer) / 2
        )
        solid += extruded(plate, size * 0.25)
    return solid


def pipe_elbow(d: Draw) -> Manifold:
    outer = d.real("outer_radius", 6, 25)
    bore, bend = outer * d.real("bore_ratio", 0.6, 0.88), outer * d.real("bend_ratio", 1.3, 3.2)
    degrees, size = d.real("angle_deg", 30, 120), outer * d.real("end_ratio", 0.8, 2.2)
    styles = d.count("inlet_style", 0, 2), d.count("outlet_style", 0, 2)  # plain, collar, flange
    steps = int(degrees / 5)

    def solid(radius: float, extra: float, styled: bool) -> Manifold:
        arc = circle_section(radius).translate((bend, 0)).revolve(steps, degrees)
        inlet = _pipe_end(radius, bore, styles[0] if styled else 0, size + extra).translate((0, 0, -size - extra))
        outlet = _pipe_end(radius, bore, styles[1] if styled else 0, size + extra).translate((0, 0, -size - extra))
        # Ends are built along z: turn them to leave the arc along its tangents (-y at 0 degrees).
        inlet = inlet.translate((0, 0, 0.01)).rotate((-90, 0, 0)).translate((bend, 0, 0))
        outlet = outlet.translate((0, 0, 0.01)).rotate((90, 0, 0)).translate((bend, 0, 0)).rotate((0, 0, degrees))
        return union([arc, inlet, outlet])

    body = solid(outer, 0.0, True) - solid(bore, 1.0, False)
    if d.feature("foot", 0.3):
        middle = np.radians(degrees / 2)
        foot = rod(outer * 0.5, outer * 2.2, -outer * 2.2) + extruded(
            rectangle_section(outer * 2.4, outer * 2.4, outer * 0.3), outer * 0.3, -outer * 2.2
        )
        body += foot.translate((bend * np.cos(middle), bend * np.sin(middle), 0)) - circle_section(bore).translate(
            (bend, 0)
        ).revolve(steps, degrees)
    return body.rotate((90, 0, 0)) if d.feature("standing") else body


def pipe_tee(d: Draw) -> Manifold:
    outer = d.real("outer_radius", 6, 22)
    bore = outer * d.real("bore_ratio", 0.6, 0.85)
    branch = outer * d.real("branch_ratio", 0.5, 1.0)
    branch_bore = branch * bore / outer
    run, reach = outer * d.real("run_ratio", 1.6, 3.5), outer * d.real("reach_ratio", 1.5, 3.2)
    style, branch_style = d.count("run_style", 0, 2), d.count("branch_style", 0, 2)
    tilt = d.real("branch_angle_deg", 45, 80) if d.feature("wye", 0.35) else 90.0
    reach *= 1.0 + 0.9 * np.cos(np.radians(tilt))
    main = _pipe_end(outer, bore, style, run)
    side = _pipe_end(branch, branch_bore, branch_style, reach)
    solids = [main.translate((0, 0, -run)).rotate((0, turn, 0)) for turn in (90, -90)]
    holes = [rod(bore, 2 * run + 2, -run - 1).rotate((0, 90, 0))]
    directions = [(0, tilt - 90, 0)]
    if d.feature("cross", 0.3):
        directions.append((180, tilt - 90, 0))
    if d.feature("side_port", 0.25):
        directions.append((90, 0, 0))
    for turn in directions:
        solids.append(side.rotate((180, 0, 0)).translate((0, 0, reach)).rotate(turn))
        holes.append(rod(branch_bore, reach + 1).rotate(turn))
    return union(solids) - union(holes)


def pillow_block(d: Draw) -> Manifold:
    bore = d.real("bore_radius", 6, 20)
    outer, depth = bore * d.real("outer_ratio", 1.35, 1.9), bore * d.real("depth_ratio", 0.9, 2.2)
    centre = outer * d.real("centre_ratio", 1.05, 1.8)
    base, length = centre * d.real("base_ratio", 0.2, 0.4), 2 * outer * d.real("length_ratio", 1.5, 2.4)
    solids = [extruded_along_y(circle_section(outer, 64), depth).translate((0, 0, centre))]
    web = polygon_section([(-outer * 1.15, 0), (outer * 1.15, 0), (outer, centre), (-outer, centre)])
    if d.feature("straight_web", 0.5):
        web = polygon_section([(-outer, 0), (outer, 0), (outer, centre), (-outer, centre)])
    solids.append(extruded_along_y(web, depth * d.real("web_ratio", 0.5, 1.0)))
    corner = depth * d.real("corner_ratio", 0.1, 0.45)
    foot = rectangle_section(length, depth * 1.1, corner)
    room = (length / 2 - outer * 1.15) / 2
    hole = min(room * 0.55, depth * 0.25)
    shape = (
        slot_section(min(hole * 3.2, room * 1.6), hole * 1.5)
        if d.feature("slots")
        else circle_section(hole, HOLE_SEGMENTS)
    )
    foot -= placed(shape, [(s * (outer * 1.15 + room), 0) for s in (-1, 1)])
    solids.append(extruded(foot, base))
    if d.feature("ribs", 0.45):
        rib = polygon_section(
            [(-length * 0.46, base * 0.5), (length * 0.46, base * 0.5), (outer * 0.6, centre), (-outer * 0.6, centre)]
        )
        width = depth * 0.14
        within = extruded(rectangle_section(length, depth * 1.1, corner), centre)
        solids += [
            extruded_along_y(rib, width).translate((0, s * (depth * 0.55 - width / 2), 0)) ^ within for s in (-1, 1)
        ]
    if d.feature("cap_flanges", 0.4):
        solids.append(block(2 * outer * 1.45, depth * 0.7, outer * 0.4, (0, 0, centre)))
    body = union(solids)
    body -= extruded_along_y(circle_section(bore, 64), 4 * depth).translate((0, 0, centre))
    if d.feature("seat", 0.5):
        seat = extruded_along_y(circle_section(bore * 1.16, 64), depth * 0.6)
        body -= seat.translate((0, depth * 0.45, centre))
    if d.feature("oil_hole", 0.5):
        body += rod(bore * 0.3, outer - bore * 0.97 + bore * 0.2, centre + bore * 1.01, -1, HOLE_SEGMENTS) ^ block(
            99, depth, 999, (0, 0, 0)
        )
        body -= rod(min(bore * 0.14, depth * 0.2), 4 * outer, centre, -1, 20)
    if d.feature("split_line", 0.25):
        body -= block(8 * outer, 4 * depth, bore * 0.06, (outer * 4, 0, centre))
    return body


def ball_bearing(d: Draw) -> Manifold:
    bore = d.real("bore_radius", 4, 25)
    outer = bore * d.real("outer_ratio", 1.7, 2.8)
    width = (outer - bore) * d.real("width_ratio", 0.5, 1.1)
    middle, ball = (bore + outer) / 2, min((outer - bore) * 0.3, width * 0.42)
    gap = ball * d.real("gap_ratio", 0.45, 0.7)
    chamfer = width * d.real("chamfer_ratio", 0.04, 0.1)

    def ring(low: float, high: float) -> Manifold:
        c = min(chamfer, (high - low) * 0.3)
        profile = [(low + c, 0), (high - c, 0), (high, c), (high, width - c)]
        return revolved([*profile, (high - c, width), (low + c, width), (low, width - c), (low, c)], 64)

    body = ring(bore, middle - gap) + ring(middle + gap, outer)
    if d.feature("shield", 0.4):
        body += extruded(
            circle_section(middle + gap * 1.2, 64) - circle_section(middle - gap * 1.2, 64), width * 0.7, width * 0.15
        )
    else:
        balls = d.count("num_balls", 6, 12)
        balls = min(balls, int(np.pi * middle / ball * 0.92))
        sphere = Manifold.sphere(ball, 24).translate((middle, 0, width / 2))
        body += union(sphere.rotate((0, 0, 360 * k / balls)) for k in range(balls))
    if d.feature("snap_groove", 0.3):
        body -= extruded(circle_section(outer * 1.2, 64) - circle_section(outer * 0.965, 64), width * 0.1, width * 0.75)
    if d.feature("flanged", 0.3):
        body += extruded(
            circle_section(outer * d.real("flange_ratio", 1.08, 1.2), 64) - circle_section(middle + gap * 1.3, 64),
            width * 0.18,
        )
    return body
