"""What is measured, never optimised: distances, neighbourhoods and memorisation on the features of any encoder."""

from mmd_finetune.metrics.frechet import frechet_distance
from mmd_finetune.metrics.sampling import class_histogram, sample_many, sampler_inputs

__all__ = ["class_histogram", "frechet_distance", "sample_many", "sampler_inputs"]
