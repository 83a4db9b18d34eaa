"""Models of Transformers with the fused layer."""
