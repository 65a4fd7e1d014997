"""A layer's product as an einsum, and the sparse product that does the same."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax

from topkast_jax.grid import Grid
from topkast_jax.layouts.packed import BlockMatrix
from topkast_jax.ops import sparse_matmul

Labels = tuple[Hashable, ...]
_SHAPE = jax.ShapeDtypeStruct


class Contraction(NamedTuple):
    """How an input and a kernel are multiplied: a label for each axis, as in an einsum.

    Attributes:
      x: axes of the input.
      kernel: axes of the kernel, without those of a stack.
      out: axes of the result.
    """

    x: Labels
    kernel: Labels
    out: Labels


def of_einsum(text: str, ndim: int) -> Contraction:
    """The contraction of an equation such as "...i,io->...o".

    Args:
      text: input and kernel on the left.
      ndim: axes of the input, for its ellipsis.
    Raises:
      NotImplementedError: an ellipsis in the kernel, or no such equation.
    Example:
      >>> of_einsum("...i,io->...o", 3)
      Contraction(x=(0, 1, 'i'), kernel=('i', 'o'), out=(0, 1, 'o'))
    """
    left, arrow, out = text.replace(" ", "").partition("->")
    x, comma, kernel = left.partition(",")
    if not arrow or not comma or "," in kernel or "..." in kernel:
        raise NotImplementedError(f"no plain product of input and kernel: {text!r}")
    dots = tuple(range(ndim - len(x.replace("...", ""))))

    def labels(side: str) -> Labels:
        before, found, after = side.partition("...")
        return (*before, *(dots if found else ()), *after)

    return Contraction(labels(x), tuple(kernel), labels(out))


def of_dot_general(dimensions: Any, x_ndim: int, kernel_ndim: int) -> Contraction:
    """The contraction of `jax.lax.dot_general` with these dimension numbers.

    Raises:
      NotImplementedError: batch dimensions.
    Example:
      >>> of_dot_general((((1,), (0,)), ((), ())), 2, 2)
      Contraction(x=(0, 1), kernel=(1, 'o1'), out=(0, 'o1'))
    """
    (of_x, of_kernel), (batch, _) = dimensions
    if len(batch):
        raise NotImplementedError("input and kernel have batch dimensions in common")
    kernel: list[Hashable] = [f"o{a}" for a in range(kernel_ndim)]
    outputs = [label for a, label in enumerate(kernel) if a not in of_kernel]
    for a, b in zip(of_x, of_kernel, strict=True):
        kernel[b] = a
    rest = (a for a in range(x_ndim) if a not in of_x)
    return Contraction(tuple(range(x_ndim)), tuple(kernel), (*rest, *outputs))


def of_pointwise(
    x: Any, size: tuple[int, ...], steps: tuple[int, ...]
) -> tuple[Any, Contraction]:
    """The contraction of a 1x1 convolution, and the input that it is about.

    Args:
      x: [..., *spatial, channels].
      size: of the window, all 1.
      steps: strides along the spatial axes.
    Returns:
      `x` at the places that are kept, [..., *spatial, *size, channels]; how to multiply.
    """
    kept = (slice(None, None, step) for step in steps)
    x = x[(..., *kept, slice(None))]
    x = x.reshape(*x.shape[:-1], *size, x.shape[-1])
    rest = x.ndim - len(size) - 1
    inputs = tuple(range(rest, x.ndim))
    dimensions = ((inputs, tuple(range(len(inputs)))), ((), ()))
    return x, of_dot_general(dimensions, x.ndim, len(inputs) + 1)


def require(how: Contraction, shape: tuple[int, ...], grid: Grid) -> None:
    """Checks that `multiply` can do a contraction.

    Args:
      how: the contraction.
      shape: of the input.
      grid: of the kernel, without stack axes.
    Raises:
      NotImplementedError: it says why not.
    """
    if any(len(set(side)) < len(side) for side in how):
        raise NotImplementedError("an index is repeated: no plain product")
    x, kernel, out = map(set, how)
    if x & kernel & out:
        raise NotImplementedError("input, kernel and output have an axis in common")
    if (x | kernel) - out - (x & kernel):
        raise NotImplementedError("it sums over an axis of input or kernel alone")
    if len(how.kernel) != len(grid.shape):
        raise NotImplementedError(
            f"its kernel has {len(grid.shape)} axes without a stack, and the layer "
            f"multiplies by {len(how.kernel)}; declare stack axes with tk.axes"
        )
    for label in x & kernel:
        if shape[how.x.index(label)] != grid.shape[how.kernel.index(label)]:
            raise NotImplementedError("input and kernel differ in the size of an axis")
    read = grid.axes.window + grid.axes.inputs
    if {how.kernel[a] for a in read} != x & kernel:
        have = " ".join("i" if a in read else "o" for a in range(len(grid.shape)))
        want = " ".join("i" if label in x else "o" for label in how.kernel)
        raise NotImplementedError(
            f"its axes are read as {have!r}, and the layer multiplies as {want!r}; "
            "declare them with tk.axes"
        )


def multiply(x: Any, matrix: BlockMatrix, how: Contraction) -> Any:
    """The contraction of an input and a sparse kernel, of one slice.

    Args:
      x: the input.
      matrix: the kernel.
      how: a contraction that `require` lets pass.
    Returns:
      The array that an einsum of the expanded kernel would give.
    """
    grid = matrix.index.here
    inputs, _ = grid.matrix_shape
    order = (*grid.axes.window, *grid.axes.inputs)
    contracted = [how.x.index(how.kernel[a]) for a in order]
    rest = [a for a in range(x.ndim) if a not in contracted]
    rows = [x.shape[a] for a in rest]
    y = sparse_matmul(x.transpose(*rest, *contracted).reshape(*rows, inputs), matrix)
    y = y.reshape(*rows, *(grid.shape[a] for a in grid.axes.outputs))
    labels = [how.x[a] for a in rest] + [how.kernel[a] for a in grid.axes.outputs]
    return y.transpose([labels.index(label) for label in how.out])


def add_bias(y: Any, bias: Any, how: Contraction) -> Any:
    """Adds a bias that has the axes of `y` that come from the kernel, in their order."""
    if bias is None:
        return y
    sizes = zip(how.out, y.shape, strict=True)
    shape = [size if label in how.kernel else 1 for label, size in sizes]
    return y + bias.reshape(shape)


def abstract_call(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Traces a call, nothing is computed; shapes stand for arrays among its arguments."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, _SHAPE)]

    def abstract(arrays: Any) -> None:
        given = dict(enumerate(leaves)) | dict(zip(places, arrays, strict=True))
        args, kwargs = jax.tree.unflatten(treedef, list(given.values()))
        call(*args, **kwargs)

    jax.eval_shape(abstract, [leaves[i] for i in places])
