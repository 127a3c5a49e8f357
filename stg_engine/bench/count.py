"""FLOPs and bytes of every GEMM, convolution and attention of a forward, by the part of the model that ran them."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from stg_engine.hooks import signature_of
from stg_engine.models import ModelSpec, modules_at
from stg_engine.reference import by_name


@dataclass(frozen=True)
class Work:
    """Of one row, or of a whole forward.

    activation_bytes   tensors that enter and leave GEMMs, convolutions and attention
    weight_bytes       parameters and buffers that enter them, but for biases: read once per launch, whatever the rows
    """

    gemm_flops: int = 0
    attention_flops: int = 0
    activation_bytes: int = 0
    weight_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(operator.add, astuple(self), astuple(other)))


class Place(NamedTuple):
    """A part of the model, and the block that it belongs to if any.

    "once"            operations outside the blocks that no row goes into, as a rotary table
    "once per step"   modules whose input is equal in all branches
    "once per prompt" modules that see what follows from the prompt alone, in blocks and outside
    "between"         modules that run in front of `block`, on rows that differ there
    "outside"         the rest outside the blocks
    "attention"       a block's self-attention modules; "skipping": what rows get that skip them
    "link"            a block's attention between modalities; "one key": to a prompt of a single token
    "block"           the rest of a block
    """

    part: str
    block: int | None = None


def counted(
    transformer: nn.Module, spec: ModelSpec, shared: Mapping[str, Any], cond: Mapping[str, Any]
) -> dict[Place, Work]:
    """The work of one plain forward by place, and that of `spec.attention_skip` on each self-attention's input."""
    inputs = {name: value for name, value in {**shared, **cond}.items() if isinstance(value, Tensor)}
    rows = [inputs[name] for name in (*spec.latents, *spec.prompt) if name in inputs]
    prompt = [inputs[name] for name in spec.prompt if name in inputs and name not in spec.latents]
    counter = Counter(transformer, rows, prompt)
    options = {"return_dict": False} if "return_dict" in signature_of(type(transformer)).parameters else {}
    with torch.no_grad(), _marked(transformer, spec, counter), counter:
        transformer(**shared, **cond, **options)
    return dict(counter.work)


class Counter:
    """While open, adds up the work of what runs, by the places that `inside` names.

    SDPA is counted as it is called, whichever kernel the device takes: some pad heads, others are GEMMs. A product of
    two activations is attention written out, or linear attention.

    rows     all inputs with rows; what follows from none of them is "once"
    prompt   those of the prompt; "once per prompt" are operations whose inputs follow from these and from weights alone
    """

    def __init__(self, transformer: nn.Module, rows: Sequence[Tensor] = (), prompt: Sequence[Tensor] = ()) -> None:
        self.work: dict[Place, Work] = defaultdict(Work)
        self._weights = {_storage(x) for x in (*transformer.parameters(), *transformer.buffers())}
        self._of_rows, self._of_prompt = ({_storage(x) for x in group} for group in (rows, prompt))
        self._places = [Place("outside")]
        self._modes = ExitStack()
        self._is_paused = False

    @contextmanager
    def inside(self, place: Place) -> Iterator[None]:
        self.push(place)
        try:
            yield
        finally:
            self.pop()

    def push(self, place: Place) -> None:
        self._places.append(place)

    def pop(self) -> None:
        self._places.pop()

    def __enter__(self) -> Counter:
        self._modes.enter_context(_AttentionCalls(self))
        self._modes.enter_context(_Operations(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._modes.close()

    def attention(self, call: Callable[[], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[..., N, S, D] over [..., N, K, D]: 4 S K D FLOPs per head."""
        self._is_paused = True
        try:
            out = call()
        finally:
            self._is_paused = False
        flops = 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        self._add(Work(attention_flops=flops, activation_bytes=sum(map(_bytes, (q, k, v, out)))), (q, k, v))
        return out

    def operation(self, func: Any, inputs: Sequence[Tensor], call: Callable[[], Any], args: tuple, kwargs: Any) -> Any:
        """An operation that is not composed of others."""
        result = call()
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if self._has_rows(inputs):
            self._of_rows.update(map(_storage, outputs))
        if self._follows_from_prompt(inputs):
            self._of_prompt.update(map(_storage, outputs))
        if self._is_paused:
            return result
        if func.name() == "stg::branch_attention":
            flops = _branch_attention_flops(*args, **kwargs)
            self._add(Work(attention_flops=flops) + _moved(inputs[:3], outputs), inputs)
        elif func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            weights = [x for x in inputs if _storage(x) in self._weights]
            activations = [x for x in inputs if _storage(x) not in self._weights]
            work = Work(gemm_flops=flops) if weights else Work(attention_flops=flops)
            # No biases: of a strided input `linear` adds its bias in an operation of its own.
            read = Work(weight_bytes=sum(_read_once(x) for x in weights if x.ndim > 1))
            self._add(work + _moved(activations, outputs) + read, inputs)
        return result

    def _add(self, work: Work, inputs: Sequence[Tensor]) -> None:
        place = self._places[-1]
        if place.part == "once per prompt" and not self._follows_from_prompt(inputs):
            place = self._places[-2]
        if place.part == "outside" and not self._has_rows(inputs):
            place = Place("once")
        self.work[place] += work

    def _has_rows(self, inputs: Sequence[Tensor]) -> bool:
        return bool(self._of_rows) and not self._of_rows.isdisjoint(map(_storage, inputs))

    def _follows_from_prompt(self, inputs: Sequence[Tensor]) -> bool:
        if not self._of_prompt:
            return False
        storages = set(map(_storage, inputs))
        return not storages.isdisjoint(self._of_prompt) and storages <= self._of_prompt | self._weights


class _AttentionCalls(TorchFunctionMode):
    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        return self.counter.attention(lambda: func(*args, **kwargs), given["query"], given["key"], given["value"])


class _Operations(TorchDispatchMode):
    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in flop_registry and func is not torch.ops.prim.device.default:
            # In inference mode `linear` and `matmul` arrive whole. A function mode would call `func` itself here.
            with torch._C.DisableTorchFunction(), self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        return self.counter.operation(func, inputs, lambda: func(*args, **kwargs), args, kwargs)


@contextmanager
def _marked(transformer: nn.Module, spec: ModelSpec, counter: Counter) -> Iterator[None]:
    """While open, modules say where the counter is, and each self-attention runs its skip, too."""
    blocks = spec.block_list(transformer)
    places: dict[nn.Module, Place] = {}

    def put(root: nn.Module, paths: Any, part: str, block: int | None = None) -> None:
        places.update(dict.fromkeys(modules_at(root, tuple(paths)), Place(part, block)))

    put(transformer, (*spec.once_per_step, *spec.time_embedding), "once per step")
    put(transformer, spec.between_blocks or (), "between")
    put(transformer, spec.once_per_prompt, "once per prompt")
    for i, block in enumerate(blocks):
        places[block] = Place("block", i)
        put(block, spec.once_per_prompt_in_block, "once per prompt")
        put(block, spec.self_attention, "attention", i)
        put(block, spec.links, "link", i)
        put(block, spec.one_key_attention, "one key", i)
    begun = 0

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal begun
        place = places[module]
        if place.part == "block":
            begun += 1
        elif place.part == "between":
            place = Place("between", begun)
        elif place.part == "one key" and kwargs["encoder_hidden_states"].shape[1] > 1:
            place = Place("block", place.block)
        counter.push(place)

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        counter.pop()
        if places[module].part == "attention":
            with counter.inside(Place("skipping", places[module].block)):
                spec.attention_skip(module, by_name(module, args, kwargs))

    with ExitStack() as hooks:
        for module in places:
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield


def _branch_attention_flops(q: Tensor, *args: Any, **kwargs: Any) -> int:
    from stg_kernels.attention.parts import Part, split

    names = ("k", "v", "kv_rows", "key_lengths", "value_rows", "own_key_rows", "text")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    k, v, kv_rows, lengths, value_rows, own_key_rows, text = map(given.get, names)
    parts = split(q, k, v, kv_rows, lengths, value_rows or (), own_key_rows or (), text, scale=1.0)
    return sum(part.flops for _, _, part in parts if isinstance(part, Part))


def _moved(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Work:
    return Work(activation_bytes=sum(map(_bytes, (*inputs, *outputs))))


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _read_once(x: Tensor) -> int:
    """Bytes of a weight, which `linear` expands for some strided inputs."""
    return prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) * x.element_size()


def _storage(x: Tensor) -> StorageWeakRef:
    """Equal for views of one tensor, and never that of a later one."""
    return StorageWeakRef(x.untyped_storage())
