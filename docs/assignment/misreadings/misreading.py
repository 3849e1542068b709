"""What a misreading is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from docs.assignment.mutation import Changes, Function


@dataclass(frozen=True, eq=False)
class Misreading:
    """One mutant, with its sentence: "This is what one gets {gives}; {instead}."

    It belongs to the step whose page of the definitions clears it up, and is also tried in later steps that need this one.
    """

    name: str
    step: str
    gives: str
    instead: str
    changes: Changes


def changed_results(*changes: Callable[..., Any] | None) -> Callable[[Function], Function]:
    """A gradient with its results changed: for each a function of the result and of the arguments, or None."""

    def change(original: Function) -> Function:
        def backward(*arguments: Any, **options: Any) -> tuple[Any, ...]:
            results = original(*arguments, **options)
            pairs = zip(results, changes, strict=True)
            return tuple(result if alter is None else alter(result, *arguments) for result, alter in pairs)

        return backward

    return change
