"""What computing costs, counted without computing: operations, bytes, and what the backward pass keeps. No GPU, no memory, any size.

    with pretend() as work:
        net = build("resnet50", 3)                        # tensors made in here have shapes but no values
        with work.keeping(net): loss = net(torch.empty(256, 3, 224, 224)).sum()
        loss.backward()
    work.flops, work.moved, work.kept

Operations are those of convolutions, matrix products and attention, two for a multiplication with its addition. torch's FlopCounterMode
takes the backward pass of a grouped convolution for a dense one (ConvNeXt-T: 77 GFLOP for 26), so convolutions are counted here; and the
forward values that fused attention computes again in its backward pass are not counted, as is usual for model FLOPs.
Bytes are those of eager execution: each operation reads its inputs and writes its outputs once, none of it from a cache.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
MOVES_NOTHING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}
COUNTERS = {aten.arange, aten.eye, aten.full, aten.ones, aten.zeros}  # make values out of nothing, always the same
BY_MASK = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index_put}


class Work(TorchDispatchMode):
    """Counts since it was made. `flops`, `moved` bytes; `kept` bytes of activations (see `keeping`)."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.moved, self.kept = 0, 0, 0
        self._known: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a tensor without values, held so that ids stay, and its values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func._overloadpacket
        if packet in BY_MASK:
            args = (args[0], [place for index in args[1] for place in self._places(index)], *args[2:])
        out = func(*args, **kwargs)
        self._remember(func, args, kwargs, out)
        if func.namespace == "aten" and not func.is_view and packet not in MOVES_NOTHING:
            self.flops += _flops(packet, args, kwargs, out)
            self.moved += _moved(func, args, kwargs, out)
        return out

    def _remember(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """How much a mask lets through depends on its values: those of masks and counters are kept while they follow from what is known."""
        if not isinstance(out, Tensor) or out.dtype not in (torch.bool, torch.int64):
            return
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is aten.lift_fresh.default:
            self._known[id(out)] = out, args[0]
        elif all(id(tensor) in self._known for tensor in tensors) if tensors else func._overloadpacket in COUNTERS:
            with unset_fake_temporarily():
                values = tree_map_only(Tensor, lambda tensor: self._known[id(tensor)][1], (args, kwargs))
                self._known[id(out)] = out, func(*values[0], **values[1])
        else:
            self._known.pop(id(out), None)  # changed in place by what is not known

    def _places(self, index: Tensor | None) -> list[Tensor | None]:
        """A mask as the numbers of its places, one tensor a dimension; their length is all that is known of them."""
        if index is None or index.dtype != torch.bool or id(index) not in self._known:
            return [index]
        with unset_fake_temporarily():
            count = int(self._known[id(index)][1].sum())
        return [index.new_empty(count, dtype=torch.int64) for _ in range(index.dim())]

    @contextmanager
    def keeping(self, *held: nn.Module) -> Iterator[None]:
        """A forward pass inside: what it keeps for the backward pass, each memory once, counts as `kept`; not what these modules hold."""
        seen = {_storage(tensor) for module in held for tensor in (*module.parameters(), *module.buffers())}
        alive = []  # an address is that of one memory as long as that lives

        def pack(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in seen:
                seen.add(_storage(tensor))
                alive.append(tensor.untyped_storage())
                self.kept += tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield


@contextmanager
def pretend() -> Iterator[Work]:
    """Tensors that are made inside have no values, those from outside lose theirs; nothing of this process changes."""
    with FakeTensorMode(allow_non_fake_inputs=True), Work() as work:
        yield work


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _flops(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    if packet is aten.convolution:
        x, weight, transposed = args[0], args[1], args[6]
        return 2 * (x if transposed else out).numel() * math.prod(weight.shape[1:])
    if packet is aten.convolution_backward:
        grad, x, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
        return 2 * (x if transposed else grad).numel() * math.prod(weight.shape[1:]) * sum(wanted[:2])
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return _attention(args[0], args[1])
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return 2 * _attention(args[1], args[2])
    return int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0


def _attention(q_BHTd: Tensor, k_BHSd: Tensor) -> int:
    # Two products: of queries and keys, and of weights and values, which are as wide as the keys.
    return 4 * q_BHTd.numel() * k_BHSd.shape[2]


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Inputs are read, outputs written; what is changed in place is both."""
    schema = func._schema
    given = [*zip(schema.arguments, args, strict=False), *((a, kwargs[a.name]) for a in schema.arguments if a.name in kwargs)]
    times = [(value, 2 if argument.alias_info is not None and argument.alias_info.is_write else 1) for argument, value in given]
    returned = [out] if len(schema.returns) == 1 else list(out or ())
    times += [(value, 1) for result, value in zip(schema.returns, returned, strict=False) if result.alias_info is None]
    return sum(count * _bytes(leaf) for value, count in times for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _bytes(tensor: Tensor) -> int:
    # An expanded tensor is smaller than its shape.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
