"""Grokking seen from the training data alone: section 4 of arXiv 2605.28975."""
