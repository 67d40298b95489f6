"""What a trained model does, read off its outputs (paper, Section 5)."""
