"""Overfitting seen from the training batch alone: section 5 of arXiv 2605.28975."""
