"""`gcx.centralize_many`: trees of gradients, layouts by name, and nothing written on an error."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import gcx
from gcx._dispatch import backend_for
from gcx._names import flatten, rebuild

from libraries import ArrayLibrary
from reference import centralized, values


class Pair(NamedTuple):
    kernel: Any
    bias: Any


def read(xp: ArrayLibrary, tree: Any) -> dict[str, Any]:
    return {name: None if leaf is None else xp.numpy(leaf) for name, leaf in flatten(tree)}


def assert_leaves(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(actual) == list(expected)
    for name, leaf in expected.items():
        if leaf is None:
            assert actual[name] is None
        else:
            np.testing.assert_allclose(actual[name], leaf, rtol=0, atol=1e-14, err_msg=name)


def recorded(backend: Any, calls: list[int]) -> Callable[..., Any]:
    """Do as a backend does, and write down how many arrays it was given."""
    given = backend.centralize_many

    def centralize_many(grads: Any, *rest: Any) -> Any:
        calls.append(len(grads))
        return given(grads, *rest)

    return centralize_many


# First and last rows of two gradients, and of their results, in one array of six rows.
OVERLAPPING = {
    "each in the other": ([(0, 2), (2, 4)], [(2, 4), (0, 2)]),
    "read after it is written": ([(0, 2), (2, 4)], [(2, 4), (4, 6)]),
    "written after it is read": ([(2, 4), (0, 2)], [(4, 6), (2, 4)]),
    "written twice": ([(0, 2), (2, 4)], [(4, 6), (4, 6)]),
    "in place twice": ([(0, 2), (0, 2)], [(0, 2), (0, 2)]),
    "parts of one another": ([(0, 3), (2, 6)], [(0, 3), (2, 6)]),
    "one within the other": ([(0, 6), (2, 4)], [(0, 6), (2, 4)]),
}

# Trees of a kernel and a bias.
TREES: dict[str, Callable[[Any, Any], Any]] = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "namedtuple": Pair,
    "dict": lambda a, b: {"kernel": a, "bias": b},
    "OrderedDict": lambda a, b: OrderedDict(kernel=a, bias=b),
    "defaultdict": lambda a, b: defaultdict(list, kernel=a, bias=b),
    "nested": lambda a, b: {"layers": [{"kernel": a, "bias": b}, (a, None)], "head": Pair(b, a)},
    "with empty parts": lambda a, b: {0: a, 1: [b, [], {}, ()]},
    "with None": lambda a, b: [None, a, None, b],
}


# Trees and options that are refused: options, the tree, the error.
A, AB = {"a": values(3, 4)}, {"a": values(3, 4), "b": [values(5)]}
ONE, TWO = [values(3, 4)], [values(3, 4), values(3, 4)]
UNLIKE = r"layouts is not built like the gradients.*differ in"
REFUSED: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    *[
        ([], {"strength": x}, ValueError, r"strength .* from 0 to 1")
        for x in (-1, 1.5, float("nan"), "1")
    ],
    *[
        (x, {}, TypeError, f"list, tuple or dict.*not {type(x).__name__}")
        for x in (None, "abc", 1.0, MappingProxyType({}))
    ],
    *[
        ({"a": [values(3, 4), x]}, {}, TypeError, f"^a/1: expected an array.*{type(x).__name__}")
        for x in ("text", 1.0, SimpleNamespace(), MappingProxyType({}))
    ],
    *[
        (TWO, {"layouts": x}, ValueError, UNLIKE)
        for x in ([], ["o..."], ["o..."] * 3, [["o...", "o..."]])
    ],
    (A, {"layouts": {"*": "o...", "as": None}}, ValueError, "'as' matches no parameter.* a"),
    (A, {"layouts": {0: "o..."}}, TypeError, "a key is the name of a parameter or a glob, not 0"),
    ([], {"layouts": {"*": "o..."}}, ValueError, r"'\*' matches no parameter.*\(none\)"),
    ([None] * 99, {"layouts": {"a/*": None}}, ValueError, r"'a/\*' matches.* are: 0, .*9, \.\.\.$"),
    (AB, {"layouts": {"a": "o..."}}, ValueError, r"no key matches 'b/0'; '\*': None leaves"),
    *[
        (ONE, {"layouts": x}, TypeError, f"layouts is a .*not {type(x).__name__}")
        for x in (None, 1, {"o..."}, b"o...")
    ],
    *[
        (ONE, {"layouts": x}, ValueError, r"layout '(xyz' is not valid|oo' names no fan-in)")
        for x in ("xyz", ["xyz"], {"*": "o...", "0": "xyz"}, "oo")
    ],
    ({"a": ONE}, {"layouts": "ioo"}, ValueError, r"^a/0: layout 'ioo' .*rank 3, not 2 .*\(3, 4\)"),
    *[
        ({"a": ONE}, {"out": x}, ValueError, r"out is not built like the gradients.*differ in")
        for x in ([], {"a": []}, {"b": [1]}, {"a": [1], "b": 2}, {"a": 1}, 1)
    ],
]


@pytest.mark.parametrize(("grads", "options", "error", "message"), REFUSED)
def test_what_is_refused(grads: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        gcx.centralize_many(grads, **options)


class TestTrees:
    @pytest.mark.parametrize("build", TREES.values(), ids=TREES)
    def test_same_structure_comes_back(self, xp: ArrayLibrary, build: Any) -> None:
        kernel, bias = xp.asarray(values(3, 4)), xp.asarray(values(5))
        grads = build(kernel, bias)
        result = gcx.centralize_many(grads)
        assert repr(result) == repr(build(gcx.centralize(kernel), bias))
        for (_, before), (_, after) in zip(flatten(grads), flatten(result), strict=True):
            assert (after is before) == (before is not kernel)

    @pytest.mark.parametrize("empty", [[], (), {}, OrderedDict()])
    def test_empty(self, empty: Any) -> None:
        result = gcx.centralize_many(empty)
        assert result == empty
        assert type(result) is type(empty)

    def test_one_array_is_no_tree(self, xp: ArrayLibrary) -> None:
        with pytest.raises(TypeError, match=r"takes a list, tuple or dict.*use gcx.centralize"):
            gcx.centralize_many(xp.asarray(values(3, 4)))


K, B = values(3, 4), values(5)
MANY = {
    "encoder": [{"kernel": K, "bias": B}],
    "query": {"kernel": values(4, 2, 3)},
    "w[0]": K,
    "frozen": None,
}
GLOBS = {"query/kernel": "ioo", "*/kernel": "...o", "enc*/?/b*": None, "frozen": "o..."}
GLOBS |= {"w[0]": "i..."}  # a name is a name, brackets or not
OF_A_LIST = ["o...", gcx.Layout("...o"), None]
# Gradients, layouts, and the fan-in axes of those that are not left alone.
LAYOUTS: dict[str, tuple[Any, Any, dict[str, tuple[int, ...]]]] = {
    "one": ({"a": K, "b": [values(2, 2, 3)]}, "...o", {"a": (0,), "b/0": (0, 1)}),
    "list": ([values(3, 4, seed=k) for k in range(3)], OF_A_LIST, {"0": (1,), "1": (0,)}),
    "tuple": ([values(3, 4, seed=k) for k in range(3)], (*OF_A_LIST,), {"0": (1,), "1": (0,)}),
    "nested": ([K, {"a": K}], ["...o", {"a": "o..."}], {"0": (0,), "1/a": (1,)}),
    "globs": (MANY, GLOBS, {"encoder/0/kernel": (0,), "query/kernel": (0,), "w[0]": (0, 1)}),
    "first key": ({"a": K, "b": K}, {"*": "o...", "b": None}, {"a": (1,), "b": (1,)}),
    "any mapping": ({"a": K}, MappingProxyType({"a": "...o"}), {"a": (0,)}),
}


@pytest.mark.parametrize(("numbers", "layouts", "axes"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(xp: ArrayLibrary, numbers: Any, layouts: Any, axes: Any) -> None:
    leaves = dict(flatten(numbers))
    grads = rebuild(numbers, [x if x is None else xp.asarray(x) for x in leaves.values()])
    result = gcx.centralize_many(grads, layouts=layouts)
    assert_leaves(
        read(xp, result),
        {name: centralized(x, axes[name]) if name in axes else x for name, x in leaves.items()},
    )
    for (name, before), (_, after) in zip(flatten(grads), flatten(result), strict=True):
        assert (before is after) == (name not in axes)
    assert_leaves(read(xp, grads), leaves)


def test_arrays_left_alone_may_have_any_dtype() -> None:
    tokens = np.arange(6)
    result = gcx.centralize_many([tokens, values(3, 4)], layouts=[None, "o..."])
    assert result[0] is tokens


class TestOut:
    def test_is_written_and_returned(self, writable: ArrayLibrary) -> None:
        xp = writable

        def tree() -> Any:
            return {"a": [xp.asarray(values(3, 4)), None], "b": xp.asarray(values(5))}

        expected = {"a/0": centralized(values(3, 4), (1,)), "a/1": None, "b": values(5)}
        grads = tree()
        out = {"a": [xp.asarray(np.zeros((3, 4))), None], "b": xp.asarray(np.ones(5))}
        result = gcx.centralize_many(grads, out=out)
        assert result["a"][0] is out["a"][0]
        assert result["b"] is out["b"]
        assert_leaves(read(xp, out), expected)
        assert_leaves(read(xp, grads), read(xp, tree()))
        gcx.centralize_many(grads, out=grads)
        assert_leaves(read(xp, grads), expected)

    def test_of_several_libraries(self, xp: ArrayLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each library is called once, with all of its arrays; each result goes into its array."""

        def tree(fill: Callable[..., Any]) -> list[Any]:
            mine = [xp.asarray(fill(3, 4)), xp.asarray(fill(5))]
            return [fill(3, 4), None, *mine, fill(4, 2, 3), fill(2, 2)]

        def in_numpy(leaves: list[Any]) -> dict[str, Any]:
            return {str(k): xp.numpy(x) if k in (2, 3) else x for k, x in enumerate(leaves)}

        grads, layouts, calls = tree(values), {"5": None, "*": "o..."}, []
        for backend in {backend_for(grad) for grad in (grads[0], grads[2])}:
            monkeypatch.setattr(backend, "centralize_many", recorded(backend, calls))
        out = tree(lambda *shape: np.zeros(shape)) if xp.is_writable else None
        result = gcx.centralize_many(grads, layouts=layouts, out=out, strength=0.5)
        assert sorted(calls) == ([3] if xp.backend == "numpy" else [1, 2])
        if out is not None:
            assert all(found is target for found, target in zip(result, out, strict=True))
        expected = in_numpy(tree(values))
        assert_leaves(in_numpy(grads), expected)
        for name, axes in {"0": (1,), "2": (1,), "4": (1, 2)}.items():
            expected[name] = (expected[name] + centralized(expected[name], axes)) / 2
        assert_leaves(in_numpy(result), expected)

    def test_of_several_libraries_in_one_memory(self) -> None:
        torch = pytest.importorskip("torch")
        whole = values(8, 3)
        expected = centralized(whole, (1,))
        gcx.centralize_many(parts := [whole[1::2], torch.from_numpy(whole)[::2]], out=parts)
        np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-14)
        parts = [whole[1:], torch.from_numpy(whole)[::2]]
        with pytest.raises(ValueError, match="memory of the other"):
            gcx.centralize_many(parts, out=parts)

    def test_memory_is_counted_in_bytes(self) -> None:
        buffer = bytearray(92)
        parts = [np.frombuffer(buffer, "f8", 6, start).reshape(2, 3) for start in (0, 44)]
        with pytest.raises(ValueError, match="memory of the other"):
            gcx.centralize_many(parts, out=parts)

    def test_arrays_without_memory_share_none(self) -> None:
        torch = pytest.importorskip("torch")
        parts = [torch.empty(3, 4, device="meta") for _ in range(2)]
        assert gcx.centralize_many(parts, out=parts)[1] is parts[1]

    @pytest.mark.parametrize("keys", [("a", "b"), (1, "1")], ids=["others", "read the same"])
    def test_may_have_its_keys_in_another_order(self, keys: Any) -> None:
        grads = {key: values(3, 4, seed=k) for k, key in enumerate(keys)}
        out = {key: np.zeros((3, 4)) for key in reversed(keys)}
        gcx.centralize_many(grads, out=out)
        for key, grad in grads.items():
            np.testing.assert_allclose(out[key], centralized(grad, (1,)), atol=1e-14)

    @pytest.mark.parametrize(
        ("bad", "out", "error", "message"),
        [
            (np.ones((2, 2), int), np.zeros((2, 2), int), TypeError, "^b: .*dtype, not int64"),
            (np.ones((2, 2)), np.zeros((2, 2), int), TypeError, "^b: out: .*dtype, not int64"),
            (np.ones((2, 2)), np.zeros((2, 3)), ValueError, "^b: out has shape"),
            (np.ones(2), np.zeros(1), ValueError, "^b: out has shape"),  # a bias
            (np.ones((2, 2)), np.zeros((2, 2), "f4"), ValueError, "^b: out has dtype"),
            *[
                (
                    np.ones((2, 2)),
                    as_strided(np.zeros(3), (2, 2), steps),
                    TypeError,
                    "^b: out cannot",
                )
                for steps in ((0, 0), (8, 8))
            ],
            (np.ones((2, 2)), [np.zeros(2)], ValueError, "differ in 'b(/0)?'"),
            (np.ones((2, 2)), 0.0, TypeError, "^b: out: expected an array"),
            (np.ones((2, 2)), None, TypeError, "^b: .*None"),
            ("text", "text", TypeError, "^b: expected an array"),
            (np.ones((2, 2, 2)), np.ones((2, 2, 2)), ValueError, "^b: layout 'oi'"),
        ],
    )
    def test_nothing_is_written_if_one_array_is_bad(
        self, writable: ArrayLibrary, bad: Any, out: Any, error: type[Exception], message: str
    ) -> None:
        good = writable.asarray(values(3, 4))
        with pytest.raises(error, match=message):
            gcx.centralize_many({"a": good, "b": bad}, layouts="oi", out={"a": good, "b": out})
        np.testing.assert_array_equal(writable.numpy(good), values(3, 4))

    @pytest.mark.parametrize("rows", OVERLAPPING.values(), ids=OVERLAPPING)
    def test_must_not_lie_in_another_array(self, writable: ArrayLibrary, rows: Any) -> None:
        """Memory counts, not the object, and not the name: these read the same."""
        xp = with_views(writable)
        whole = xp.asarray(values(6, 3))
        grads, outs = (
            {"a/b": whole[slice(*one)], "a": {"b": whole[slice(*other)]}} for one, other in rows
        )
        with pytest.raises(ValueError, match=r"^the out of a/b or a/b .*memory of the other"):
            gcx.centralize_many(grads, out=outs)
        np.testing.assert_array_equal(xp.numpy(whole), values(6, 3))

    def test_may_lie_between_the_elements_of_another(self, writable: ArrayLibrary) -> None:
        xp = with_views(writable)
        whole = xp.asarray(values(4, 6))
        parts = [whole[:, :3], whole[:, 3:]]
        gcx.centralize_many(parts, out=parts)
        expected = np.hstack([centralized(part, (1,)) for part in np.split(values(4, 6), 2, 1)])
        np.testing.assert_allclose(xp.numpy(whole), expected, rtol=0, atol=1e-14)


def with_views(xp: ArrayLibrary) -> ArrayLibrary:
    if xp.name in ("strict", "dask"):
        pytest.skip("it has no views that can be written to")
    return xp
