"""Texts of a kernel at each stage of the compiler, also printed to stderr with ``FUSECELL_DEBUG``.

``FUSECELL_DEBUG=graph,plan`` prints these two of every kernel when it is compiled; ``STAGES`` has all their names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from fusecell.compiler.transforms.passes import optimise

if TYPE_CHECKING:
    from fusecell.compiler.runtime.kernel import Kernel

__all__ = ["STAGES", "KernelStages", "check_stage", "debug_stages", "print_stages"]

STAGES = ("graph", "passes", "plan", "llvm", "asm")
_VARIABLE = "FUSECELL_DEBUG"


@dataclass(frozen=True)
class KernelStages:
    """The texts of one kernel, stage by stage; ``str()`` of it is the plan."""

    kernel: Kernel = field(repr=False)

    @property
    def graph(self) -> str:
        """The graph before any pass."""
        return self.kernel.source.text

    @cached_property
    def passes(self) -> Mapping[str, str]:
        """The graph after each pass, by the pass's name, in the order in which they run."""
        pairs = self.kernel.loaded.target.pair_dot is not None
        return {name: graph.text for name, graph in optimise(self.kernel.source, pairs=pairs)[1:]}

    @property
    def plan(self) -> str:
        """The stages in the order in which they run, with what each computes and stores."""
        return self.kernel.plan.text

    @property
    def llvm(self) -> str:
        """The LLVM text."""
        return self.kernel.loaded.llvm

    @cached_property
    def assembly(self) -> str:
        """The machine code as assembly, for the target that the kernel was compiled for."""
        return self.kernel.loaded.assembly()

    def text(self, stage: str) -> str:
        """Return the text of one of ``STAGES``; of passes that change nothing only the names."""
        check_stage(stage)
        if stage == "passes":
            return self._passes_text()
        return str(getattr(self, "assembly" if stage == "asm" else stage))

    def _passes_text(self) -> str:
        parts = []
        for (_, before), (name, after) in pairwise([("", self.graph), *self.passes.items()]):
            parts.append(f"-- {name}: unchanged\n" if after == before else f"-- {name}\n{after}")
        return "".join(parts)

    def __str__(self) -> str:
        return self.plan


def check_stage(stage: str) -> None:
    """Raise ValueError unless ``stage`` is one of ``STAGES``."""
    if stage not in STAGES:
        raise ValueError(f"there is no stage {stage!r}; the stages are {', '.join(STAGES)}.")


def debug_stages() -> tuple[str, ...]:
    """Return the stages that ``FUSECELL_DEBUG`` asks for now.

    Example:
        >>> import os
        >>> from fusecell.compiler.runtime.debug_output import debug_stages
        >>> os.environ["FUSECELL_DEBUG"] = "plan, asm"
        >>> debug_stages()
        ('plan', 'asm')
        >>> del os.environ["FUSECELL_DEBUG"]

    Raises:
        ValueError: if it names an unknown stage.
    """
    words = [word.strip() for word in os.environ.get(_VARIABLE, "").split(",")]
    stages = tuple(dict.fromkeys(word for word in words if word))
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ValueError(
            f"{_VARIABLE} is {os.environ[_VARIABLE]!r}, which names no stage by {', '.join(map(repr, unknown))}; "
            f"expected a list of {', '.join(STAGES)}, with commas between."
        )
    return stages


def print_stages(kernel: Kernel, about: str, stages: tuple[str, ...]) -> None:
    """Print some stages of a kernel to stderr, each under a headline with its step, dtype and target."""
    texts = KernelStages(kernel)
    about = f"{about or kernel.plan.graph.title}, {kernel.plan.graph.dtype}, {kernel.loaded.target.name}"
    for stage in stages:
        print(f"==== fusecell: {about}: {stage} ====\n{texts.text(stage)}", file=sys.stderr, flush=True)
