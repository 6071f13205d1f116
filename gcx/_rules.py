"""Rules by type of layer: which of its parameters have a fan-in, and where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from gcx.layout import LayoutLike
from gcx.plan import LeaveAlone

# What a rule says of one parameter. Adapters may know further kinds of answers.
Answer = LayoutLike | LeaveAlone | None
AnswerT = TypeVar("AnswerT")

# A layer answers for all of its own parameters, by name or glob.
Rule = Callable[[Any], Mapping[str, AnswerT]]
RuleT = TypeVar("RuleT", bound=Callable[[Any], Mapping[str, Any]])


class Rules(Generic[AnswerT]):
    """The rules of one framework, found along the MRO: a subclass follows its nearest base class.

    Parameters
    ----------
    table : mapping from type or str to rule
        Text is the qualified name of a class (``"transformers.pytorch_utils.Conv1D"``) or a glob
        of such names, so that a package needs not be imported to have rules.
    group : str
        The entry points by which other packages bring rules: their names are qualified names of
        classes, and what they refer to are rules, loaded when a layer needs them.
    """

    def __init__(self, table: Mapping[Any, Rule[AnswerT]], group: str) -> None:
        self._by_type = {kind: rule for kind, rule in table.items() if isinstance(kind, type)}
        self._by_name = {name: rule for name, rule in table.items() if isinstance(name, str)}
        self._group = group

    def register(self, kind: type) -> Callable[[RuleT], RuleT]:
        """Decorate the rule of a layer type; a later rule of the same type replaces it."""
        if not isinstance(kind, type):
            msg = f"register_layer takes the class of a layer, not {kind!r}"
            raise TypeError(msg)

        def decorator(rule: RuleT) -> RuleT:
            self._by_type[kind] = rule
            return rule

        return decorator

    def answer(self, layer: object, name: str) -> tuple[AnswerT | LeaveAlone | None, str]:
        """Ask the rule of a layer about its parameter `name`; the second is the name of that rule.

        Nothing is guessed: without a rule, or a rule that does not know the name, the parameter is
        left alone.
        """
        for base in type(layer).__mro__:
            rule = self._rule_of(base)
            if rule is not None:
                for pattern, found in rule(layer).items():
                    if fnmatchcase(name, pattern):
                        return found, base.__name__
                break
        owner = type(layer).__name__
        return LeaveAlone(f"unknown: nobody declared {owner}.{name}"), owner

    def _rule_of(self, kind: type) -> Rule[AnswerT] | None:
        if kind in self._by_type:
            return self._by_type[kind]
        qualified = f"{kind.__module__}.{kind.__qualname__}"
        found: EntryPoint | None = self._entry_points.get(qualified)
        if found is not None:
            rule: Rule[AnswerT] = found.load()
            return rule
        return next((r for name, r in self._by_name.items() if fnmatchcase(qualified, name)), None)

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        return {found.name: found for found in entry_points(group=self._group)}
