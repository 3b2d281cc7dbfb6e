"""Identity guards: check in one pass that nothing in a module has changed but the values of its tensors.

A signature walks all that a step may read and makes a key of it, which takes longer than a small kernel. Guards prove
the same by comparing identities, for modules whose attributes cannot change inside, and a few values where they can:
they hold only if the signature is equal. The tensors, which they return, are compared by torch's own guards. Nothing
that is held here keeps a tensor or the module alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter, is_, itemgetter
from typing import Any
from weakref import ref

from torch import Tensor, nn

from fusecell.compiler.frontend.signature import (
    HOOKS,
    Key,
    attribute_names,
    content_of,
    definition,
    is_immutable,
    is_plain_tensor,
    is_reference,
    is_small_data,
)
from fusecell.compiler.frontend.step_sources import sources_of

__all__ = ["ModuleGuards", "attribute_guards", "constants", "guards_of"]

_TABLES = itemgetter("_parameters", "_buffers", "_modules", *HOOKS)


class ModuleGuards:
    """Guards on one module and all its submodules.

    Arguments:
        size: how many attributes the module has; None for guards on some attributes, whatever else there is.
        atoms: the immutable attributes.
        functions: classes and functions. A function may enclose the module, which it would keep alive.
        tables: the parameters and buffers.
        data: the content of attributes that may change inside, but are quickly compared.
        loose: the names of attributes that are tensors.
        parts: the submodules.

    Attributes:
        paths: of all tensors, in the order of :meth:`tensors`.
    """

    def __init__(
        self,
        kind: type,
        size: int | None,
        atoms: Mapping[str, Any],
        functions: Mapping[str, ref[Any]],
        data: Mapping[str, Key],
        tables: tuple[_Table, _Table],
        loose: Iterable[str],
        parts: Mapping[str, ModuleGuards | None],
    ) -> None:
        self._kind, self._size = kind, size
        self._code = None if size is None else definition(kind)
        sources = sources_of(kind, self._code)
        self._are_sources_current = None if sources is None else sources.is_current
        self._get_code = attrgetter("step.__code__" if hasattr(kind, "step") else "forward.__code__")
        self._get_atoms, self._atoms = _getter(atoms), tuple(atoms.values())
        self._functions, self._data = tuple(functions.items()), tuple(data.items())
        self._buffers = tables[1]
        # Read in every call, for each submodule too: a method of the table would take as long as what it does.
        self._order, self._absent, self._get_parameters = tables[0].order, tables[0].absent, tables[0].get
        self._get_loose = _getter(loose) if loose else None
        self._part_names, self._parts = list(parts), tuple(parts.items())
        # Most cells have nothing but atoms and parameters.
        self._simple = not (self._functions or data or parts or self._get_loose or self._buffers.order)
        self.paths = (*tables[0].names, *self._buffers.names, *loose)
        for name, part in parts.items():
            self.paths += tuple([f"{name}.{path}" for path in (part.paths if part else ())])

    def tensors(self, module: nn.Module) -> tuple[Tensor, ...] | None:
        """Return the module's tensors, in the order of ``paths``; None if anything else has changed."""
        try:
            return self._tensors(module)
        except (KeyError, AttributeError):  # an attribute is gone
            return None

    def _tensors(self, module: nn.Module) -> tuple[Tensor, ...] | None:
        state = module.__dict__
        if type(module) is not self._kind or not all(map(is_, self._get_atoms(state), self._atoms)):
            return None
        if self._size is None:
            return self._get_parameters(state["_parameters"])
        if self._code is not None and self._get_code(self._kind) is not self._code:
            return None
        if self._are_sources_current is not None and not self._are_sources_current(self._kind):
            return None
        parameters, buffers, modules, a, b, c, d = _TABLES(state)
        if a or b or c or d or len(state) != self._size or [*parameters] != self._order:
            return None
        tensors = self._get_parameters(parameters)
        for name in self._absent:
            if parameters[name] is not None:
                return None
        if self._simple and not buffers and not modules:
            return tensors
        if buffers or self._buffers.order:
            if [*buffers] != self._buffers.order or any(buffers[name] is not None for name in self._buffers.absent):
                return None
            tensors += self._buffers.get(buffers)
        for name, function in self._functions:
            if function() is not state[name]:
                return None
        for name, content in self._data:
            value = state[name]
            if not is_small_data(value) or content_of(value) != content:
                return None
        if self._get_loose is not None:
            tensors += self._get_loose(state)
        return self._with_parts(modules, tensors) if self._parts or modules else tensors

    def _with_parts(
        self, modules: dict[str, nn.Module | None], tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        """Add the tensors of the submodules; None if these, or their order, have changed."""
        if [*modules] != self._part_names:
            return None
        for name, part in self._parts:
            module = modules[name]
            if part is not None and module is not None:
                more = part._tensors(module)
                if more is None:
                    return None
                tensors += more
            elif part or module:
                return None
        return tensors


class _Table:
    """The names in a table of parameters or buffers, in order, and which of them are None."""

    def __init__(self, table: Mapping[str, Tensor | None]) -> None:
        self.order = list(table)
        self.names = [name for name, value in table.items() if value is not None]
        self.absent = [name for name, value in table.items() if value is None]
        self.get = _getter(self.names)


def guards_of(module: nn.Module) -> ModuleGuards | None:
    """Return guards on a module and all in it; None where it has hooks, or something that may change inside."""
    state = vars(module)
    if any(map(state.get, HOOKS)) or "training" not in state:  # one that torch.compile has wrapped has no flag
        return None
    atoms, functions, data, loose = {}, {}, {}, []
    for name in attribute_names(module):
        value = state[name]
        if is_immutable(value):
            atoms[name] = value
        elif is_reference(value):
            functions[name] = ref(value)
        elif is_plain_tensor(value):
            loose.append(name)
        elif is_small_data(value):
            data[name] = content_of(value)
        else:
            return None
    parts = {name: None if part is None else guards_of(part) for name, part in module._modules.items()}
    if any(parts[name] is None and part is not None for name, part in module._modules.items()):
        return None
    tables = _Table(module._parameters), _Table(module._buffers)
    return ModuleGuards(type(module), len(state), atoms, functions, data, tables, loose, parts)


def attribute_guards(module: nn.Module, names: Iterable[str], parameters: Iterable[str]) -> ModuleGuards | None:
    """Return guards on some attributes and parameters of a module, whatever else it has.

    None where one of them is missing or may change inside.
    """
    state = vars(module)
    atoms = {name: state.get(name, state) for name in names}  # a dict, which may change inside, for one that is missing
    table = {name: module._parameters.get(name) for name in parameters}
    if not all(map(is_immutable, atoms.values())) or any(value is None for value in table.values()):
        return None
    return ModuleGuards(type(module), None, atoms, {}, {}, (_Table(table), _Table({})), (), {})


def constants(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield path and value of each number, flag and name in a module that torch can guard by itself."""
    for prefix, part in module.named_modules():
        for name in attribute_names(part):
            value = vars(part).get(name)
            if isinstance(value, bool | int | float | str):
                yield f"{prefix}.{name}" if prefix else name, value


def _getter(names: Iterable[str]) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    """Return a function that takes these entries out of a table."""
    names = tuple(names)
    if len(names) > 1:
        return itemgetter(*names)
    if not names:
        return lambda table: ()
    (name,) = names
    return lambda table: (table[name],)
