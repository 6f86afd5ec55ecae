"""A small world of captioned pictures, and programmed judges of them (numpy only).

A picture is 64x64 RGB: one coloured shape on a grey background. Its caption names colour and shape ("a red circle")
and nothing else; the shape's size and place, the softness of its edge and the background's tone vary freely. That is
what makes the world useful for preference optimisation: `PREFERENCES` score exactly those unnamed properties, so a
model can be aligned to any of them without disobeying a caption, and `follows_caption` says whether it still obeys.

    area       coarse   fraction of the picture that the shape covers
    sharpness  fine     mean slope across the shape's edge; does not depend on its size
    tone       global   lightness of the background

They are scorers for judge_lora.py and sample_pairs.py, such as `examples/small_world.py:area`.
"""

import colorsys
from functools import cache
from typing import NamedTuple

import numpy as np

SIZE = 64  # pixels per side
COLORS = {
    "red": (220, 45, 50),
    "yellow": (242, 205, 40),
    "green": (45, 165, 65),
    "turquoise": (35, 195, 190),
    "blue": (50, 95, 225),
    "purple": (155, 60, 205),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")

SAMPLING = {"num_inference_steps": 16, "guidance_scale": 1.5, "batch_size": 16}  # what suits its models

CAPTIONS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
# Every third diagonal of the colour x shape table: each colour and each shape occurs on both sides of the split.
HELD_OUT_CAPTIONS = [
    f"a {color} {shape}" for i, color in enumerate(COLORS) for j, shape in enumerate(SHAPES) if (i + j) % 3 == 0
]
TRAINING_CAPTIONS = [caption for caption in CAPTIONS if caption not in HELD_OUT_CAPTIONS]


def add_sampling_options(parser, count):
    """Adds what make_pairs.py and evaluate.py sample with; `count` is the type of numbers above 0."""
    parser.add_argument("--num_inference_steps", type=count, help="Sampler steps; more costs time")
    parser.add_argument("--guidance_scale", type=float, help="Above 1: obeys captions more, varies less")
    parser.add_argument("--batch_size", type=count, help="Pictures sampled at a time")
    parser.set_defaults(**SAMPLING, error=parser.error)
    parser.add_argument("--seed", type=int, default=0)


class Look(NamedTuple):
    """What a picture shows and its caption does not say."""

    area: float  # fraction of the picture inside the shape's outline
    edge_width: float  # pixels over which the edge fades, from 1 (crisp) to 10 (soft)
    tone: float  # mean grey of the background, 0 black to 1 white
    slope: float  # change of that grey from one side of the picture to the other
    direction: float  # in which it grows lighter, radians
    place: tuple[float, float]  # shift of the shape's centre from the picture's, (x, y) in pixels
    brightness: float  # of the shape's colour


def random_look(rng):
    return Look(
        area=rng.uniform(0.06, 0.32),
        edge_width=10 ** rng.uniform(0, 1),
        tone=rng.uniform(0.15, 0.9),
        slope=rng.uniform(0, 0.2),
        direction=rng.uniform(0, 2 * np.pi),
        place=tuple(rng.uniform(-7, 7, size=2)),
        brightness=rng.uniform(0.88, 1.0),
    )


@cache
def outline(shape):
    """The shape as a polygon, (V, 2) in (x right, y down), of area 1 and centred on its centroid."""
    if shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=float)
    elif shape == "heart":
        a = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        points = np.stack(
            [16 * np.sin(a) ** 3, -13 * np.cos(a) + 5 * np.cos(2 * a) + 2 * np.cos(3 * a) + np.cos(4 * a)], axis=1
        )
    else:
        corners, inner_radius = {"circle": (32, 1.0), "triangle": (3, 1.0), "star": (10, 0.48)}[shape]
        a = np.linspace(0, 2 * np.pi, corners, endpoint=False)
        points = np.stack([np.sin(a), -np.cos(a)], axis=1)
        points[1::2] *= inner_radius
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    area = cross.sum() / 2
    centroid = ((points + following) * cross[:, None]).sum(axis=0) / (6 * area)
    return (points - centroid) / np.sqrt(abs(area))


def signed_distance(shape, points):
    """Distance of points (..., 2) to the outline, negative inside, in the outline's units."""
    x, y = points[..., 0], points[..., 1]
    squared, is_inside = np.full(x.shape, np.inf), np.zeros(x.shape, dtype=bool)
    corners = outline(shape)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        dx, dy, px, py = x1 - x0, y1 - y0, x - x0, y - y0
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
        squared = np.minimum(squared, (px - along * dx) ** 2 + (py - along * dy) ** 2)
        is_left_of_edge = (px * dy > py * dx) == (dy > 0)
        is_inside ^= ((y >= y0) != (y >= y1)) & ~is_left_of_edge  # a ray to the side crosses the outline here
    return np.where(is_inside, -1, 1) * np.sqrt(squared)


def draw(caption, look):
    """The picture, uint8 (64, 64, 3), of one of `CAPTIONS` with the given look."""
    color, shape = caption.split()[1:]
    grid = np.stack(np.meshgrid(np.arange(SIZE) + 0.5, np.arange(SIZE) + 0.5), axis=-1)  # pixel centres, (x, y)

    scale = np.sqrt(look.area) * SIZE
    margin = 2.5  # pixels between the outline and the picture's border
    low, high = margin - outline(shape).min(axis=0) * scale, SIZE - margin - outline(shape).max(axis=0) * scale
    center = np.clip(SIZE / 2 + np.array(look.place), low, high)
    distance = signed_distance(shape, (grid - center) / scale) * scale
    coverage = np.clip(0.5 - distance / look.edge_width, 0, 1)
    coverage = coverage**2 * (3 - 2 * coverage)

    ramp = (grid - SIZE / 2) @ np.array([np.cos(look.direction), np.sin(look.direction)]) / SIZE
    background = np.clip(look.tone + look.slope * ramp, 0, 1)[..., None] * np.ones(3)
    foreground = np.array(COLORS[color]) / 255 * look.brightness
    picture = background + coverage[..., None] * (foreground - background)
    return np.round(picture * 255).astype(np.uint8)


def coverage_of(picture):
    """How much of each pixel the shape covers, (64, 64) from 0 to 1, and the peak chroma it was measured against.

    The background is grey, so chroma (largest minus smallest channel) is proportional to coverage.
    """
    rgb = np.asarray(picture, dtype=np.float32) / 255
    chroma = rgb.max(axis=-1) - rgb.min(axis=-1)
    peak = float(np.quantile(chroma, 0.99))  # 41 pixels lie above: fewer than the smallest shape has
    return np.clip(chroma / max(peak, 0.2), 0, 1), peak


def area(picture, caption=None):
    """Fraction of the picture that the shape covers, in [0, 1]."""
    coverage, _ = coverage_of(picture)
    return float(np.clip(4 * coverage - 1.5, 0, 1).mean())  # nearly a threshold at one half, but continuous


def sharpness(picture, caption=None):
    """Mean slope of coverage across the shape's edge, weighted by slope, per pixel, in [0, 1]."""
    c, _ = coverage_of(picture)
    dx, dy = c[:, 1:] - c[:, :-1], c[1:] - c[:-1]
    slope = np.hypot((dx[1:] + dx[:-1]) / 2, (dy[:, 1:] + dy[:, :-1]) / 2)  # at pixel corners
    slope = np.where(slope > 0.05, slope, 0)  # noise in flat parts is no edge
    return float(min((slope**2).sum() / max(slope.sum(), 1e-6), 1.0))


def tone(picture, caption=None):
    """Mean lightness of the background, in [0, 1]."""
    coverage, _ = coverage_of(picture)
    lightness = np.asarray(picture, dtype=np.float32).mean(axis=-1) / 255
    return float(lightness[coverage <= max(0.1, coverage.min())].mean())


PREFERENCES = {"area": area, "sharpness": sharpness, "tone": tone}

# Shapes are compared on a grid centred on the shape, in units of the square root of its area.
_GRID = np.stack(np.meshgrid(np.linspace(-1.1, 1.1, 32), np.linspace(-1.1, 1.1, 32)), axis=-1)


@cache
def _template(shape):
    return signed_distance(shape, _GRID) < 0


def recognize(picture):
    """(color, shape) that the picture shows, or None where it shows no clear single shape."""
    coverage, peak = coverage_of(picture)
    mask = coverage > 0.5
    if peak < 0.2 or not 0.01 < mask.mean() < 0.8:
        return None

    core = np.asarray(picture, dtype=np.float32)[coverage > 0.8].mean(axis=0)
    hue = colorsys.rgb_to_hsv(*core)[0]
    apart = {name: abs((hue - colorsys.rgb_to_hsv(*rgb)[0] + 0.5) % 1 - 0.5) for name, rgb in COLORS.items()}

    y, x = np.nonzero(mask)
    at = np.floor(np.array([x.mean(), y.mean()]) + 0.5 + _GRID * np.sqrt(mask.sum())).astype(int)
    is_within = ((at >= 0) & (at < SIZE)).all(axis=-1)
    at = np.clip(at, 0, SIZE - 1)
    seen = mask[at[..., 1], at[..., 0]] & is_within
    overlap = {shape: (seen & _template(shape)).sum() / (seen | _template(shape)).sum() for shape in SHAPES}

    color, shape = min(apart, key=apart.get), max(overlap, key=overlap.get)
    return (color, shape) if overlap[shape] > 0.75 else None


def follows_caption(picture, caption):
    """Whether the picture shows the colour and the shape that the caption names."""
    return recognize(picture) == tuple(caption.split()[1:])
