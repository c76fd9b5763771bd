"""The projected pictures of `projection` and their descriptions, compiled for one core: the same as the plain code there, in half the time or less."""

import math
from typing import no_type_check

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
@no_type_check  # type checkers would wrap what numba must compile
def draw(points, axes, size, border, distance, steepest):
    """Darkness float32 [views, size, size] of a cloud float32 [n, 6] seen by cameras with axes float32 [views, 3, 3]."""
    num_points, num_views = len(points), len(axes)
    pictures = np.zeros((num_views, size, size), np.float32)
    x, y = np.empty(num_points, np.float32), np.empty(num_points, np.float32)
    depth, facing, pixel = np.empty(num_points, np.float32), np.empty(num_points, np.float32), np.empty(num_points, np.int64)
    nearest, wide = np.empty((size, size), np.float32), np.empty((size, size), np.float32)
    weight, total = np.empty((size, size), np.float32), np.empty((size, size), np.float32)
    plain = np.empty((size, size), np.float32)
    for view in range(num_views):
        right, up, toward = axes[view, 0], axes[view, 1], axes[view, 2]
        low_x, high_x, low_y, high_y = np.float32(np.inf), np.float32(-np.inf), np.float32(np.inf), np.float32(-np.inf)
        for i in range(num_points):
            p = points[i]
            depth[i] = toward[0] * p[0] + toward[1] * p[1] + toward[2] * p[2]
            scale = np.float32(1) / (np.float32(distance) - depth[i])
            x[i] = (right[0] * p[0] + right[1] * p[1] + right[2] * p[2]) * scale
            y[i] = (up[0] * p[0] + up[1] * p[1] + up[2] * p[2]) * scale
            facing[i] = abs(toward[0] * p[3] + toward[1] * p[4] + toward[2] * p[5])
            low_x, high_x, low_y, high_y = min(low_x, x[i]), max(high_x, x[i]), min(low_y, y[i]), max(high_y, y[i])
        extent = max(max(high_x - low_x, high_y - low_y), np.float32(1e-6))
        centre_x, centre_y = (low_x + high_x) / np.float32(2), (low_y + high_y) / np.float32(2)
        to_pixels, half = np.float32(size - 2 * border), np.float32(size / 2)
        nearest[:] = -2.0
        for i in range(num_points):
            column = int((x[i] - centre_x) / extent * to_pixels + half)
            row = int(size - ((y[i] - centre_y) / extent * to_pixels + half))
            column, row = min(max(column, 0), size - 1), min(max(row, 0), size - 1)
            pixel[i] = row * size + column
            nearest[row, column] = max(nearest[row, column], depth[i])
        for row in range(size):
            for column in range(size):
                most = np.float32(-2.0)
                for r in range(max(0, row - 1), min(size, row + 2)):
                    for c in range(max(0, column - 1), min(size, column + 2)):
                        most = max(most, nearest[r, c])
                wide[row, column] = most
                weight[row, column], total[row, column] = 0.0, 0.0
        a_pixel = extent * np.float32(distance) / to_pixels
        for i in range(num_points):
            row, column = pixel[i] // size, pixel[i] % size
            steep = math.sqrt(max(np.float32(1) - facing[i] * facing[i], np.float32(0))) / max(facing[i], np.float32(0.05))
            if depth[i] > wide[row, column] - a_pixel * (0.5 + 1.5 * min(steep, steepest)):
                weight[row, column] += 1.0
                total[row, column] += np.float32(1) - np.float32(0.7) * facing[i]
        for row in range(size):
            for column in range(size):
                if weight[row, column] > 0:
                    plain[row, column] = total[row, column] / weight[row, column]
                    continue
                covered, around, dark = 0, 0.0, 0.0
                for r in range(max(0, row - 1), min(size, row + 2)):
                    for c in range(max(0, column - 1), min(size, column + 2)):
                        share = (2 - abs(r - row)) * (2 - abs(c - column)) / 16
                        covered += weight[r, c] > 0
                        around += share * weight[r, c]
                        dark += share * total[r, c]
                plain[row, column] = dark / max(around, 1e-6) if covered > 4 else 0.0
        for row in range(size):
            for column in range(size):
                blurred = 0.0
                for r in range(max(0, row - 1), min(size, row + 2)):
                    for c in range(max(0, column - 1), min(size, column + 2)):
                        blurred += (2 - abs(r - row)) * (2 - abs(c - column)) / 16 * plain[r, c]
                pictures[view, row, column] = blurred
    return pictures


@njit(cache=True, nogil=True)
@no_type_check
def describe(pictures, num_cells, num_directions, num_rings, num_sectors, num_relative, num_frequencies, radii, least):
    """Description float32 [views, directions * cells * cells + rings * frequencies * relative] of a cloud's pictures float32 [views, size, size]."""
    num_views, size, _ = pictures.shape
    square = np.zeros((num_views, num_directions, num_cells, num_cells), np.float32)
    polar = np.zeros((num_views, num_rings + 2, num_sectors, num_relative), np.float32)
    full = 2 * math.pi
    cosines, sines = np.empty(num_sectors), np.empty(num_sectors)
    for sector in range(num_sectors):
        cosines[sector], sines[sector] = math.cos(full * sector / num_sectors), math.sin(full * sector / num_sectors)
    for view in range(num_views):
        picture = pictures[view]
        inside, sum_x, sum_y = 0, 0.0, 0.0
        for row in range(size):
            for column in range(size):
                if picture[row, column] > least:
                    inside += 1
                    sum_x += column
                    sum_y += row
        centre_x, centre_y, spread = sum_x / max(inside, 1), sum_y / max(inside, 1), 0.0
        for row in range(size):
            for column in range(size):
                if picture[row, column] > least:
                    spread += (column - centre_x) ** 2 + (row - centre_y) ** 2
        radius = max(math.sqrt(spread / max(inside, 1)), 1e-6)
        for row in range(size):
            for column in range(size):
                right = picture[row, column + 1] - picture[row, column - 1] if 0 < column < size - 1 else np.float32(0)
                down = picture[row + 1, column] - picture[row - 1, column] if 0 < row < size - 1 else np.float32(0)
                if right == 0 and down == 0:
                    continue
                magnitude, direction = math.hypot(right, down), math.atan2(down, -right)
                turn = direction / full * num_directions
                lower_turn = math.floor(turn)
                at_y, at_x = (row + 0.5) / size * num_cells - 0.5, (column + 0.5) / size * num_cells - 0.5
                lower_y, lower_x = math.floor(at_y), math.floor(at_x)
                angle = math.atan2(centre_y - row, column - centre_x)
                at_ring = math.hypot(column - centre_x, row - centre_y) / radius / radii * num_rings - 0.5
                at_sector, at_relative = angle / full * num_sectors, (direction - angle) / full * num_relative
                lower_ring, lower_sector, lower_relative = math.floor(at_ring), math.floor(at_sector), math.floor(at_relative)
                for one in range(2):
                    of_turn = turn - lower_turn if one else 1 - (turn - lower_turn)
                    of_relative = at_relative - lower_relative if one else 1 - (at_relative - lower_relative)
                    bin_of_turn, bin_of_relative = int(lower_turn + one) % num_directions, int(lower_relative + one) % num_relative
                    for two in range(2):
                        of_y = at_y - lower_y if two else 1 - (at_y - lower_y)
                        of_ring = at_ring - lower_ring if two else 1 - (at_ring - lower_ring)
                        cell_y, ring = int(lower_y + two), min(max(int(lower_ring + two) + 1, 0), num_rings + 1)
                        for three in range(2):
                            of_x = at_x - lower_x if three else 1 - (at_x - lower_x)
                            cell_x = int(lower_x + three)
                            if 0 <= cell_y < num_cells and 0 <= cell_x < num_cells:
                                square[view, bin_of_turn, cell_y, cell_x] += magnitude * of_turn * of_y * of_x
                            of_sector = at_sector - lower_sector if three else 1 - (at_sector - lower_sector)
                            polar[view, ring, int(lower_sector + three) % num_sectors, bin_of_relative] += magnitude * of_relative * of_ring * of_sector
    num_square = num_directions * num_cells * num_cells
    features = np.zeros((num_views, num_square + num_rings * num_frequencies * num_relative), np.float32)
    for view in range(num_views):
        features[view, :num_square] = _shares(square[view].ravel())
        # Without the rims, which took what lies beyond.
        rings = _shares(polar[view, 1:-1].copy().ravel()).reshape(num_rings, num_sectors, num_relative)
        place, squared = num_square, 0.0
        for ring in range(num_rings):
            for frequency in range(num_frequencies):
                for relative in range(num_relative):
                    real, imaginary = 0.0, 0.0
                    for sector in range(num_sectors):
                        turned = frequency * sector % num_sectors
                        real += cosines[turned] * rings[ring, sector, relative]
                        imaginary += sines[turned] * rings[ring, sector, relative]
                    features[view, place] = math.hypot(real, imaginary)
                    squared += features[view, place] ** 2
                    place += 1
        features[view, num_square:] /= max(math.sqrt(squared), 1e-12)
    return features


@njit(cache=True, nogil=True)
@no_type_check
def _shares(histogram):
    """Square roots of the bins' shares; zeros for an empty histogram."""
    return np.sqrt(histogram / max(histogram.sum(), np.float32(1e-12)))
