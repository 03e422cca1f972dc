"""Objectives: tensors in, a number (or one per sample) out. Lower is better."""
