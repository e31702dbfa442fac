"""Small problems that the tests of several methods share."""

import numpy as np

from medmatting.energy import Problem


def make_problem(image, labels, spacing=(1.0, 1.0, 1.0), limits=(0.0, 1.0)):
    labels = np.asarray(labels, np.uint8)
    return Problem(np.asarray(image), limits, labels, (labels == 255).astype(np.float32), spacing)


def noisy(shape, seed=0, channels=1):
    "A soft step with noise, known at both ends."
    random = np.random.default_rng(seed)
    ramp = np.clip((np.arange(shape[2]) - shape[2] / 2) / 6 + 0.5, 0, 1)
    image = 0.2 + 0.6 * ramp[:, None] + random.normal(0, 0.02, (*shape, channels))
    labels = np.full(shape, 128)
    labels[..., : shape[2] // 4], labels[..., -(shape[2] // 4) :] = 0, 255
    return make_problem(np.clip(image, 0, 1), labels)
