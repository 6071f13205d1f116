"""Inside the machinery of PyTorch: compiled, vmapped, differentiated, fake, and odd tensors."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import gcx
from gcx import _dispatch
from gcx.backends import _torch

from reference import centralized


def weight(*shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


PROGRAMS: dict[str, Callable[[Any], Any]] = {
    "default": gcx.centralize,
    "layout": lambda g: gcx.centralize(g, layout="io..."),
    "Layout": lambda g: gcx.centralize(g, layout=gcx.Layout("...o")),
    "split axis": lambda g: gcx.centralize(g, layout=gcx.Layout("(bi)o...", b=2)),
    "axis": lambda g: gcx.centralize(g, axis=(0, -1)),
    "strength": lambda g: gcx.centralize(g, strength=0.5),
    "out": lambda g: gcx.centralize(g, out=torch.empty_like(g)),
    "low precision": lambda g: gcx.centralize(g.bfloat16()),
    "bias": lambda g: gcx.centralize(g[0, 0, 0]),
    "many": lambda g: gcx.centralize_many({"a": g, "b": (g[0], None)}),
}


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    @pytest.mark.parametrize(
        ("program", "wrap", "is_warm"),
        [
            *product(PROGRAMS, [torch.nn.Parameter], [False]),
            *product(PROGRAMS, [torch.Tensor.clone], [True]),
            *[("default", torch.nn.Parameter, True), ("default", torch.Tensor.clone, False)],
        ],
    )
    def test_compiles_to_one_graph(
        self, program: str, wrap: Any, is_warm: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        grad = wrap(weight(4, 3, 2, 2))
        with torch.no_grad():
            expected = PROGRAMS[program](grad)
            if not is_warm:
                monkeypatch.setattr(_dispatch, "by_type", {})
            # Which goes on where "eager" ends: with the graph that has been traced.
            result = torch.compile(PROGRAMS[program], fullgraph=True, backend="aot_eager")(grad)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-15)

    @pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")
    @pytest.mark.parametrize("layout", ["o...", "...o", "ioi"])
    def test_equal_numbers_compiled_by_inductor(self, layout: str) -> None:
        """The worst case of rounding, in programs that add one by one."""
        program = torch.compile(lambda g: gcx.centralize(g, layout=layout), fullgraph=True)
        found = program(torch.full((40, 40, 40), 12345.678))
        assert found.abs().max() <= 8 * 2**-10

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize(
        "function",
        [lambda g: gcx.centralize(g, out=g), lambda g: gcx.centralize_many([g], out=[g])[0]],
        ids=["one", "many"],
    )
    def test_in_place(self, function: Callable[[Any], Any], backend: str) -> None:
        grad = weight(4, 3)
        expected = gcx.centralize(grad)
        program = torch.compile(function, fullgraph=True, backend=backend)
        assert program(grad) is grad
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-15)

    def test_in_place_of_a_result_of_autograd(self) -> None:
        def program(g: Any) -> Any:
            return gcx.centralize(product := 2 * g, out=product)

        grad = weight(4, 3).requires_grad_()
        found = torch.compile(program, fullgraph=True, backend="eager")(grad)
        torch.testing.assert_close(found, program(grad), rtol=0, atol=1e-15)

    def test_strength_that_changes(self) -> None:
        def program(g: Any, strength: float) -> Any:
            return gcx.centralize(g, strength=strength)

        compiled = torch.compile(program, fullgraph=True, backend="eager")
        for strength in (1.0, 0.5, 0.25):
            torch.testing.assert_close(
                compiled(weight(4, 3), strength), program(weight(4, 3), strength)
            )

    def test_compiles_once_for_shapes_that_change(self) -> None:
        for options, sizes in (({}, (4, 4, 4)), ({"dynamic": True}, (3, 5, 8))):
            counter = CompileCounter()
            program = torch.compile(gcx.centralize, fullgraph=True, backend=counter, **options)
            for size in sizes:
                result = program(weight(size, size + 1))
                torch.testing.assert_close(result, gcx.centralize(weight(size, size + 1)))
            assert counter.frame_count == 1

    def test_errors_come_through(self) -> None:
        program = torch.compile(lambda g: gcx.centralize(g, layout="ioo"), backend="eager")
        with pytest.raises(ValueError, match=r"layout 'ioo' is for arrays of rank 3.*\(4, 3\)"):
            program(weight(4, 3))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_reproducible_breaks_the_graph(self, dtype: Any) -> None:
        grad = weight(5, 3, 49).to(dtype)
        counter = CompileCounter()
        compiled = torch.compile(lambda g: reproducible(2 * g) + 1, backend=counter)
        for _ in range(3):
            assert torch.equal(compiled(grad), reproducible(2 * grad) + 1)
        assert counter.op_count == 2  # the product and the sum
        compiled = torch.compile(reproducible, fullgraph=True, backend="eager")
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            compiled(grad)


def reproducible(grad: Any) -> Any:
    return gcx.centralize(grad, layout="io...", strength=0.7, reproducible=True)


@pytest.mark.parametrize("axis", [0, 2])
@pytest.mark.parametrize(
    ("program", "dtype", "atol"),
    [
        (gcx.centralize, torch.float64, 1e-15),
        (gcx.centralize, torch.bfloat16, 0),
        (reproducible, torch.float32, 0),
        (reproducible, torch.float16, 0),
    ],
)
def test_vmap(program: Any, dtype: Any, atol: float, axis: int) -> None:
    batch = weight(6, 5, 3, 49).to(dtype)
    found = torch.func.vmap(program, in_dims=axis)(batch)
    expected = torch.stack([program(grad) for grad in batch.unbind(axis)])
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_derivative_is_the_projection_itself() -> None:
    grad, direction = weight(3, 4), weight(4, 3).T
    _, tangent = torch.func.jvp(gcx.centralize, (grad,), (direction,))
    _, pull_back = torch.func.vjp(gcx.centralize, grad)
    for found in (tangent, *pull_back(direction)):
        torch.testing.assert_close(found, gcx.centralize(direction), rtol=0, atol=1e-15)


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("layout", ["o...", "...o", "io..."])
def test_differentiable_twice(layout: str, reproducible: bool) -> None:
    def cubed(x: Any) -> Any:
        options = {"layout": layout, "reproducible": reproducible}
        return gcx.centralize(x, strength=0.75, **options) ** 3

    grad = weight(3, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(cubed, grad)
    assert torch.autograd.gradgradcheck(cubed, grad)


def test_result_of_a_parameter_has_a_graph_only_where_gradients_are_on() -> None:
    parameter = torch.nn.Parameter(weight(3, 4))
    assert gcx.centralize(parameter).requires_grad
    with torch.no_grad():
        assert not gcx.centralize(parameter).requires_grad
        assert gcx.centralize(parameter, out=parameter) is parameter
    assert type(parameter) is torch.nn.Parameter
    np.testing.assert_allclose(parameter.detach().numpy().sum(1), 0, atol=1e-14)


def test_reproducible_on_any_number_of_threads() -> None:
    grad = weight(300, 40, 49).float()
    expected = reproducible(grad)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(reproducible(grad), expected)
    finally:
        torch.set_num_threads(threads)


def test_reproducible_is_refused_on_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        grad = torch.empty(3, 4, device="cuda")
    _torch.check_reproducible(grad, (1,))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(TypeError, match=r"reproducible=True.* not on ROCm"):
        _torch.check_reproducible(grad, (1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_tensors_without_numbers(dtype: Any) -> None:
    grad = torch.empty(3, 4, 2, 2, device="meta", dtype=dtype)
    for result in (gcx.centralize(grad), gcx.centralize(grad, out=torch.empty_like(grad))):
        assert (result.device.type, result.shape, result.dtype) == ("meta", grad.shape, dtype)
    with FakeTensorMode():
        result = gcx.centralize(torch.empty(3, 4, dtype=dtype))
    assert isinstance(result, FakeTensor)
    assert (result.shape, result.dtype) == ((3, 4), dtype)
    grad = weight(3, 4).to(dtype)
    with pytest.raises(ValueError, match="out has device meta, the gradient cpu"):
        gcx.centralize(grad, out=torch.empty(3, 4, device="meta", dtype=dtype))
    with FakeTensorMode(allow_non_fake_inputs=True):
        gcx.centralize(grad)
    torch.testing.assert_close(gcx.centralize(grad), grad - grad.mean(1, keepdim=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_with_another_fan_in() -> None:
    traced = torch.jit.trace(gcx.centralize, weight(4, 8))
    grad = weight(4, 9)
    torch.testing.assert_close(traced(grad), grad - grad.mean(1, keepdim=True))


@pytest.mark.parametrize("layout", ["o...", "...o", "io..."])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_channels_last_stays(layout: str, dtype: Any) -> None:
    plain = weight(4, 3, 2, 5).to(dtype)
    result = gcx.centralize(plain.to(memory_format=torch.channels_last), layout=layout)
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result, gcx.centralize(plain, layout=layout))


@pytest.mark.parametrize("layout", ["o...", "...o"])
@pytest.mark.parametrize("part", [(slice(1),), (slice(None), slice(1)), (0, 0)], ids=str)
def test_expanded(layout: str, part: Any) -> None:
    grad = weight(3, 4)[part].expand(3, 4)
    axes = gcx.Layout(layout).fan_in_axes(2)
    found = gcx.centralize(grad, layout=layout).numpy()
    np.testing.assert_allclose(found, centralized(grad.numpy(), axes), atol=1e-15)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("form", ["sparse_coo", "sparse_csr", "jagged"])
def test_not_dense(form: str) -> None:
    if form == "jagged":
        grad: Any = torch.nested.nested_tensor([torch.ones(3)], layout=torch.jagged)
    else:
        grad = torch.eye(3).to_sparse(layout=getattr(torch, form))
    with pytest.raises(TypeError, match=rf"dense tensor.*{form}.*to_dense\(\).*an embedding"):
        gcx.centralize(grad)
    with pytest.raises(TypeError, match=f"^embedding: .*{form}"):
        gcx.centralize_many({"embedding": grad})
    assert gcx.centralize_many([grad], layouts=[None])[0] is grad


@pytest.mark.parametrize("dtype", ["float4_e2m1fn_x2", "float8_e8m0fnu"])
def test_dtypes_without_the_numbers_a_gradient_needs(dtype: str) -> None:
    """One packs two numbers in a byte, the other knows neither 0 nor a sign."""
    grad = torch.ones(2, 4, dtype=torch.uint8).view(getattr(torch, dtype))
    with pytest.raises(TypeError, match=f"floating dtype, not torch.{dtype}"):
        gcx.centralize(grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_autograd_through_large_gradients(dtype: torch.dtype) -> None:
    grad = torch.randn(1024, 1024).to(dtype).requires_grad_()
    direction = torch.randn(1024, 1024).to(dtype)
    (found,) = torch.autograd.grad(gcx.centralize(grad), grad, direction)
    wide = direction.double()
    error = (found.double() - (wide - wide.mean(1, keepdim=True))).abs().max()
    assert error <= torch.finfo(dtype).eps * wide.abs().max()


def _inference() -> Any:
    with torch.inference_mode():
        return weight(4, 3)


# A gradient, and the `out` that PyTorch would refuse in the middle of the work.
REFUSED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "recorded": lambda: (weight(4, 3).requires_grad_(), weight(4, 3)),
    "recorded, in place": lambda: (weight(4, 3).requires_grad_()[:],) * 2,
    "a leaf, in place": lambda: (weight(4, 3).requires_grad_(),) * 2,
    "inference": lambda: (weight(4, 3), _inference()),
    "elements that overlap": lambda: (weight(4, 3), weight(4, 3).as_strided((4, 3), (1, 1))),
    "one element": lambda: (weight(4, 3), torch.zeros(4, 1).double().expand(4, 3)),
    "one element, narrow": lambda: (weight(4, 3).half(), torch.zeros(4, 1).half().expand(4, 3)),
    "watched": lambda: (weight(4, 3), torch.nn.Parameter(weight(4, 3))),
    "uninitialized": lambda: (weight(4, 3), torch.nn.UninitializedParameter()),
    "no shape": lambda: (torch.nn.UninitializedParameter(),) * 2,
    "nested": lambda: (torch.nested.nested_tensor([weight(4, 3)], layout=torch.jagged),) * 2,
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_out_is_checked_before_anything_is_written(make: Callable[[], tuple[Any, Any]]) -> None:
    grad, out = make()
    with pytest.raises(TypeError, match=r"out cannot be written|with a shape|dense tensor.*jagged"):
        gcx.centralize(grad, out=out)
    first = weight(4, 3)
    with pytest.raises(TypeError, match=r"^1: "):
        gcx.centralize_many([first, grad], out=[first, out])
    assert torch.equal(first, weight(4, 3))


def test_out_in_vmap() -> None:
    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.vmap(lambda g: gcx.centralize(g, out=torch.zeros(4, 3)))(weight(2, 4, 3))
    found = torch.vmap(lambda g: gcx.centralize_many([g], out=[g])[0])(weight(2, 4, 3))
    torch.testing.assert_close(found, gcx.centralize(weight(2, 4, 3), layout="boi"))


def test_out_may_overlap_and_be_empty() -> None:
    memory = weight(20).flatten()
    expected = gcx.centralize(memory[:12].view(4, 3).clone())
    assert torch.equal(
        gcx.centralize(memory[:12].view(4, 3), out=memory[2:14].view(4, 3)), expected
    )
    assert gcx.centralize(torch.zeros(0, 4), out=torch.zeros(1).expand(0, 4)).shape == (0, 4)


def test_out_in_forward_mode_is_refused_before_anything_is_written() -> None:
    plain, out = weight(4, 3), torch.zeros(4, 3).double()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(plain.clone(), plain)
        for grads, outs in (([plain, dual], [out, plain * 0]), ([plain, plain], [out, dual])):
            with pytest.raises(TypeError, match=r"^1: out cannot be written to.* watches"):
                gcx.centralize_many(grads, out=outs)
        tangent = forward_ad.unpack_dual(gcx.centralize(dual)).tangent
    assert not out.any()
    torch.testing.assert_close(tangent, gcx.centralize(plain))
