"""Networks that draw in few steps: one teacher, one classifier."""
