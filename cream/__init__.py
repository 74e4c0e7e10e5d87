"""cream: trains a LLaMA-class model by Consistency Regularized Self-Rewarding (CREAM, arXiv 2410.12735)."""

__version__ = "0.1.0"
