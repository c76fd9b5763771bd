"""Parts with an axis: flanges, gears, pulleys, shafts, knobs, springs."""

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
    keyway_cutter,
    placed_around,
    polygon_section,
    rectangle_section,
    revolved,
    rod,
    slot_section,
    tube_along,
)


def flange(d: Draw) -> Manifold:
    outer, thickness = d.real("outer_radius", 20, 70), d.real("thickness", 4, 14)
    bore = outer * d.real("bore_ratio", 0.15, 0.5)
    holes = d.count("num_holes", 3, 12)
    circle = (outer + bore) / 2 * d.real("circle_ratio", 1.08, 1.18)
    hole = min(outer - circle, circle * np.pi / holes) * d.real("hole_ratio", 0.3, 0.55)
    section = circle_section(outer, 64)
    if d.feature("square", 0.2):
        section = rectangle_section(2 * outer, 2 * outer, outer * 0.2)
    elif d.feature("lobed", 0.2):
        section = CrossSection.batch_boolean(
            [circle_section(circle * 0.95, 64), placed_around(circle_section((outer - circle) * 1.0), holes, circle)],
            OpType.Add,
        )
    body = extruded(section, thickness)
    neck = bore + (circle - hole - bore) * d.real("neck_ratio", 0.3, 0.75)
    if d.feature("neck", 0.6):
        height = thickness * d.real("neck_height", 0.8, 4)
        tip = neck if not d.feature("tapered") else (neck + bore) / 2 + 0.25 * (neck - bore)
        body += rod(neck, height, thickness, tip, 64)
    if d.feature("raised_face", 0.4):
        body += rod(neck, thickness * 0.25, -thickness * 0.2, -1, 64)
    if not d.feature("blind", 0.2):
        body -= rod(bore, 20 * thickness, -10 * thickness, -1, 64)
    body -= extruded(placed_around(circle_section(hole, HOLE_SEGMENTS), holes, circle), 4 * thickness, -2 * thickness)
    if d.feature("counterbores", 0.25):
        body -= extruded(
            placed_around(circle_section(hole * 1.4, HOLE_SEGMENTS), holes, circle), thickness, thickness * 0.6
        )
    return body


def _involute_gear(teeth: int, module: float, pressure_deg: float) -> CrossSection:
    """Outline of a spur gear (addendum 1, dedendum 1.25 modules), six points a flank."""
    pitch = module * teeth / 2
    base, tip, root = pitch * np.cos(np.radians(pressure_deg)), pitch + module, pitch - 1.25 * module
    start = max(base, root)
    radii = np.linspace(start, tip, 6)
    roll = np.sqrt(np.maximum((radii / base) ** 2 - 1, 0.0))
    flank = roll - np.arctan(roll)  # involute angle at each radius
    at_pitch = np.sqrt((pitch / base) ** 2 - 1)
    half = np.pi / (2 * teeth) + at_pitch - np.arctan(at_pitch) - flank
    half = np.maximum(half, 0.04 / teeth)
    radii, half = (
        np.concatenate([[root], radii]) if start > root else radii,
        np.concatenate([half[:1], half]) if start > root else half,
    )
    tooth = np.concatenate([np.stack([radii, -half], 1), np.stack([radii, half], 1)[::-1]])
    angles = tooth[None, :, 1] + 2 * np.pi * np.arange(teeth)[:, None] / teeth
    radius = np.broadcast_to(tooth[None, :, 0], angles.shape)
    return polygon_section(np.stack([radius * np.cos(angles), radius * np.sin(angles)], -1).reshape(-1, 2))


def spur_gear(d: Draw) -> Manifold:
    teeth, module = d.count("num_teeth", 12, 48), d.real("module", 0.8, 2.5)
    pitch, root = module * teeth / 2, module * (teeth / 2 - 1.25)
    width = pitch * d.real("width_ratio", 0.15, 0.8)
    section = _involute_gear(teeth, module, d.real("pressure_angle_deg", 17, 25))
    if d.feature("helical", 0.3):
        twist = d.real("twist_deg", 8, 30)
        body = section.extrude(width, 8, twist)
    else:
        body = extruded(section, width)
    bore = root * d.real("bore_ratio", 0.15, 0.32)
    hub = bore * d.real("hub_ratio", 1.45, 1.9)
    top = width
    if d.feature("recess", 0.35):
        rim = root * 0.86
        depth = width * d.real("recess_ratio", 0.2, 0.35)
        ring = extruded(circle_section(rim, 64) - circle_section(hub, ROUND_SEGMENTS), depth)
        body = body - ring.translate((0, 0, width - depth + 1e-3)) - ring.translate((0, 0, -1e-3))
    if d.feature("hub", 0.55):
        top = width * d.real("hub_height", 1.2, 2.2)
        body += rod(hub, top - width * 0.5, width * 0.5)
    if d.feature("lightening_holes", 0.4):
        holes = d.count("num_holes", 3, 7)
        middle, room = (hub + root * 0.86) / 2, (root * 0.86 - hub) / 2
        body -= extruded(
            placed_around(
                circle_section(min(room * 0.75, middle * np.pi / holes * 0.75), HOLE_SEGMENTS), holes, middle
            ),
            3 * width,
            -width,
        )
    body -= rod(bore, top + 2, -1)
    if d.feature("keyway", 0.5):
        body -= keyway_cutter(bore, bore * d.real("key_ratio", 0.4, 0.6), top)
    return body


def pulley(d: Draw) -> Manifold:
    outer, bore = d.real("outer_radius", 15, 60), d.real("bore_radius", 3, 7)
    grooves = d.count("num_grooves", 1, 4)
    pitch, depth = outer * d.real("pitch_ratio", 0.2, 0.36), outer * d.real("depth_ratio", 0.1, 0.24)
    round_groove = d.feature("round_groove", 0.3)
    flank, width = pitch * d.real("flank_ratio", 0.08, 0.2), pitch * grooves
    profile = [(0.0, 0.0), (outer, 0.0)]
    for k in range(grooves):
        z = k * pitch
        if round_groove:
            half = pitch / 2 - flank
            profile += [
                (outer - depth * np.sin(a), z + pitch / 2 - half * np.cos(a)) for a in np.linspace(0, np.pi, 13)
            ]
        else:
            profile += [
                (outer, z + flank),
                (outer - depth, z + pitch * 0.38),
                (outer - depth, z + pitch * 0.62),
                (outer, z + pitch - flank),
            ]
    profile += [(outer, width), (0.0, width)]
    body = revolved(profile, 64)
    hub, rim, top = bore * d.real("hub_ratio", 1.5, 2.0), outer - depth * 1.5, width
    if d.feature("hub", 0.5):
        top = width + outer * d.real("hub_height", 0.15, 0.5)
        body += rod(hub, top - width * 0.5, width * 0.5)
    web = d.count("web", 0, 2)  # solid, holes, spokes
    room = (rim - hub) / 2
    if web == 1 and room > 2:
        holes = d.count("num_holes", 3, 8)
        middle = (hub + rim) / 2
        body -= extruded(
            placed_around(circle_section(min(room * 0.75, middle * np.pi / holes * 0.7), HOLE_SEGMENTS), holes, middle),
            4 * width,
            -width,
        )
    elif web == 2 and room > 2:
        spokes = d.count("num_spokes", 3, 6)
        bars = CrossSection.batch_boolean(
            [
                rectangle_section(2 * outer, hub * 0.8).translate((outer, 0)).rotate(360 * k / spokes)
                for k in range(spokes)
            ],
            OpType.Add,
        )
        body -= extruded(circle_section(rim, 64) - circle_section(hub, ROUND_SEGMENTS) - bars, 4 * width, -width)
    body -= rod(bore, 4 * top, -top)
    if d.feature("keyway", 0.5):
        body -= keyway_cutter(bore, bore * 0.5, top)
    return body


def stepped_shaft(d: Draw) -> Manifold:
    steps = d.count("num_steps", 3, 6)
    radius = d.real("base_radius", 5, 14)
    profile, z, sections = [(0.0, 0.0)], 0.0, []
    for k in range(steps):
        r, length = radius * d.real(f"radius_ratio_{k}", 0.55, 1.5), radius * d.real(f"length_ratio_{k}", 0.6, 3.2)
        chamfer = min(r, length) * 0.12
        profile += [(r - chamfer, z), (r, z + chamfer), (r, z + length - chamfer), (r - chamfer, z + length)]
        sections.append((r, z, length))
        z += length
    body = revolved([*profile, (0.0, z)], 40)
    if d.feature("keyway", 0.55):
        r, at, length = max(sections, key=lambda s: s[2])
        width = r * d.real("key_ratio", 0.35, 0.55)
        body -= (
            extruded(slot_section(length * 0.7, width), r)
            .rotate((0, -90, 0))
            .rotate((0, 0, 180))
            .translate((r * 0.7, 0, at + length / 2))
        )
    if d.feature("bore", 0.4):
        bore = min(r for r, _, _ in sections) * d.real("bore_ratio", 0.25, 0.55)
        body -= rod(bore, 3 * z, -z, -1, HOLE_SEGMENTS)
    if d.feature("groove", 0.5):
        r, at, length = sections[d.count("groove_step", 0, steps - 1)]
        groove = circle_section(r * 1.5) - circle_section(r * 0.85, 40)
        body -= extruded(groove, length * 0.12, at + length * 0.6)
    if d.feature("flat", 0.35):
        r, at, length = sections[-1]
        body -= block(r, 4 * r, length * 0.8, (r * 1.2, 0, at + length * 0.8))
    if d.feature("cross_hole", 0.35):
        r, at, length = sections[0]
        body -= extruded_along_x(circle_section(min(r, length) * 0.28, HOLE_SEGMENTS), 6 * r).translate(
            (0, 0, at + length / 2)
        )
    return body if d.feature("upright") else body.rotate((0, 90, 0))


def knob(d: Draw) -> Manifold:
    radius = d.real("radius", 10, 35)
    height = radius * d.real("height_ratio", 0.4, 1.3)
    lobes, depth = d.count("num_lobes", 3, 18), d.real("lobe_depth", 0.03, 0.22)
    angles = 2 * np.pi * np.arange(144) / 144
    wave = 1 - depth * (0.5 - 0.5 * np.cos(lobes * angles)) if d.feature("lobed", 0.7) else np.ones(144)
    outline = polygon_section(radius * wave[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1))
    top = d.real("top_ratio", 0.65, 1.0)
    body = outline.extrude(height, 0, 0.0, (top, top))
    edge = min(height, radius) * d.real("edge_ratio", 0.05, 0.35)
    dome = [(0, 0), (radius * 1.1, 0), (radius * 1.1, height - edge)]
    dome += [
        (radius * top - edge + edge * np.cos(a), height - edge + edge * np.sin(a)) for a in np.linspace(0, np.pi / 2, 8)
    ]
    body ^= revolved([*dome, (0, height)], 64)
    stem = radius * d.real("stem_ratio", 0.3, 0.55)
    low = 0.0
    if d.feature("stem", 0.6):
        low = -height * d.real("stem_height", 0.2, 1.0)
        body += rod(stem, -low + height * 0.1, low)
    bore = stem * d.real("bore_ratio", 0.35, 0.75)
    body -= rod(bore, height * 0.7 - low + 1, low - 1, -1, HOLE_SEGMENTS)
    if d.feature("d_bore", 0.4):
        body += block(bore, 2 * bore, height * 0.7 - low, (bore * 1.1, 0, (low + height * 0.7) / 2)) ^ rod(
            stem * 0.95, 9 * height, -4 * height
        )
    if d.feature("pointer", 0.4):
        body -= block(radius * 1.2, radius * 0.1, height * 0.16, (radius * 0.75, 0, height))
    if d.feature("top_dish", 0.35):
        body -= rod(radius * top * 0.6, height * 0.12, height * 0.92)
    return body


def spring(d: Draw) -> Manifold:
    radius, wire_ratio = d.real("coil_radius", 5, 20), d.real("wire_ratio", 0.1, 0.26)
    wire, turns = radius * wire_ratio, d.real("turns", 3, 11)
    pitch = 2 * wire * d.real("pitch_ratio", 1.25, 3.0)
    per_turn = 36
    t = np.linspace(0, turns, int(turns * per_turn) + 1)
    rate = np.full_like(t, pitch)
    if d.feature("closed_ends", 0.55):
        rate = np.where((t < 1.0) | (t > turns - 1.0), 2.08 * wire, pitch)
    z = np.concatenate([[0.0], np.cumsum(0.5 * (rate[1:] + rate[:-1]) * np.diff(t))])
    coil = radius * np.ones_like(t)
    if d.feature("conical", 0.3):
        coil = radius * (1.0 - d.real("taper", 0.2, 0.55) * t / turns)
    elif d.feature("barrel", 0.25):
        coil = radius * (0.72 + 0.5 * np.sin(np.pi * t / turns))
    hand = -1.0 if d.feature("left_hand", 0.3) else 1.0
    angle = hand * 2 * np.pi * t
    path = np.stack([coil * np.cos(angle), coil * np.sin(angle), z], 1)
    if d.feature("legs", 0.3):
        # Straight tangents, as on torsion springs.
        reach = radius * d.real("leg_ratio", 0.8, 1.8)
        steps = np.linspace(1, 0, 4)[:-1, None]
        first, last = path[0] - path[1], path[-1] - path[-2]
        before = path[0] + steps * reach * first / np.linalg.norm(first)
        after = path[-1] + steps[::-1] * reach * last / np.linalg.norm(last)
        path = np.concatenate([before, path, after])
        angle = np.concatenate([np.full(3, angle[0]), angle, np.full(3, angle[-1])])
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    normal = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)], 1)
    normal -= (normal * tangent).sum(1, keepdims=True) * tangent
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    return tube_along(path, normal, np.cross(tangent, normal), wire, 14)
