"""How far a picture of the small world is from any drawing of its caption: what training spoils.

The nearest drawing has the caption's colour and shape; its size, place, edge, tone, slope and brightness are fitted.
The distance is the root mean square over pixels and channels, in [0, 1]. No picture of a model is a drawing. Large
shapes have more edge, where models err, and they err more where edges are sharp: so distances are compared with the
base model's at the same size of shape and width of edge.

Noise, wrong shapes and wrong colours raise the distance. Blur does so beyond the softest edge only, since a drawing
may have soft edges. So the distance alone would call a blurred model undamaged, and evaluate.py takes the loss of
sharpness for damage, too.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import small_world
import torch
import torch.nn.functional as F

NUM_STEPS = 8  # of the fit from each start
EDGE_STARTS = (1.5, 5.0)  # pixels
EDGE_RANGE = (0.7, 14.0)  # pixels; somewhat more than drawings have, as models' edges vary more
AREA_RANGE = (0.01, 0.8)
BRIGHTNESS_RANGE = (0.88, 1.0)  # as `random_look` draws it
# The base model's distances go as 1 + 1.5 * sqrt(area) - 0.14 * log(edge_width): +- 0.3 and 0.03, 1,980 pictures
SIZE_SLOPE, EDGE_SLOPE = 1.5, -0.14
_REACH, _NODES = 3.0, 385  # the table of distances: half its side in the outline's units, and its points a side


class Fit(NamedTuple):
    """The nearest drawings of N pictures."""

    distance: np.ndarray  # (N,), root mean square over pixels and channels, 0 to 1
    area: np.ndarray  # (N,), fraction of the picture
    edge_width: np.ndarray  # (N,), pixels
    drawings: np.ndarray  # (N, 64, 64, 3), 0 to 1


@cache
def _distances(shape):
    """The shape's signed distances on a grid, (1, _NODES, _NODES)."""
    axis = np.linspace(-_REACH, _REACH, _NODES)
    points = np.stack(np.meshgrid(axis, axis), axis=-1)
    return torch.tensor(small_world.signed_distance(shape, points)[None], dtype=torch.float32)


class _Drawings:
    """Drawings of N captions by four parameters: log of the side (pixels), place x, y, and log of the edge's width.

    Given these, a drawing is linear in tone, slope (two components) and brightness, which are solved for.
    """

    def __init__(self, pictures, captions):
        side = small_world.SIZE
        self.target = torch.tensor(np.asarray(pictures), dtype=torch.float32).reshape(len(captions), -1, 3) / 255
        self.table = torch.stack([_distances(caption.split()[2]) for caption in captions])
        colors = [small_world.COLORS[caption.split()[1]] for caption in captions]
        self.color = torch.tensor(colors, dtype=torch.float32) / 255  # (N, 3)
        axis = torch.arange(side) + 0.5
        self.grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)  # (64, 64, 2), x and y in pixels
        ramp = (self.grid.reshape(-1, 2) - side / 2) / side
        self.plane = torch.cat([torch.ones(len(ramp), 1), ramp], dim=1)  # (4096, 3): tone and two slopes
        self.grey, self.colored = self.target.sum(-1), (self.target @ self.color[:, :, None])[..., 0]

    def __call__(self, parameters):
        """The best drawings with these parameters (N, 4), as (N, 4096, 3)."""
        scale, center, width = parameters[:, :1].exp(), parameters[:, 1:3], parameters[:, 3:].exp()
        at = (self.grid - center[:, None, None]) / (_REACH * scale[:, None, None])
        distance = F.grid_sample(self.table, at, padding_mode="border", align_corners=True).flatten(1) * scale
        coverage = (0.5 - distance / width).clamp(0, 1)
        coverage = coverage**2 * (3 - 2 * coverage)  # (N, 4096)

        # Least squares: background (1 - coverage) * plane for all channels alike, shape coverage * color * brightness
        background = (1 - coverage)[..., None] * self.plane
        gram = 3 * background.mT @ background + 1e-3 * torch.eye(3)
        mixed = (background.mT @ coverage[..., None]) * self.color.sum(-1)[:, None, None]  # (N, 3, 1)
        seen = background.mT @ self.grey[..., None]
        from_seen, from_mixed = torch.linalg.solve(gram, torch.cat([seen, mixed], dim=-1)).split(1, dim=-1)
        own = (coverage**2).sum(-1) * (self.color**2).sum(-1) - (mixed * from_mixed).sum((1, 2))
        brightness = ((coverage * self.colored).sum(-1) - (mixed * from_seen).sum((1, 2))) / own.clamp(min=1e-3)
        brightness = brightness.clamp(*BRIGHTNESS_RANGE)[:, None, None]
        grey = (background @ (from_seen - brightness * from_mixed)).clamp(0, 1)
        return grey + coverage[..., None] * brightness * self.color[:, None]

    def limit(self, parameters):
        """Parameters within their ranges."""
        low, high = (small_world.SIZE * bound**0.5 for bound in AREA_RANGE)
        scale = parameters[:, :1].clamp(np.log(low), np.log(high))
        place = parameters[:, 1:3].clamp(0, small_world.SIZE)
        return torch.cat([scale, place, parameters[:, 3:].clamp(*map(np.log, EDGE_RANGE))], dim=1)


@torch.no_grad()
def fit_drawings(pictures, captions):
    """The nearest drawing of each caption to its picture, uint8 (N, 64, 64, 3), by Levenberg-Marquardt steps."""
    drawings, starts = _Drawings(pictures, captions), []
    for picture in pictures:
        coverage, _ = small_world.coverage_of(picture)
        y, x = np.indices(coverage.shape) + 0.5
        weight = np.where(coverage > 0.5, coverage, 0) + 1e-6
        side = small_world.SIZE * max(small_world.area(picture), 0.02) ** 0.5
        starts.append([np.log(side), (x * weight).sum() / weight.sum(), (y * weight).sum() / weight.sum(), 0.0])
    best_parameters, best_error = None, None
    for width in EDGE_STARTS:
        parameters = torch.tensor(starts, dtype=torch.float32)
        parameters[:, 3] = np.log(width)
        parameters, error = _descend(drawings, parameters)
        if best_error is None:
            best_parameters, best_error = parameters, error
        is_better = error < best_error
        best_parameters = torch.where(is_better[:, None], parameters, best_parameters)
        best_error = torch.minimum(error, best_error)
    scale, width = best_parameters[:, 0].exp(), best_parameters[:, 3].exp()
    area = ((scale / small_world.SIZE) ** 2).double().numpy()
    drawn = drawings(best_parameters).reshape(len(captions), small_world.SIZE, small_world.SIZE, 3)
    return Fit(best_error.sqrt().double().numpy(), area, width.double().numpy(), drawn.numpy())


def _descend(drawings, parameters):
    """Parameters (N, 4) after `NUM_STEPS` steps, and their mean squared errors (N,)."""
    steps = torch.tensor([0.01, 0.1, 0.1, 0.03])  # of the finite differences
    parameters = drawings.limit(parameters)
    drawn = drawings(parameters)
    error = ((drawn - drawings.target) ** 2).mean((1, 2))
    damping = torch.full((len(parameters), 1, 1), 1e-2)
    for _ in range(NUM_STEPS):
        moved = [drawings(parameters + step) for step in torch.diag(steps)]
        jacobian = torch.stack([(other - drawn).flatten(1) for other in moved], dim=-1)  # (N, 12288, 4), a step each
        hessian = jacobian.mT @ jacobian
        gradient = jacobian.mT @ (drawings.target - drawn).flatten(1)[..., None]
        diagonal = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2) + 1e-6)
        change = torch.linalg.solve(hessian + damping * diagonal, gradient)[..., 0] * steps
        tried = drawings.limit(parameters + change)
        tried_drawn = drawings(tried)
        tried_error = ((tried_drawn - drawings.target) ** 2).mean((1, 2))
        is_better = tried_error < error
        parameters = torch.where(is_better[:, None], tried, parameters)
        drawn = torch.where(is_better[:, None, None], tried_drawn, drawn)
        error = torch.where(is_better, tried_error, error)
        damping = torch.where(is_better[:, None, None], damping / 5, damping * 10).clamp(1e-5, 1e4)
    return parameters, error


def distance_ratio(fit, base):
    """How much farther from drawings than the base model's pictures of the same size and edge; 1.0 is as far.

    `fit` and `base` are the fits of pictures of the same captions and seeds.
    """
    return float(_relative_distance(fit) / _relative_distance(base))


def _relative_distance(fit):
    expected = 1 + SIZE_SLOPE * np.sqrt(fit.area) + EDGE_SLOPE * np.log(fit.edge_width)
    return fit.distance.mean() / expected.mean()
