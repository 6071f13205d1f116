"""Rules by type of layer: which of its parameters have a fan-in, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, NamedTuple, TypeVar

from gcx._names import match
from gcx.layout import LayoutLike
from gcx.plan import LeaveAlone

# What a rule says of one parameter. Adapters may know further kinds of answers.
Answer = LayoutLike | LeaveAlone | None
AnswerT = TypeVar("AnswerT")

# Answers for the own parameters of a layer, by name or glob; or a function of the layer that
# returns them.
Rule = Mapping[str, AnswerT] | Callable[[Any], Mapping[str, AnswerT]]
RuleT = TypeVar("RuleT", bound=Mapping[str, Any] | Callable[[Any], Mapping[str, Any]])

# Reasons that many rules share.
BIAS = LeaveAlone("bias")
NORM = LeaveAlone("norm")
EMBEDDING = LeaveAlone("embedding: a row is an input, not an output unit")
NOT_CONVOLUTION = LeaveAlone("not a convolution, and layers='conv'")


def ask(rule: Rule[AnswerT], layer: object, kind: str) -> Mapping[str, AnswerT]:
    """Ask the rule of a kind of layers; a TypeError if it returns no mapping."""
    answers = rule if isinstance(rule, Mapping) else rule(layer)
    if not isinstance(answers, Mapping):
        msg = (
            f"the rule of {kind} returned {answers!r}; a rule returns a mapping from the names of "
            "parameters to their layouts"
        )
        raise TypeError(msg)
    return answers


class _Named(NamedTuple):
    """A rule, and the name of the class that it is the rule of."""

    kind: str
    rule: Rule[Any]


class Rules(Generic[AnswerT]):
    """The rules of one framework, found along the MRO.

    The nearest class counts whose rule knows the name of a parameter: a subclass follows its base
    classes, and a rule of its own needs to say only what is different.

    Parameters
    ----------
    table : mapping from type or str to rule
        Text is the qualified name of a class (``"transformers.pytorch_utils.Conv1D"``) or a glob
        of such names, so that a package needs not be imported to have rules. Of several names
        that match a class, the first one counts whose rule knows the parameter.
    group : str
        The entry points by which other packages bring rules: their names are qualified names of
        classes, or globs, and what they refer to are rules, loaded when a layer needs them.
    """

    def __init__(self, table: Mapping[Any, Rule[AnswerT]], group: str) -> None:
        self._by_type = {kind: rule for kind, rule in table.items() if isinstance(kind, type)}
        self._by_name = {name: rule for name, rule in table.items() if isinstance(name, str)}
        self._group = group
        self._found: dict[type, tuple[_Named, ...]] = {}  # a model has many layers of few types

    def register(self, kind: type) -> Callable[[RuleT], RuleT]:
        """Decorate the rule of a layer type; a later rule of the same type replaces it."""
        if not isinstance(kind, type):
            msg = f"register_layer takes the class of a layer, not {kind!r}"
            raise TypeError(msg)

        def decorator(rule: RuleT) -> RuleT:
            if not (callable(rule) or isinstance(rule, Mapping)):
                msg = f"the rule of {kind.__name__} is a mapping or a function, not {rule!r}"
                raise TypeError(msg)
            self._by_type[kind] = rule
            self._found.clear()
            return rule

        return decorator

    def answer(self, layer: object, name: str) -> tuple[AnswerT | LeaveAlone | None, str]:
        """Ask the rule of a layer about its parameter `name`; the second is the name of that rule.

        Nothing is guessed: what no rule knows is left alone.
        """
        owner = type(layer).__name__
        return self.find(layer, name) or (unknown(layer, name), owner)

    def find(self, layer: object, name: str) -> tuple[AnswerT, str] | None:
        """Answer as `answer` does, or None if no rule knows the parameter."""
        for kind, rule in self._rules_of(type(layer)):
            answers = ask(rule, layer, kind)
            key = match(answers, [name], separator=".").get(name)  # "." separates children
            if key is not None:
                return answers[key], kind
        return None

    def _rules_of(self, kind: type) -> tuple[_Named, ...]:
        if kind not in self._found:
            self._found[kind] = tuple(self._search(kind))
        return self._found[kind]

    def _search(self, kind: type) -> Iterator[_Named]:
        for base in kind.__mro__:
            qualified = f"{base.__module__}.{base.__qualname__}"
            if base in self._by_type:
                yield _Named(base.__name__, self._by_type[base])
            for found in self._entry_points:
                if fnmatchcase(qualified, found.name):
                    yield _Named(base.__name__, _load(found))
            for name, rule in self._by_name.items():
                if fnmatchcase(qualified, name):
                    yield _Named(base.__name__, rule)

    @cached_property
    def _entry_points(self) -> tuple[EntryPoint, ...]:
        return tuple(entry_points(group=self._group))


def unknown(layer: object, name: str) -> LeaveAlone:
    """Answer for a parameter that no rule knows."""
    return LeaveAlone(f"unknown: nobody declared {type(layer).__name__}.{name}")


def _load(found: EntryPoint) -> Rule[Any]:
    """Load the rule of another package."""
    brought = f"the entry point {found.name!r} of group {found.group!r}"
    if found.dist is not None:
        brought += f", of the package {found.dist.name}"
    try:
        rule = found.load()
    except Exception as error:
        msg = f"{brought}, does not load {found.value!r}: {type(error).__name__}: {error}"
        raise ImportError(msg) from error
    if not (callable(rule) or isinstance(rule, Mapping)):
        msg = f"{brought}, is {rule!r}, which is neither a mapping nor a function of a layer"
        raise TypeError(msg)
    checked: Rule[Any] = rule
    return checked
