"""Scripts with a question each: `python -m experiments.<folder>.<script>` from the root of the repository."""
