"""The GradMix operations: where a view was most activated, and the view with that place covered by another image."""

from trainer.gradmix.reference import activation_map, find_peaks, gradmix_views, layercam_peaks

__all__ = ["activation_map", "find_peaks", "gradmix_views", "layercam_peaks"]
