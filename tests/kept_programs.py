"""Equal programs are compiled once in a process: many tests build the same tiny network anew.

JAX looks compiled programs up by a key of their code and of the compiler's options, but only on disk, and
would write each there. Here they stay in memory, whichever function, test or file asked for them first, also
after `jax.clear_caches()`. What is counted as a compilation is counted as before.
"""

import inspect
import os
from collections import OrderedDict
from typing import Any

from jax._src import compiler

MOST = 4000  # programs kept, the last used
_READ = ["module_name", "cache_key", "compile_options", "backend", "executable_devices"]
_WRITE = ["cache_key", "compile_time_secs", "module_name", "backend", "executable", "host_callbacks"]

_kept: OrderedDict[str, Any] = OrderedDict()


def install() -> bool:
    """Keep them from now on; False with a release of JAX that looks them up in another way."""
    own = [getattr(compiler, name, None) for name in ("_cache_read", "_cache_write")]
    if None in own or [list(inspect.signature(call).parameters) for call in own] != [_READ, _WRITE]:
        return False
    read, write = own

    def key_of(cache_key):
        return cache_key, os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS")  # see `conftest.optimizing`

    def read_kept(module_name, cache_key, *rest):
        key = key_of(cache_key)
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key], 0
        return read(module_name, cache_key, *rest)

    def keep(cache_key, seconds, module_name, backend, executable, host_callbacks):
        if not host_callbacks:  # they belong to one function
            _kept[key_of(cache_key)] = executable
            if len(_kept) > MOST:
                _kept.popitem(last=False)
        write(cache_key, seconds, module_name, backend, executable, host_callbacks)

    compiler._cache_read, compiler._cache_write = read_kept, keep
    return True


def forget() -> None:
    """Drop them all."""
    _kept.clear()
