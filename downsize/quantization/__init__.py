"""What quantization techniques share: where quantizers belong, their ranges, equalization and bias correction."""
