"""How much XLA compiles."""

import jax


class Compilations:
    """Counts what XLA compiles, whoever asks for it."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **kwargs):
        self.count += event == "/jax/core/compile/backend_compile_duration"


COMPILATIONS = Compilations()


def compilations(call):
    """How much a call compiles."""
    before = COMPILATIONS.count
    jax.block_until_ready(call())
    return COMPILATIONS.count - before
