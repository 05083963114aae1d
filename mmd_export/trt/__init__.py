"""TensorRT and TensorRT-RTX: one builder and one lock for both, written against the API that they share. No torch."""
