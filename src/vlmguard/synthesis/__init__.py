"""From image-text samples to a rewriter's training data, in the paper's three reasoning stages."""
