"""From geometry to an electron micrograph: density, section thickness, optics, detector, and drift.

Unusual: brightness is `white * exp(-density)` with densities adding up, as in bright-field transmission. A section
is thick: a surface at distance d whose normal leans by n_z out of the section plane is averaged over the interval
d +- (thickness * n_z + pixel) / 2 in closed form, so walls cut head-on are crisp and walls cut obliquely fade to grey.
Labels follow the middle plane of the section.

Axes: Y X pixels, C vector components (z, y, x), V vesicles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from affmae_engine.data.phantom.cells import GLIA, CellField, CellPlane
from affmae_engine.data.phantom.noise import F32, SplineNoise, grain
from affmae_engine.data.phantom.organelles import MitoView, Organelles, Vesicles, cut_mitochondrion, span
from affmae_engine.data.phantom.packing import F64

CYTOPLASM, MEMBRANE, MITOCHONDRIA, VESICLE, GLIAL = range(5)
GAP_NM, BILAYER_NM = 5.0, 7.5  # half the extracellular cleft, and one membrane
_WHITE = 1.0  # transmission of empty resin on the camera's scale of 0 to 1
_DEPTH_OF_VIEW = 0.7  # part of the section thickness that carries the contrast; stain takes less deep down
_BLACK, _CONTRAST = 0.11, 1.13  # the microscopist's black level and contrast


@dataclass(frozen=True)
class Fields:
    """Smooth noise that the renderer reads at every section."""

    wobble: SplineNoise  # dents and waves of mitochondria
    sheet: SplineNoise  # endoplasmic reticulum is where it crosses zero
    patch: SplineNoise  # where reticulum, granules and haze gather

    @classmethod
    def draw(cls, rng: np.random.Generator, extent_nm: F64) -> Fields:
        low, high = np.full(3, -50.0), extent_nm + 50.0
        wobble, sheet, patch = (SplineNoise(rng, low, high, *spec) for spec in ((75.0, 3), (150.0, 1), (190.0, 2)))
        return cls(wobble, sheet, patch)


@dataclass(frozen=True)
class CellLook:
    """Per-cell traits (M,): density of the cytosol, share of microtubule sites taken, amount of granules."""

    density_M: F32
    tubules_M: F32
    granules_M: F32
    frame_M23: F32  # two unit vectors across the cell's long axis, in packing space

    @classmethod
    def draw(cls, rng: np.random.Generator, cells: CellField) -> CellLook:
        count = cells.cell_count
        density = rng.normal(0.32, 0.045, count) + 0.22 * (rng.random(count) < 0.08)
        density[GLIA] = 0.78
        tubules = rng.uniform(0.0, 0.75, count) ** 1.3
        tubules[GLIA] = 0
        granules = rng.uniform(0.5, 1.4, count)
        granules[GLIA] = 2.2
        axis = cells.axis_M3
        first = np.cross(axis, np.where(np.abs(axis[:, :1]) < 0.8, [[1.0, 0, 0]], [[0, 1.0, 0]]))
        first /= np.linalg.norm(first, axis=1, keepdims=True)
        frame = np.stack([first, np.cross(axis, first)], 1)
        return cls(*(a.astype(np.float32) for a in (density, tubules, granules, frame)))


def shell(distance: F32, blur: F32 | float, inner: float, outer: float) -> F32:
    """Share of `distance +- blur / 2` that falls within [inner, outer] on the distance axis, in closed form."""
    half = np.maximum(np.asarray(blur, dtype=np.float32), np.float32(1e-3)) / 2
    upper = np.clip(distance + half, inner, outer)
    return np.asarray((upper - np.clip(distance - half, inner, outer)) / (2 * half), dtype=np.float32)


@dataclass(frozen=True)
class Section:
    """What is drawn on while one section is rendered: positions in nm, density, labels and organelle ids so far."""

    z_nm: float
    y_nm: F64
    x_nm: F64
    pixel_nm: tuple[float, float, float]
    plane: CellPlane
    density_YX: F32
    labels_YX: np.ndarray
    organelles_YX: np.ndarray

    def blur(self, slope_YX: F32) -> F32:
        """Width in nm over which a surface of this slope is averaged by section thickness and pixel size."""
        in_plane = np.sqrt(np.maximum(1 - slope_YX**2, 0))
        width = _DEPTH_OF_VIEW * self.pixel_nm[0] * slope_YX + max(self.pixel_nm[1:]) * in_plane
        return np.asarray(width, dtype=np.float32)


def draw_tissue(
    section: Section, look: CellLook, fields: Fields, organelles: Organelles, rng: np.random.Generator
) -> None:
    """Fill density and labels of one section, back to front."""
    plane = section.plane
    wobble = fields.wobble.grid(section.z_nm, section.y_nm, section.x_nm)
    patch = fields.patch.grid(section.z_nm, section.y_nm, section.x_nm)
    section.density_YX[:] = look.density_M[plane.cell_YX]
    section.labels_YX[:] = np.where(plane.cell_YX == GLIA, GLIAL, CYTOPLASM)
    free = np.clip((plane.depth_YX - 18) / 12, 0, 1)  # cytosol texture ends at the membrane
    section.density_YX[:] += free * _cytosol(section, look, patch, rng)
    section.density_YX[:] += free * _microtubules(section, look)
    section.density_YX[:] += _reticulum(section, fields, patch)
    draw_vesicles(section, organelles.vesicles, len(organelles.mitochondria) + 1)
    for number, body in enumerate(organelles.mitochondria, 1):
        view = cut_mitochondrion(body, plane, wobble, section.z_nm, section.y_nm, section.x_nm)
        if view is not None:
            _draw_mitochondrion(section, view, number, rng)
    _draw_synapses(section, organelles.synapse_S3, wobble)
    _draw_membranes(section, wobble)
    section.organelles_YX[(section.labels_YX != MITOCHONDRIA) & (section.labels_YX != VESICLE)] = 0


def _cytosol(section: Section, look: CellLook, patch_CYX: F32, rng: np.random.Generator) -> F32:
    """1/f texture plus dark granules (ribosomes, filaments, glycogen) that gather in patches."""
    shape, pixel = section.density_YX.shape, section.pixel_nm[1:]
    octaves = ((4.0, 0.07), (9.0, 0.085), (22.0, 0.05), (60.0, 0.03))
    layers = [grain(rng, shape, pixel, scale) for scale, _ in octaves]
    texture = sum(np.float32(amplitude) * layer for layer, (_, amplitude) in zip(layers, octaves, strict=True))
    granules = np.maximum(layers[1] + np.float32(0.5) * layers[0] - np.float32(0.9), 0)
    amount = look.granules_M[section.plane.cell_YX] * (np.float32(0.2) + np.float32(0.15) * np.tanh(patch_CYX[0]))
    return np.asarray(texture + amount * granules + np.float32(0.03) * patch_CYX[0], dtype=np.float32)


def _microtubules(section: Section, look: CellLook) -> F32:
    """Rings (lines when the neurite runs in the plane) at jittered sites of a lattice across each cell's long axis.

    A site never leaves its lattice square by jitter, so each pixel looks at one site only.
    """
    spacing, wander, radius = np.float32(78), np.float32(0.28), np.float32(11)
    plane = section.plane
    across = [
        sum(look.frame_M23[:, a, c][plane.cell_YX] * plane.warped_CYX[c] for c in range(3)) / spacing for a in range(2)
    ]
    square = [np.floor(a).astype(np.int32) for a in across]
    mixed = square[0].astype(np.uint32) * np.uint32(73856093) ^ square[1].astype(np.uint32) * np.uint32(19349663)
    mixed = (mixed ^ plane.cell_YX.astype(np.uint32) * np.uint32(83492791)) * np.uint32(2654435761)
    mixed ^= mixed >> np.uint32(15)
    mixed = mixed * np.uint32(2246822519)
    bits = [(mixed >> np.uint32(shift)) & np.uint32(1023) for shift in (0, 11, 21)]
    draws = [b.astype(np.float32) / np.float32(1023) for b in bits]
    gap = [(a - s - 0.5 - wander * (2 * d - 1)) * spacing for a, s, d in zip(across, square, draws[:2], strict=True)]
    distance = np.sqrt(gap[0] ** 2 + gap[1] ** 2)
    present = draws[2] < look.tubules_M[plane.cell_YX]
    blur = max(section.pixel_nm[1:]) + 5
    ring = shell(distance, blur, float(radius) - 7, float(radius)) * np.float32(0.75)
    return np.asarray(present * ring, dtype=np.float32)


def _reticulum(section: Section, fields: Fields, patch_CYX: F32) -> F32:
    """Endoplasmic reticulum: thin double lines along the zero crossings of a smooth field, in a few patches."""
    sheet = fields.sheet.grid(section.z_nm, section.y_nm, section.x_nm)[0]
    if min(sheet.shape) < 2:
        return np.zeros_like(sheet)
    grad_y, grad_x = np.gradient(sheet, section.pixel_nm[1], section.pixel_nm[2])
    distance = np.abs(sheet) / np.sqrt(grad_y**2 + grad_x**2 + np.float32(2e-6))
    gate = np.clip((patch_CYX[1] - np.float32(1.0)) * 4, 0, 1)
    gate = gate * np.clip((section.plane.depth_YX - 42) / 10, 0, 1) * (section.plane.cell_YX != GLIA)
    blur = max(section.pixel_nm[1:]) + 3
    wall = shell(distance, blur, 9.0, 17.0) * np.float32(0.85) - shell(distance, blur, -9.0, 9.0) * np.float32(0.12)
    return np.asarray(gate * wall, dtype=np.float32)


def draw_vesicles(section: Section, vesicles: Vesicles, first_id: int) -> None:
    """Stamp the vesicles that the section touches; fainter when it only grazes them, and then unlabelled.

    Args:
        first_id: organelle id of the first vesicle.
    """
    thickness, pixel = section.pixel_nm[0], max(section.pixel_nm[1:])
    offset_V = np.abs(vesicles.centre_V3[:, 0] - section.z_nm)
    for index in np.flatnonzero(offset_V < vesicles.radius_V + thickness / 2).tolist():
        y, x = vesicles.centre_V3[index, 1:]
        radius, offset = float(vesicles.radius_V[index]), float(offset_V[index])
        reach = radius + 12
        rows = span(section.y_nm, y - reach, y + reach)
        columns = span(section.x_nm, x - reach, x + reach)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        window = (rows, columns)
        seen = min(offset + radius, thickness / 2) - max(offset - radius, -thickness / 2)
        share = seen / min(2 * radius, thickness)
        cut = np.sqrt(max(radius**2 - max(offset - thickness / 4, 0) ** 2, 36.0))  # where the slab shows it widest
        dy, dx = section.y_nm[rows] - y, section.x_nm[columns] - x
        distance = np.sqrt(dy[:, None] ** 2 + dx[None] ** 2).astype(np.float32)
        own = section.plane.cell_YX[window] == vesicles.cell_V[index]
        mark = shell(distance, pixel, cut - 8, cut) * np.float32(1.15)
        mark += shell(distance, pixel, -cut, cut - 8) * np.float32(1.1 if vesicles.core_V[index] else 0.1)
        body = own * shell(distance, pixel, -cut, cut) * np.float32(share)  # hides what lies behind
        section.density_YX[window] = section.density_YX[window] * (1 - body) + body * np.float32(0.34)
        section.density_YX[window] += own * mark * np.float32(share)
        if share > 0.5:
            inside = own & (distance < cut)
            section.labels_YX[window][inside] = VESICLE
            section.organelles_YX[window][inside] = first_id + index


def _draw_mitochondrion(section: Section, view: MitoView, organelle: int, rng: np.random.Generator) -> None:
    """Double membrane, dark matrix, and wavy cristae that start and end at random."""
    window, inside = (view.rows, view.columns), view.inside_YX
    blur = section.blur(view.slope_YX)
    body = shell(inside, blur, 0, 1e6)
    rim = shell(inside, blur, 0, 7) * 1.5 + shell(inside, blur, 7, 13) * 0.4 + shell(inside, blur, 13, 20) * 1.25
    core = shell(inside, blur, 20, 1e6)
    period, lean = view.body.period, abs(float(view.body.crista_3[0]))
    # Lamellae that lean out of the plane overlap within the section and wash out.
    crisp = float(np.exp(-0.5 * (2.2 * section.pixel_nm[0] * lean / period) ** 2))
    fold = np.abs(np.mod(view.phase_YX / period, 1) - 0.5) * period  # nm from the middle of the nearest crista
    pixel = max(section.pixel_nm[1:])
    lumen = shell(fold, pixel, -6, 6)
    wall = shell(fold, pixel, 6, 13)
    number = np.floor(view.phase_YX / period)
    gate = np.clip(1.8 * np.sin(number * 2.4 + _along(section, view) / 80) + 1.3, 0, 1)
    texture = grain(rng, inside.shape, section.pixel_nm[1:], 6.0) * np.float32(0.13)
    density = rim + core * (0.62 * view.body.darkness + crisp * gate * (0.6 * wall - 0.5 * lumen) + texture)
    under = section.density_YX[window]
    section.density_YX[window] = under * (1 - body) + body * np.float32(0.25) + density.astype(np.float32)
    section.labels_YX[window][inside > 0] = MITOCHONDRIA
    section.organelles_YX[window][inside > 0] = organelle


def _along(section: Section, view: MitoView) -> F32:
    """Position (nm) along the lamellae in the section plane, so that cristae break off at random lengths."""
    across = view.body.crista_3
    along = section.y_nm[view.rows, None] * across[2] - section.x_nm[None, view.columns] * across[1]
    return np.asarray(along, dtype=np.float32)


def _draw_synapses(section: Section, synapse_S3: F64, wobble_CYX: F32) -> None:
    """Dense material on both sides of a membrane, strongest at the synapse; part of no class of its own."""
    for z, y, x in synapse_S3[np.abs(synapse_S3[:, 0] - section.z_nm) < 130]:
        rows = span(section.y_nm, y - 170, y + 170)
        columns = span(section.x_nm, x - 170, x + 170)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        dy, dx = section.y_nm[rows, None] - y, section.x_nm[None, columns] - x
        near = np.exp(-(dy**2 + dx**2 + (section.z_nm - z) ** 2) / (2 * 62.0**2))
        coat = np.exp(-np.maximum(section.plane.depth_YX[rows, columns] - 14, 0) / 13)
        fluff = 1 + 0.25 * wobble_CYX[0, rows, columns]
        section.density_YX[rows, columns] += (0.95 * near * coat * fluff).astype(np.float32)


def _draw_membranes(section: Section, wobble_CYX: F32) -> None:
    """Two bilayers with a cleft between them; the label takes the cleft in, as annotators do."""
    plane = section.plane
    blur = section.blur(plane.slope_YX)
    depth = plane.depth_YX + np.float32(0.9) * wobble_CYX[1]
    edge = GAP_NM + BILAYER_NM
    # The own side counts to the midline and the far side is its mirror image.
    cleft = shell(depth, blur, -GAP_NM, GAP_NM)
    layers = shell(depth, blur, GAP_NM, edge) + shell(depth, blur, -edge, -GAP_NM)
    covered = cleft + layers
    stain = np.float32(1) + np.float32(0.12) * wobble_CYX[2]
    wall = stain * (np.float32(2.0) * layers + np.float32(1.2) * cleft)
    section.density_YX[:] = section.density_YX * (1 - covered) + wall
    half = max(edge, 0.75 * max(section.pixel_nm[1:]))  # never thinner than a connected line of pixels
    section.labels_YX[plane.depth_YX < half] = MEMBRANE


def expose(
    density_YX: F32,
    pixel_nm: tuple[float, float, float],
    noise: float,
    gain: float,
    offset: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Transmission, point spread, uneven beam, shot noise and detector: density (Y, X) to uint8 (Y, X)."""
    light = np.float32(_WHITE) * np.exp(-density_YX)
    sigma = (4.2 / pixel_nm[1], 4.2 / pixel_nm[2])
    light = ndimage.gaussian_filter(light, sigma, mode="nearest", truncate=3.0)
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in light.shape)
    tilt = rng.normal(0, 0.012, 3).astype(np.float32)
    light = light * (1 + tilt[0] * y[:, None] + tilt[1] * x[None] + tilt[2] * (y[:, None] ** 2 + x[None] ** 2))
    if noise > 0:
        dose = 1 / noise**2  # electrons per pixel at full scale
        light = (rng.poisson(np.maximum(light, 0) * dose) / dose).astype(np.float32)
        light = ndimage.gaussian_filter(light, 0.45, mode="nearest")
    return np.clip(np.rint(255 * (((light - _BLACK) * _CONTRAST - 0.5) * gain + 0.5 + offset)), 0, 255).astype(np.uint8)
