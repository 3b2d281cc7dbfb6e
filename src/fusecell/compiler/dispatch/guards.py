"""Whether a module is as it was: what its signature has beside its tensors, held so that one look tells.

A signature walks all that a step may read and makes a key of it. Here the same is proven by identity, for modules whose
attributes can't change inside. Nothing that is held refers to a tensor or to the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import is_, itemgetter
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

__all__ = ["ModuleGuards", "guards_of", "attribute_guards"]

_ATOMS = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))
_OWN = frozenset(vars(nn.Module())) - {"training"}
_TABLES = itemgetter(
    "_parameters", "_buffers", "_modules",
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


class ModuleGuards:
    """What one module holds beside its tensors, and its submodules likewise.

    Attributes:
        paths: of all tensors, in the order of :meth:`tensors`.
    """

    def __init__(
        self,
        kind: type,
        size: int | None,
        atoms: Mapping[str, Any],
        functions: Mapping[str, ref[Any]],
        tables: tuple[_Table, _Table],
        loose: Iterable[str],
        parts: Mapping[str, ModuleGuards | None],
    ) -> None:
        self._kind, self._size = kind, size
        self._atoms, self._values = _getter(atoms), tuple(atoms.values())
        self._functions = tuple(functions.items())
        self._parameters, self._buffers = tables
        self._loose = _getter(loose) if loose else None
        self._parts = tuple(parts.items())
        self._bare = not self._functions and not parts and self._loose is None and not self._buffers.size
        self.paths = (*self._parameters.names, *self._buffers.names, *loose)
        for name, part in self._parts:
            self.paths += tuple([f"{name}.{path}" for path in (part.paths if part else ())])

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...] | None:
        """The module's tensors, in the order of ``paths``; None if anything else of it is not as it was."""
        try:
            return self._found(module)
        except KeyError:
            return None

    def _found(self, module: nn.Module) -> tuple[Tensor, ...] | None:
        state = module.__dict__
        if type(module) is not self._kind or not all(map(is_, self._atoms(state), self._values)):
            return None
        if self._size is None:
            return self._parameters.some(state["_parameters"])
        parameters, buffers, modules, a, b, c, d = _TABLES(state)
        if a or b or c or d or len(state) != self._size or len(modules) != len(self._parts):
            return None
        found = self._parameters.all(parameters)
        if found is None or (self._bare and not buffers):
            return found
        more = self._buffers.all(buffers)
        if more is None:
            return None
        found += more
        for name, function in self._functions:
            if function() is not state[name]:
                return None
        if self._loose is not None:
            found += self._loose(state)
        return self._with_parts(modules, found) if self._parts else found

    def _with_parts(self, modules: dict[str, nn.Module | None], found: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        for name, part in self._parts:
            module = modules[name]
            if part is not None and module is not None:
                more = part._found(module)
                if more is None:
                    return None
                found += more
            elif part or module:
                return None
        return found


class _Table:
    """The names in a table of parameters or buffers: of tensors, and of those that are None."""

    def __init__(self, table: Mapping[str, Tensor | None]) -> None:
        self.size = len(table)
        self.names = [name for name, value in table.items() if value is not None]
        self._absent = [name for name, value in table.items() if value is None]
        self._get = _getter(self.names)

    def all(self, table: Mapping[str, Tensor | None]) -> tuple[Tensor, ...] | None:
        """The tensors, if there are no others."""
        if len(table) != self.size:
            return None
        for name in self._absent:
            if table[name] is not None:
                return None
        return self._get(table)

    def some(self, table: Mapping[str, Tensor | None]) -> tuple[Tensor, ...]:
        """The tensors, whatever else there is."""
        return self._get(table)


def guards_of(module: nn.Module) -> ModuleGuards | None:
    """What is known of a module and all in it; None where it holds what may change inside, or has hooks."""
    state = vars(module)
    if not state.keys() >= _OWN or any(_TABLES(state)[3:]):
        return None
    atoms, functions, loose = {}, {}, []
    for name, value in state.items():
        if name in _OWN:
            continue
        if _is_constant(value):
            atoms[name] = value
        elif isinstance(value, type | FunctionType):
            # Not held: a function may enclose the module that it is an attribute of.
            functions[name] = ref(value)
        elif type(value) in _PLAIN_TENSORS:
            loose.append(name)
        else:
            return None
    parts = {name: None if part is None else guards_of(part) for name, part in module._modules.items()}
    if any(parts[name] is None and part is not None for name, part in module._modules.items()):
        return None
    tables = _Table(module._parameters), _Table(module._buffers)
    return ModuleGuards(type(module), len(state), atoms, functions, tables, loose, parts)


def attribute_guards(module: nn.Module, names: Iterable[str], parameters: Iterable[str]) -> ModuleGuards | None:
    """What is known of some attributes and parameters of a module, whatever else it holds.

    None where one of them isn't the module's own or may change inside.
    """
    state = vars(module)
    atoms = {name: state.get(name, state) for name in names}
    table = {name: module._parameters.get(name) for name in parameters}
    if not all(map(_is_constant, atoms.values())) or any(value is None for value in table.values()):
        return None
    return ModuleGuards(type(module), None, atoms, {}, (_Table(table), _Table({})), (), {})


def _is_constant(value: Any) -> bool:
    """Whether a value is the same as long as it is the same object, and refers to nothing that isn't."""
    if type(value) is tuple:
        return all(map(_is_constant, value))
    if isinstance(value, BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, ModuleType | type)
    return type(value) in _ATOMS or isinstance(value, torch._ops.OperatorBase)


def _getter(names: Iterable[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Takes these entries out of a table."""
    names = tuple(names)
    if len(names) > 1:
        return itemgetter(*names)
    if not names:
        return lambda table: ()
    (name,) = names
    return lambda table: (table[name],)
