"""Row 3. Preparing meshes: from a binary STL file's bytes to 10,000 surface points with normals and 24 views of 224 × 224, on one core.

Rival: trimesh (reading, sampling) and VTK offscreen on the CPU at equal looks: smooth normals up to the same crease angle, dark feature edges, 2 × 2
samples a pixel, the same cameras. Without farthest-point order, which ours includes. Parts are generated ones, refined to about 10,000 and
100,000 faces. Seconds of the process, all threads; Mesa's rasteriser is held to one thread.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.measure import Comparison, Settings, compared, row_main, seconds_in_turn
from cad_models.alignment.parts import generate_part
from cad_models.common.cameras import Camera, ring_cameras

NUM_POINTS, SIZE = 10_000, 224


def refined_parts(num_faces: int, count: int) -> list[bytes]:
    """Generated parts as binary STL, every edge cut so often that each has about ``num_faces`` faces."""
    import manifold3d

    from cad_models.common.stl_writer import binary_stl

    files = []
    for index in range(count):
        part = generate_part(index, 0)
        solid = manifold3d.Manifold(manifold3d.Mesh(part.vertices.astype(np.float32), part.faces.astype(np.uint32)))
        pieces = max(1, round((num_faces / len(part.faces)) ** 0.5))
        mesh = solid.refine(pieces).to_mesh()
        files.append(binary_stl(np.asarray(mesh.vert_properties, dtype=np.float64)[:, :3], np.asarray(mesh.tri_verts).astype(np.int64)))
    return files


def ours(data: bytes, cameras: Sequence[Camera]) -> tuple[np.ndarray, np.ndarray]:
    """Points in farthest-point order, and views."""
    import hashlib

    from cad_models.alignment.data import cad_points
    from cad_models.common.meshes import load_mesh
    from cad_models.common.rendering import render_views

    mesh = load_mesh(data, ".stl")
    points, _ = cad_points(mesh, hashlib.sha256(data).hexdigest(), NUM_POINTS)
    return points, render_views(mesh.vertices, mesh.faces, cameras, size=SIZE)


class TrimeshAndVtk:
    """One window for all meshes and views."""

    def __init__(self) -> None:
        # One thread, and no display: set before Mesa is loaded.
        os.environ["LP_NUM_THREADS"] = "0"
        os.environ.pop("DISPLAY", None)
        import vtkmodules.vtkRenderingOpenGL2  # noqa: F401  registers the renderer
        from vtkmodules.vtkRenderingCore import vtkRenderer, vtkRenderWindow

        self.window = vtkRenderWindow()
        self.window.SetOffScreenRendering(1)
        self.window.SetMultiSamples(0)
        self.window.SetSize(2 * SIZE, 2 * SIZE)
        self.renderer = vtkRenderer()
        self.renderer.SetBackground(1.0, 1.0, 1.0)
        self.window.AddRenderer(self.renderer)

    def prepare(self, data: bytes, cameras: Sequence[Camera]) -> tuple[np.ndarray, np.ndarray]:
        """Points and views."""
        import io

        import trimesh

        mesh = trimesh.load(io.BytesIO(data), file_type="stl")
        points, face = trimesh.sample.sample_surface(mesh, NUM_POINTS, seed=0)
        _ = mesh.face_normals[face]
        return points, self._views(mesh.vertices, mesh.faces, cameras)

    def _views(self, vertices: np.ndarray, faces: np.ndarray, cameras: Sequence[Camera]) -> np.ndarray:
        from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray, vtk_to_numpy
        from vtkmodules.vtkCommonCore import vtkPoints
        from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData
        from vtkmodules.vtkFiltersCore import vtkFeatureEdges, vtkPolyDataNormals
        from vtkmodules.vtkRenderingCore import vtkActor, vtkPolyDataMapper, vtkWindowToImageFilter

        center = (vertices.min(axis=0) + vertices.max(axis=0)) / 2
        unit = vertices - center
        unit = (unit / np.linalg.norm(unit, axis=1).max()).astype(np.float32)
        points, cells, data = vtkPoints(), vtkCellArray(), vtkPolyData()
        points.SetData(numpy_to_vtk(unit, deep=True))
        ids = np.column_stack([np.full(len(faces), 3), faces]).astype(np.int64).ravel()
        cells.ImportLegacyFormat(numpy_to_vtkIdTypeArray(ids, deep=True))
        data.SetPoints(points)
        data.SetPolys(cells)
        normals = vtkPolyDataNormals()
        normals.SetInputData(data)
        normals.SetFeatureAngle(32.0)
        surface, lines, edges = vtkPolyDataMapper(), vtkPolyDataMapper(), vtkFeatureEdges()
        surface.SetInputConnection(normals.GetOutputPort())
        edges.SetInputData(data)
        edges.SetFeatureAngle(32.0)
        edges.ColoringOff()
        lines.SetInputConnection(edges.GetOutputPort())
        body, drawn = vtkActor(), vtkActor()
        body.SetMapper(surface)
        body.GetProperty().SetColor(190 / 255, 206 / 255, 226 / 255)
        body.GetProperty().SetAmbient(0.42)
        body.GetProperty().SetDiffuse(0.58)
        drawn.SetMapper(lines)
        drawn.GetProperty().SetColor(34 / 255, 34 / 255, 34 / 255)
        drawn.GetProperty().SetLineWidth(2.0)
        self.renderer.RemoveAllViewProps()
        self.renderer.AddActor(body)
        self.renderer.AddActor(drawn)
        views = np.empty((len(cameras), SIZE, SIZE, 3), np.uint8)
        eye = self.renderer.GetActiveCamera()
        for view, camera in zip(views, cameras, strict=True):
            _, up, toward = camera.axes()
            tangent = (1.0 - camera.margin) * np.tan(np.radians(camera.fov_deg / 2))
            eye.SetFocalPoint(0, 0, 0)
            eye.SetPosition(*(toward * np.sqrt(1 + 1 / tangent**2)))
            eye.SetViewUp(*up)
            eye.SetViewAngle(camera.fov_deg)
            self.renderer.ResetCameraClippingRange()
            self.window.Render()
            grab = vtkWindowToImageFilter()
            grab.SetInput(self.window)
            grab.SetInputBufferTypeToRGB()
            grab.ReadFrontBufferOff()
            grab.Update()
            large = vtk_to_numpy(grab.GetOutput().GetPointData().GetScalars()).reshape(2 * SIZE, 2 * SIZE, 3)[::-1]
            view[:] = large.reshape(SIZE, 2, SIZE, 2, 3).mean(axis=(1, 3))
        return views


def check_equal(mine: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> None:
    """Raises AssertionError unless the pictures show the same silhouettes, in the same brightness, and the points lie on the same surface."""
    shown = [views.min(axis=-1) < 250 for views in (mine[1], theirs[1])]
    overlap = (shown[0] & shown[1]).sum() / (shown[0] | shown[1]).sum()
    assert overlap > 0.98, f"silhouettes overlap by {overlap:.4f}"
    grey = [views[shown[0] & shown[1]].mean() for views in (mine[1], theirs[1])]
    assert abs(grey[0] - grey[1]) < 30, f"mean brightness {grey}"
    assert mine[0].shape == theirs[0].shape == (NUM_POINTS, 3)


def _work(files: list[bytes], barrier, results) -> None:
    cameras = ring_cameras(24)
    ours(files[0], cameras)
    barrier.wait()
    cpu, wall = time.process_time(), time.perf_counter()
    for data in files:
        ours(data, cameras)
    results.put((time.process_time() - cpu, time.perf_counter() - wall))


def seconds_with(processes: int, files: list[bytes]) -> tuple[float, float]:
    """CPU and wall seconds for all files, the mean over so many processes that each do all of it at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [context.Process(target=_work, args=(files, barrier, results)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    return statistics.mean(cpu for cpu, _ in found), statistics.mean(wall for _, wall in found)


def run(settings: Settings) -> list[Comparison]:
    """Time both sizes, then ours in one and in two processes."""
    rival, cameras, found = TrimeshAndVtk(), ring_cameras(24), []
    sizes = settings.pick(((10_000, 12, 1.5), (100_000, 4, 5.0)), ((2_000, 2, 1.5),))
    for num_faces, count, aim in sizes:
        files = refined_parts(num_faces, count)
        for data in files[:2]:
            check_equal(ours(data, cameras), rival.prepare(data, cameras))
        rivals = {
            "ours": lambda files=files: [ours(data, cameras) for data in files],
            "theirs": lambda files=files: [rival.prepare(data, cameras) for data in files],
        }
        seconds = seconds_in_turn(rivals, rounds=settings.pick(3, 1), warm=False)
        faces = round(statistics.mean((len(data) - 84) / 50 for data in files), -3)
        what = f"prepare, {faces:,.0f} faces: points and 24 views"
        found.append(compared(3, what, "trimesh + VTK offscreen", seconds["ours"], seconds["theirs"], per_call=count, unit="meshes/s", at_least=aim))
    files = refined_parts(settings.pick(10_000, 2_000), settings.pick(12, 2)) * settings.pick(2, 1)
    turns = [(seconds_with(1, files), seconds_with(2, files)) for _ in range(settings.pick(3, 1))]
    shares = sorted(one[0] / two[0] for one, two in turns)
    wall = statistics.median(one[1] / two[1] for one, two in turns)
    ratio = statistics.median(shares)
    found.append(
        Comparison(
            row=3, what="prepare, 2 processes on 2 cores: share of linear", against="1 process", unit="meshes/s/core",
            ours=len(files) / statistics.median(two[0] for _, two in turns), theirs=len(files) / statistics.median(one[0] for one, _ in turns),
            ratio=ratio, low=shares[0], high=shares[-1], num_rounds=len(turns), at_least=0.9, note=f"CPU seconds; by the wall clock {wall:.2f}",
        )  # fmt: skip
    )
    return found


if __name__ == "__main__":
    row_main(run)
