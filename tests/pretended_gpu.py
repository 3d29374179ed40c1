"""A pretended GPU: tensors that behave as if they were on "cuda", on a machine without one.

Inside `with pretended_gpu():` each tensor made on "cuda" or moved there is a `PretendedTensor`.
It tells Python that it is on cuda:0, but its numbers lie on the CPU and are computed by the CPU.
As on a real GPU, a computation that mixes it with a tensor of the CPU fails, and so does a
generator of the other device. This finds what was left on the wrong device, and lost dtypes. It
doesn't find what CUDA's own kernels do: their rounding, speed, memory and streams. Autocast casts
nothing.

C++ is told that the tensor is on META, as meta tensors are those without memory of their own. It
can't be told "cuda": it would call the driver, for its streams and its thread for backward.
"""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock
from weakref import WeakValueDictionary

import torch
from accelerate.state import PartialState
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import flow_grpo

CPU = torch.device("cpu")
CUDA = torch.device("cuda:0")
# C++ makes new tensors on the device that it was told. By the index, these requests differ from
# those for the true meta device, on which libraries build models before they load their weights.
META = torch.device("meta:7")

aten = torch.ops.aten
COPIES = {aten.copy_, aten._to_copy}  # They go between any devices.
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}

# The generators on "cuda", by their addresses in C++: an operation is given the generator as
# another Python object, which has lost its class.
GPU_GENERATORS = WeakValueDictionary()


class PretendedTensor(Tensor):
    """The tensor `content` of the CPU, as one of the GPU. `content` itself never has a graph."""

    @staticmethod
    def __new__(cls, content):
        layout = {
            "strides": content.stride(),
            "storage_offset": content.storage_offset(),
            "dtype": content.dtype,
            "device": META,
        }
        self = Tensor._make_wrapper_subclass(cls, content.shape, **layout)
        self.content = content
        return self

    # Operations come to `__torch_dispatch__`, behind autograd. To come here too would cost time.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    # What Python is told. C++ would answer for META.
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def __repr__(self):
        return f"PretendedTensor({self.content})"

    # C++ replaces the shape and dtype when `data` is set, but it doesn't know of the content.
    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        if not isinstance(value, PretendedTensor):
            raise RuntimeError("the data of a tensor on cuda:0 can't become that of one on the CPU")
        torch._C.TensorBase.data.__set__(self, value)
        self.content = value.content

    # These read the memory, of which C++ has none.
    def tolist(self):
        return self.content.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    # A checkpoint holds the content. So without `map_location`, it is read on the CPU.
    def __reduce_ex__(self, protocol):
        saved = self.content.detach()
        if isinstance(self, torch.nn.Parameter):
            saved = torch.nn.Parameter(saved, self.requires_grad)
        return saved.__reduce_ex__(protocol)


class PretendedGenerator(torch.Generator):
    """A generator that says where it is. In C++, which would ask CUDA, it is the CPU's."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        if torch.device(device).type == "cuda":
            GPU_GENERATORS[self._cdata] = self
        return self

    @property
    def device(self):
        return CUDA if self._cdata in GPU_GENERATORS else CPU


class PretendedDevice(TorchDispatchMode):
    """Brings also those operations to `compute` that are given no pretended tensor yet."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def as_told_to_cpp(value):
    """META if `value` names the pretended device, else the value itself."""
    is_device = isinstance(value, (str, torch.device))
    return META if is_device and torch.device(value).type == "cuda" else value


ORIGINAL_TO = Tensor.to


def to(*args, **kwargs):
    """`Tensor.to`. C++ would ask the driver for "cuda", and copy what is there already."""
    args = [as_told_to_cpp(value) for value in args]
    kwargs = {name: as_told_to_cpp(value) for name, value in kwargs.items()}
    return ORIGINAL_TO(*args, **kwargs)


ORIGINAL_LOAD = torch.load


def load(file, map_location=CPU, **options):
    """`torch.load`, where C++ would take the GPU's memory."""
    loaded = ORIGINAL_LOAD(file, map_location=CPU, **options)
    return tree_map_only(Tensor, lambda tensor: tensor.to(map_location), loaded)


def each(function, value):
    """Apply the function to each tensor of nested lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([each(function, item) for item in value])
    return value


def compute(operation, args, kwargs):
    """Carry out an operation on the contents, after the checks that a real GPU would make."""
    pretended = []
    plain = []  # tensors of the CPU

    def content_of(tensor):
        if isinstance(tensor, PretendedTensor):
            pretended.append(tensor)
            return tensor.content
        plain.append(tensor)
        return tensor

    contents = each(content_of, args)
    options = {name: each(content_of, value) for name, value in kwargs.items()}
    if pretended and plain:
        refuse_a_mixture(operation, args, plain)

    # The result is on the device that was asked for, or else where the arguments are.
    on_gpu = bool(pretended)
    if options.get("device") is not None:
        device = torch.device(options["device"])
        on_gpu = device.type == "cuda" or device == META
        options["device"] = CPU if on_gpu else device

    generator = options.get("generator")
    if generator is not None and (generator._cdata in GPU_GENERATORS) != on_gpu:
        devices = "'cuda' device type for generator but found 'cpu'"
        if not on_gpu:
            devices = "'cpu' device type for generator but found 'cuda'"
        raise RuntimeError(f"Expected a {devices}")

    # If it works in place, C++ returns the argument itself and drops this result.
    result = operation(*contents, **options)
    return each(PretendedTensor, result) if on_gpu else result


def refuse_a_mixture(operation, args, plain):
    """Raises RuntimeError if a GPU would not combine its tensors with these of the CPU."""
    family = operation.overloadpacket
    if family in COPIES:
        return
    if family in INDEXING and isinstance(args[0], PretendedTensor):
        indices = {id(index) for index in args[1]}  # The GPU moves them to itself.
        plain = [tensor for tensor in plain if id(tensor) not in indices]
    # A single number of the CPU may be a factor or a summand, but the GPU can't change it.
    numbers_alone = all(tensor.dim() == 0 for tensor in plain)
    takes_numbers = torch.Tag.pointwise in operation.tags or family in INDEXING
    changes_the_cpu = operation._schema.is_mutable and not isinstance(args[0], PretendedTensor)
    if plain and (not numbers_alone or not takes_numbers or changes_the_cpu):
        found = f"found at least two devices, cuda:0 and cpu! (in {operation})"
        raise RuntimeError(f"Expected all tensors to be on the same device, but {found}")


REPLACED = {
    flow_grpo: {"DEVICE": "cuda"},
    Tensor: {"to": to},
    torch: {"Generator": PretendedGenerator, "load": load},
    torch.cuda: {
        "is_available": lambda: True,
        "mem_get_info": lambda: (20e9, 24e9),  # free and total
        # C++ calls it as soon as Python names the device, and it would look for a driver.
        "_lazy_init": lambda: None,
        # By this or the next, an optimizer asks whether its step is recorded as a CUDA graph.
        "is_current_stream_capturing": lambda: False,
    },
    torch.accelerator: {"current_stream": lambda: SimpleNamespace(is_capturing=lambda: False)},
}


@contextmanager
def pretended_gpu():
    """Inside, torch has one GPU, a pretended one. In the end, all is as it was."""
    # C++ calls `_lazy_init` only once. A real GPU, if there is one, must not have missed it.
    if torch.cuda.is_available():
        torch.cuda.init()
    lift_only_cpu = torch._C._only_lift_cpu_tensors()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for owner, values in REPLACED.items():
            stack.enter_context(mock.patch.multiple(owner, **values))
        # accelerate remembers here, for the whole process, which device there is.
        stack.enter_context(mock.patch.dict(PartialState._shared_state, clear=True))
        # By default, `as_tensor(numbers, device="cuda")` makes its tensor unseen by the mode.
        stack.callback(torch._C._set_only_lift_cpu_tensors, lift_only_cpu)
        torch._C._set_only_lift_cpu_tensors(True)
        # By default, `module.to("cuda")` makes new parameters if their class changes, as here.
        # On a real GPU they stay the same objects, which were perhaps given to an optimizer before.
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.enter_context(PretendedDevice())
        yield
