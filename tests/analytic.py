"""Models whose score is known: Gaussian mixtures under Stable Diffusion's noise schedule, and their inversions."""

from typing import NamedTuple

import torch


def sd_alphas_cumprod() -> torch.Tensor:
    """Returns Stable Diffusion's table (1000,), float64: scaled-linear betas from 0.00085 to 0.012."""
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)


def zero_snr_alphas_cumprod() -> torch.Tensor:
    """Returns the same table rescaled to zero terminal SNR (Lin et al., arXiv 2305.08891, algorithm 1)."""
    alphas = sd_alphas_cumprod().sqrt()
    return ((alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])) ** 2


def alpha_sigma(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns alpha_t and sigma_t, shaped (..., 1, 1, 1) for timesteps of shape (...)."""
    abar = alphas_cumprod[timesteps][..., None, None, None]
    return abar.sqrt(), (1 - abar).sqrt()


class Mixture(NamedTuple):
    """A mixture of isotropic Gaussians: `means` (K, C, h, w), `stds` (K,), `weights` (K,), all float64."""

    means: torch.Tensor
    stds: torch.Tensor
    weights: torch.Tensor

    def sample(self, count: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, *self.means.shape[1:], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k][:, None, None, None] * noise

    def posterior(
        self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns E[x_0 | x] and E[noise | x] for x (N, C, h, w) at alpha, sigma (N, 1, 1, 1); alpha = 0 is fine."""
        x, alpha, sigma = (tensor.double().flatten(1) for tensor in (x, alpha, sigma))
        means, shape = self.means.flatten(1), self.means.shape[1:]
        variance = alpha**2 * self.stds**2 + sigma**2  # (N, K), of x under each component
        distance = x.square().sum(1, keepdim=True) - 2 * alpha * x @ means.T + alpha**2 * means.square().sum(1)
        log_density = -distance / (2 * variance) - means.shape[1] / 2 * variance.log()
        responsibility = (log_density + self.weights.log()).softmax(1)

        def pulled(share):  # the sum over components of share * (x - alpha * mean)
            return share.sum(1, keepdim=True) * x - alpha * share @ means

        clean = responsibility @ means + alpha * pulled(responsibility * self.stds**2 / variance)
        noise = sigma * pulled(responsibility / variance)
        return clean.unflatten(1, shape), noise.unflatten(1, shape)

    def predictor(self, alphas_cumprod: torch.Tensor):
        """Returns predict(x_t, timesteps) -> noise in x_t's dtype, as `inversion_utils.invert` takes it."""

        def predict(x_t, timesteps):
            return self.posterior(x_t, *alpha_sigma(alphas_cumprod, timesteps))[1].to(x_t.dtype)

        return predict

    def fine_noise(self, latents, timesteps, alphas_cumprod, steps: int = 300) -> torch.Tensor:
        """Returns the noise (N, C, h, w) that the probability-flow ODE from `latents` at s = 0 implies at `timesteps`.

        RK4 on dx/dphi = cos(phi) noise - sin(phi) clean, with alpha = cos(phi) and sigma = sin(phi), which is regular
        up to alpha = 0; phi = end * z**2 puts the steps where narrow components need them.
        """
        end = torch.acos(alphas_cumprod[timesteps].sqrt())[:, None, None, None]

        def velocity(x, z):
            phi = end * z**2
            clean, noise = self.posterior(x, phi.cos(), phi.sin())
            return 2 * z * end * (phi.cos() * noise - phi.sin() * clean)

        x, h = latents.double(), 1 / steps
        for i in range(steps):
            z = i * h
            k1 = velocity(x, z)
            k2 = velocity(x + h / 2 * k1, z + h / 2)
            k3 = velocity(x + h / 2 * k2, z + h / 2)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, z + h))
        alpha, sigma = alpha_sigma(alphas_cumprod, timesteps)
        return (x - alpha * latents) / sigma


def gaussian(mean: float = 0.3, std: float = 0.5, shape: tuple[int, ...] = (4, 2, 2)) -> Mixture:
    one = torch.ones(1, dtype=torch.float64)
    return Mixture(torch.full((1, *shape), mean, dtype=torch.float64), one * std, one)


def gaussian_noise(model: Mixture, latents, timesteps, alphas_cumprod) -> torch.Tensor:
    """Returns what `fine_noise` approximates, in closed form, for a mixture of one."""
    alpha, sigma = alpha_sigma(alphas_cumprod, timesteps)
    growth = (alpha**2 + sigma**2 / model.stds**2).sqrt()
    return (alpha * (model.means - latents) + growth * (latents - model.means)) / sigma


def mixture(seed: int, components: int = 8, shape: tuple[int, ...] = (4, 4, 4)) -> Mixture:
    """Returns a random mixture of about unit variance whose components, like images, are narrow: std 0.1 to 0.3."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.9 * torch.randn(components, *shape, generator=generator, dtype=torch.float64)
    stds = 0.1 * 3 ** torch.rand(components, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(components, generator=generator, dtype=torch.float64)
    return Mixture(means, stds, weights / weights.sum())
