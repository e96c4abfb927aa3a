"""What quantization cost: likelihood, routing, retrieval, and the verdict on them."""
