"""The start program of every child process; Python runs it by its path.

``python -m`` would add the current folder to ``sys.path``, so that a ``queue.py`` in it would be imported. With a path,
Python adds the folder of this file instead, which is removed before the first import.
"""

import sys


def _start() -> None:
    here = __file__.rpartition("/")[0]
    sys.path[:] = [folder for folder in sys.path if folder != here]
    if "dsc_split" not in sys.modules:
        _import_package(here.rpartition("/")[0])
    from dsc_split._support.child import serve

    serve(sys.argv[1])


def _import_package(folder: str) -> None:
    """Import ``dsc_split`` from ``folder``, as the parent did, even if ``sys.path`` has another one."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("dsc_split", f"{folder}/__init__.py", submodule_search_locations=[folder])
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder!r} is no package.")
    module = sys.modules["dsc_split"] = module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    _start()
