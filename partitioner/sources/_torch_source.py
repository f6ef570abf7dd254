"""Load PyTorch models from the user's code and from ``.pt2`` files."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from dsc_split.errors import ModelFileError, UsageError
from dsc_split.partitioner.sources._torch_model import TorchModel, describe

if TYPE_CHECKING:
    from torch import nn

    from dsc_split.partitioner.sources._options import SourceOptions

__all__ = ["load_function", "load_program"]

Result = TypeVar("Result")


def load_program(path: Path) -> TorchModel:
    """Load an exported program (``torch.export.save``).

    Raises:
        ModelFileError: The file is damaged, or is no exported program.
    """
    import torch

    try:
        program = torch.export.load(path)
        module = program.module()
    except Exception as e:
        raise ModelFileError(
            f"{str(path)!r} cannot be read as an exported program: {describe(e)}. "
            "Write it with torch.export.save(torch.export.export(module, args), path)."
        ) from e
    return TorchModel(
        module=module,
        name=path.stem,
        weights_origin="from the model file",
        initialised=False,
        example=program.example_inputs,
    )


def load_function(where: str, function: str, options: SourceOptions) -> TorchModel:
    """Call the user's function, which returns a module, or a module and its example inputs.

    Args:
        where: ``FILE.py``, or a dotted module name, which may be in the current folder.
        function: Name of the function in it.
        options: Seed and weights.

    Raises:
        UsageError: There is no such file or function, it raised, or it returned something else.
        ModelFileError: The weights file does not fit.
    """
    import torch
    from torch import nn

    from dsc_split.partitioner.sources._torch_weights import load_weights

    if options.weights == "pretrained":
        raise UsageError(
            f"--weights pretrained does not go with '{where}:{function}': a function loads its own weights. "
            "Give a weights file, or nothing."
        )
    with _importable(where), torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        made = _call_function(where, function)
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"function {function!r} of {where!r} returned {_type_name(made)}; a torch.nn.Module was expected, "
            "or a tuple of a module and its example inputs."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise UsageError(
            f"function {function!r} of {where!r} returned a TorchScript module, which the exporter does not take. "
            "Return the torch.nn.Module that it was made from."
        )
    module = module.eval().requires_grad_(False).cpu()
    origin = f"as made by {function} of {Path(where).name} (seed {options.seed})"
    if options.weights not in (None, "random"):
        origin = load_weights(module, Path(str(options.weights)))
    return TorchModel(
        module=module,
        name=f"{Path(where).stem.rpartition('.')[2]}_{function}" if where.endswith(".py") else f"{where}.{function}",
        weights_origin=origin,
        initialised=options.weights in (None, "random"),
        example=None if example is None else _as_arguments(example, module),
    )


@contextlib.contextmanager
def _importable(where: str) -> Iterator[None]:
    """Make the folder of a file importable while the block runs; for a dotted name, the current folder."""
    folder = str(Path(where).resolve().parent if where.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _call_function(where: str, function: str) -> object:
    module = _import_file(Path(where)) if where.endswith(".py") else _import_name(where)
    if not hasattr(module, function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        nearest = difflib.get_close_matches(function, names, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise UsageError(f"{where!r} has no function {function!r}.{hint}")
    make = getattr(module, function)
    if not callable(make):
        raise UsageError(f"{function!r} of {where!r} is {_type_name(make)}; a function was expected.")
    return _run(lambda: make(), f"function {function!r} of {where!r}")


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"no such file: {str(path)!r}.")
    name = f"_dsc_split_source_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    _run(lambda: spec.loader.exec_module(module), f"file {str(path)!r}")  # type: ignore[union-attr] # asserted
    return module


def _import_name(name: str) -> ModuleType:
    try:
        missing = importlib.util.find_spec(name) is None
    except ModuleNotFoundError as e:
        if e.name is None or not (name + ".").startswith(e.name + "."):
            raise UsageError(f"module {name!r} cannot be imported: {e}.") from e
        missing = True
    except (ImportError, ValueError) as e:
        raise UsageError(f"module {name!r} cannot be imported: {e}.") from e
    if missing:
        nearest = difflib.get_close_matches(name, ["torchvision", "timm"], n=1)
        hint = f" Did you mean the source '{nearest[0]}:NAME'?" if nearest else ""
        raise UsageError(f"no module named {name!r}, neither installed nor in the current folder.{hint}")
    return _run(lambda: importlib.import_module(name), f"module {name!r}")


def _run(call: Callable[[], Result], what: str) -> Result:
    """Run the user's code; if it raises, raise a UsageError that says in one line what it raised and where."""
    try:
        return call()
    except (Exception, SystemExit) as e:
        frame = traceback.extract_tb(e.__traceback__)[-1]
        where = "" if frame.filename == __file__ else f" ({Path(frame.filename).name}, line {frame.lineno})"
        raise UsageError(f"{what} raised {describe(e)}{where}.") from e


def _as_arguments(example: object, module: nn.Module) -> tuple[tuple[object, ...], Mapping[str, object]]:
    """Return positional and keyword arguments for a module from the example inputs that came with it."""
    import inspect

    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Mapping):
        parameters = inspect.signature(module.forward).parameters
        takes_any = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
        if takes_any or all(name in parameters for name in example):
            return (), dict(example)
    return (example,), {}


def _type_name(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return f"a value of type {type(value).__name__}"
