"""Training: state, step, loop, and the stages built from them."""
