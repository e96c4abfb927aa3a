"""What Llama 4 and a quantized checkpoint are. Knows nothing of calibration or evaluation."""

__version__ = "0.1.0"
