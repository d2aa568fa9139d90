"""Where an implementation is chosen, and what all operators share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

HAS_TRITON = find_spec("triton") is not None
"""A constant, because torch.compile cannot trace the look-up."""

NO_TRITON = (
    "this GPU path needs Triton, which CUDA builds of PyTorch on Linux bring along: pip install triton, "
    'or ask for the eager path with backend="eager"'
)


def uses_triton(backend: str, x: Tensor) -> bool:
    """Whether ``backend`` ("auto", "triton", "eager") means the kernels for this tensor."""
    if backend == "eager" or (backend == "auto" and (not x.is_cuda or x.dtype == torch.float64)):
        return False
    if not HAS_TRITON:
        raise ImportError(NO_TRITON)
    return True


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def memory_ended(error: BaseException) -> bool:
    """Whether an error says that there was no memory left: on a CPU a plain RuntimeError of PyTorch's allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: " in str(error)


def by_name(record: tuple, kind: type) -> dict[str, Any]:
    """``_asdict`` of a NamedTuple, which torch.compile does not trace before 2.9."""
    return {name: getattr(record, name) for name in kind._fields}  # pyright: ignore[reportAttributeAccessIssue]


class Call:
    """Base of the records that carry an operator's arguments, named, through a schema, which holds flat values only.

    ``SCHEMA`` has the operator's arguments in order, name to type; ``to_schema`` gives their values by name, and
    ``from_schema`` makes the record of them again inside the operator.
    """

    SCHEMA: ClassVar[dict[str, str]]

    @classmethod
    def signature(cls, returns: str, **more: str) -> str:
        """The schema of an operator that takes the record, and ``more`` before it."""
        arguments = ", ".join(f"{type_} {name}" for name, type_ in {**more, **cls.SCHEMA}.items())
        return f"({arguments}) -> {returns}"

    @classmethod
    def named(cls, values: Iterable[Any]) -> dict[str, Any]:
        """An operator's values, which come by position, by their names."""
        return dict(zip(cls.SCHEMA, values, strict=True))

    @classmethod
    def gradients(cls, **found: Tensor | None) -> tuple[Tensor | None, ...]:
        """What autograd wants of a backward pass: one for each argument in the schema's order, by their names here."""
        if unknown := found.keys() - cls.SCHEMA.keys():
            raise TypeError(f"{cls.__name__} has no arguments {sorted(unknown)}")
        return tuple(found.get(name) for name in cls.SCHEMA)


class Operator:
    """A custom operator that is called without PyTorch's dispatcher where nobody would notice.

    The way through the dispatcher and back takes the host longer than launching the kernels. So only who traces,
    transforms or watches operators meets ``definition``, the operator as PyTorch knows it; everybody else its
    implementation, inside an autograd function. Both have the same backward.
    """

    def __init__(self, implementation: Callable, schema: str, mutates: tuple[str, ...]):
        self.__name__, self.__doc__ = implementation.__name__, implementation.__doc__
        self.definition = torch.library.custom_op(
            f"napo_loss::{self.__name__}", implementation, mutates_args=mutates, schema=schema
        )
        self.register_fake = self.definition.register_fake
        self._implementation = implementation
        self._function: type[torch.autograd.Function] | None = None
        self._transformable: type[torch.autograd.Function] | None = None

    def register_autograd(self, backward: Callable, *, setup_context: Callable | None = None) -> None:
        self.definition.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *values):
            output = self._implementation(*values)
            if setup_context is not None:
                setup_context(ctx, values, output)
            return output

        # By their name profilers list them. torch.func knows only the second kind, which takes longer to call.
        made = self.__name__, (torch.autograd.Function,)
        self._function = type(*made, {"forward": staticmethod(forward), "backward": staticmethod(backward)})
        methods = {
            "forward": lambda *values: self._implementation(*values),
            "setup_context": setup_context or (lambda ctx, inputs, output: None),
            "backward": backward,
        }
        self._transformable = type(*made, {name: staticmethod(method) for name, method in methods.items()})

    def __call__(self, *before: Any, **record: Any) -> Any:
        """With what precedes a record in the schema, and the record's values in the order of the schema."""
        values = (*before, *record.values())
        if forward_ad._current_level >= 0:
            refuse_forward_mode(self.__name__, values)
        if _watched(values):
            if self._transformable is not None and _differentiates():
                return self._transformable.apply(*values)
            return self.definition(*values)
        if self._function is not None and torch.is_grad_enabled():
            return self._function.apply(*values)
        with torch.no_grad():
            return self._implementation(*values)


def operator(schema: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable], Operator]:
    """Makes a function of a schema's values, by position, the operator of its name."""
    return lambda implementation: Operator(implementation, schema, mutates)


PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple}


def _watched(values: Iterable[Any]) -> bool:
    """Whether somebody would notice that an operator was not called: by compiling, by a mode, by tensors of their own
    kind. Most of this PyTorch tells by private names only.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or not PLAIN.issuperset(map(type, values))
        or any(isinstance(x, Tensor) and x.is_meta for x in values)
    )


def _differentiates() -> bool:
    """Whether the innermost transform is ``torch.func.grad`` (or ``vjp``), which knows an autograd function, but not
    the one inside a custom operator."""
    if not torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return False
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  a module that type checkers do not know
    return functorch.peek_interpreter_stack().key() == functorch.TransformType.Grad


def transformed() -> bool:
    """Whether a function is compiled or transformed, to which plain operations are better known than ours."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def refuse_forward_mode(name: str, values: Iterable[Any]) -> None:
    """A custom operator would pass on a derivative of zero."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in values):
        raise NotImplementedError(
            f"{name} of napo_loss has no forward-mode derivative (jvp, jacfwd); use reverse mode, or the functions of "
            "napo_loss.reference, which are plain autograd"
        )


def no_double_backward(ctx, *grads):
    raise NotImplementedError(
        "the fused operators of napo_loss cannot be differentiated twice; for second derivatives use the "
        "functions of napo_loss.reference, which are plain autograd"
    )


def upcast(x: Tensor) -> Tensor:
    """In float32 at least. A caller's tensors are stacked in it, too: autocast refuses to stack any half precision but
    its own.
    """
    dtype = accumulation_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)  # a call that does nothing takes as long as one that adds
