"""Rules by layer type: the fan-in axes of each parameter of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Protocol, TypeVar

from gcx._names import match
from gcx.layout import LayoutLike
from gcx.plan import LeaveAlone

# The answer of a rule about one parameter. Adapters may define further kinds of answers.
Answer = LayoutLike | LeaveAlone | None
AnswerT = TypeVar("AnswerT")

# A mapping from names or globs of a layer's parameters to answers; or a function that returns one.
Rule = Mapping[str, AnswerT] | Callable[[Any], Mapping[str, AnswerT]]
RuleT = TypeVar("RuleT", bound=Mapping[str, Any] | Callable[[Any], Mapping[str, Any]])

# Answers that many rules share.
BIAS = LeaveAlone("bias")
NORM = LeaveAlone("norm")
EMBEDDING = LeaveAlone("embedding: a row is an input, not an output unit")
LENGTH = LeaveAlone("weight norm: the length of a weight")
SLOPE = LeaveAlone("slope of an activation")
MASKED = LeaveAlone("masked: the mean would take in the entries behind the mask")
UNDECLARED = "unknown: nobody declared"
NO_RULE = "unknown: no rule for this name"
NOT_CONVOLUTION = LeaveAlone("not a convolution, and layers='conv'")


def ask(rule: Rule[AnswerT], layer: object, kind: str) -> Mapping[str, AnswerT]:
    """Ask the rule of a layer type; a TypeError if it returns no mapping."""
    answers = rule if isinstance(rule, Mapping) else rule(layer)
    if not isinstance(answers, Mapping):
        remedy = "a rule returns a mapping from the names of parameters to their layouts"
        raise TypeError(f"the rule of {kind} returned {answers!r}; {remedy}")
    return answers


def check_rule(rule: object, what: str) -> None:
    if not (callable(rule) or isinstance(rule, Mapping)):
        raise TypeError(f"{what} is a mapping or a function, not {rule!r}")


class Register(Protocol):
    """The type of `register_layer` in each adapter."""

    def __call__(self, kind: Callable[..., Any]) -> Callable[[RuleT], RuleT]: ...


class Rules(Generic[AnswerT]):
    """The rules of one framework; the first base of a class whose rule has a name decides.

    A string in `table` is the qualified name of a class, or a glob of such names, for packages that
    need not be imported. Entry points of `group` add rules under such names. If all layers have one
    class, a subclass says by `kind`, `is_kind` and `kinds_of` how else they are told apart.
    """

    kind = "the class of a layer"

    def __init__(self, table: Mapping[Any, Rule[AnswerT]], group: str) -> None:
        self._table = dict(table)
        self._group = group
        # By layer type.
        self._found: dict[Any, list[tuple[str, Rule[Any]]]] = {}

    def is_kind(self, kind: object) -> bool:
        return isinstance(kind, type)

    def checked(self, rule: Rule[AnswerT], _kind: Any) -> Rule[AnswerT]:
        """Return a rule of a user, or one that checks its own answers."""
        return rule

    def kinds_of(self, layer: Any) -> Sequence[Any]:
        """List the keys of a layer in the table; the first whose rule has a name decides."""
        return type(layer).__mro__

    def register(self, kind: Callable[..., Any]) -> Callable[[RuleT], RuleT]:
        """Declare where the parameters of a layer type have their fan-in, for all plans.

        Parameters
        ----------
        kind : type
            The class of the layer. Its subclasses follow, so register a rule for one that holds
            its weight in another way. In gcx.thinc: the forward function of the layer.

        Returns
        -------
        callable
            A decorator for a rule: a mapping, or a function of a layer that returns one. Its keys
            are names or globs of the layer's own parameters, its values layouts,
            `gcx.plan.LeaveAlone` with the reason, or None. The first name that matches counts; the
            base classes answer for names that none matches. A later rule replaces an earlier one.

            In gcx.torch, a name with dots belongs to a child (``"scale.weight"``), or to a list or
            dict of parameters (``"codes.*"``), and takes precedence over the child's own rule. In
            gcx.optax, layouts are for a single layer (gcx adds the axes of a stack), and the
            function gets a linen or Haiku layer while it is called.

        Raises
        ------
        TypeError
            If `kind` is of another type, or the rule neither a mapping nor a function.
        ValueError
            When gcx.torch makes a plan, for a name that the layer does not have, unless a glob.

        Notes
        -----
        A package can declare its rules without importing gcx, by entry points of the group
        ``gcx.torch.layers``, ``gcx.optax.layers``, ``gcx.keras.layers`` or ``gcx.thinc.layers``.
        Their names are the qualified names of layers, or globs of them::

            [project.entry-points."gcx.torch.layers"]
            "mypackage.layers.InputFirst" = "mypackage.gcx_rules:input_first"

        Examples
        --------
        It is the same in each adapter::

            @gcx.torch.register_layer(Experts)
            def experts(layer):
                return {"w_in": "bio", "w_out": "bio", "router": "io", "bias_*": None}
        """
        if not self.is_kind(kind):
            raise TypeError(f"register_layer takes {self.kind}, not {kind!r}")

        def decorator(rule: RuleT) -> RuleT:
            check_rule(rule, f"the rule of {_label(kind)}")
            self._table[kind] = self.checked(rule, kind)
            self._found.clear()
            return rule

        return decorator

    def answer(self, layer: object, name: str) -> tuple[AnswerT | LeaveAlone | None, str]:
        """Return the answer about a parameter, never a guess, and the name of the rule."""
        return self.find(layer, name) or (unknown(layer, name), type(layer).__name__)

    def find(self, layer: object, name: str) -> tuple[AnswerT, str] | None:
        """Return the same as `answer`, or None if no rule knows the parameter."""
        kinds = self.kinds_of(layer)
        if kinds[0] not in self._found:
            self._found[kinds[0]] = list(self._search(kinds))
        for base, rule in self._found[kinds[0]]:
            answers = ask(rule, layer, base)
            key = match(answers, [name], separator=".").get(name)  # "." separates children
            if key is not None:
                return answers[key], base
        return None

    def _search(self, kinds: Sequence[Any]) -> Iterator[tuple[str, Rule[Any]]]:
        for kind in kinds:
            label, qualified = _label(kind), _qualified(kind)
            if kind in self._table:
                yield label, self._table[kind]
            for found in self._entry_points:
                if fnmatchcase(qualified, found.name):
                    yield label, _load(found)
            for name, rule in self._table.items():
                if isinstance(name, str) and fnmatchcase(qualified, name):
                    yield label, rule

    @cached_property
    def _entry_points(self) -> tuple[EntryPoint, ...]:
        return tuple(entry_points(group=self._group))


def _qualified(kind: Any) -> str:
    return f"{kind.__module__}.{getattr(kind, '__qualname__', '')}"  # some callables have no name


def _label(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else _qualified(kind)


def unknown(layer: object, name: str) -> LeaveAlone:
    return LeaveAlone(f"{UNDECLARED} {type(layer).__name__}.{name}")


def _load(found: EntryPoint) -> Rule[Any]:
    source = f"the entry point {found.name!r} of group {found.group!r}"
    if found.dist is not None:
        source += f", of the package {found.dist.name}"
    try:
        rule: Rule[Any] = found.load()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ImportError(f"{source}, does not load {found.value!r}: {why}") from error
    check_rule(rule, f"{source},")
    return rule


def kernel_letters(equation: str) -> str:
    """Find the layout of an einsum kernel, the second operand: ``i`` for axes that are summed."""
    operands, output = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")[:2]
    return "".join("i" if a not in output else "b" if a in inputs else "o" for a in kernel)
