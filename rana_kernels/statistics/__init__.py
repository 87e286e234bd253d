"""Statistics of a calibration text (moments, samples, gradients), and factors and thresholds made of them."""
