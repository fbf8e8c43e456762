"""Training networks that draw in few steps: the methods as values, their teachers, and their runs."""
