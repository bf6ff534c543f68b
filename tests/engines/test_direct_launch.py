"""Direct launches use the kernel that Triton would, with Triton's own keys as the reference. No GPU: the driver, the compiler and
the launcher in C are stand-ins; arguments are bound and specialised by Triton."""

import itertools
import threading
from collections import namedtuple
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction

from s2sent_kernels.engines.triton.direct import OPTIONS, direct

Tile = namedtuple("Tile", "rows columns")
Launched = namedtuple("Launched", "programs stream function hooks arguments")


def kernel(p_hidden, p_x, p_mask, p_free, size, rows, free, C: tl.constexpr, TILE: tl.constexpr):
    pass


def optional(p_x, TILE: tl.constexpr):
    pass


class Driver:
    def __init__(self):
        self.current, self.stream = -1, 7  # -1 is torch's index of the CPU
        self.target = GPUTarget("cuda", 90, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.current

    def get_current_stream(self, device):
        return self.stream


class Kernel(JITFunction):
    """Triton's, which "compiles" to numbers and records what reaches the launcher."""

    accepts_addresses = True

    def __init__(self, function=kernel):
        super().__init__(
            function,
            do_not_specialize=["free", "p_free"] if function is kernel else [],
            do_not_specialize_on_alignment=["p_mask", "rows"] if function is kernel else [],
        )
        self.number, self.through_triton, self.records = itertools.count(1), 0, threading.local()

    def run(self, *args, **kwargs):
        self.through_triton += 1
        return super().run(*args, **kwargs)

    def _do_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        compiled = object.__new__(CompiledKernel)
        compiled.module = compiled.src = compiled.packed_metadata = object()
        compiled.name, compiled.function, compiled._run = "kernel", next(self.number), self.launcher
        self.device_caches[device][0][key] = compiled
        return compiled

    def launcher(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        if not self.accepts_addresses and any(type(value) is int and value > 1 << 20 for value in arguments):
            raise TypeError("pointers are tensors")
        self.records.last = Launched((x, y, z), stream, function, (enter, leave), arguments)

    def what_triton_launches(self, arguments):
        self[(3,)](**arguments)
        return self.records.last


@pytest.fixture(autouse=True)
def driver():
    before, active = triton_driver._active, Driver()
    triton_driver.set_active(active)
    yield active
    triton_driver._active = before


def aligned(dtype=torch.float32):
    return torch.zeros(8, dtype=dtype)


def unaligned(dtype=torch.float32):
    return torch.zeros(9, dtype=dtype)[1:]


def plain(**changed):
    hidden = (aligned(torch.float16), aligned(torch.float16))
    arguments = {"p_hidden": hidden, "p_x": aligned(), "p_mask": aligned(), "p_free": aligned()}
    arguments |= {"size": 3, "rows": 3, "free": 3, "C": 5, "TILE": Tile(1, 2), "num_warps": 4}
    return arguments | changed


def cases():
    pointers = [aligned(), aligned(torch.float16), aligned(torch.uint8), unaligned(), unaligned(torch.float16), None]
    integers = [0, 1, 2, 16, 17, 32, -1, -16, True, False, 0.5, (1 << 31) - 1, (1 << 31) - 16, 1 << 31, -(1 << 31)]
    integers += [-(1 << 31) - 16, 1 << 40, (1 << 63) + 16]
    half = aligned(torch.float16)
    values = {
        "p_hidden": [
            (half,),
            (half, half, half),
            (half, unaligned(torch.float16)),
            (half, aligned()),
            (aligned(), half),
        ],
        **dict.fromkeys(("p_x", "p_mask", "p_free"), pointers),
        **dict.fromkeys(("size", "rows", "free"), integers),
        "C": [0, 1, 6, None, "mean", "cls", 1e-6, 1e-5, torch.float32],
        "TILE": [Tile(1, 3), Tile(2, 1), (1, (2, 3)), (1, (2, 4))],
        "num_warps": [1, 8],
        "enable_fp_fusion": [False, True],
        "launch_pdl": [True],
    }
    yield plain()
    for name, of_name in values.items():
        for value in of_name:
            yield plain(**{name: value})
    for (one, a), (other, b) in itertools.combinations({"p_x": None, "size": 16, "rows": 1, "C": 1}.items(), 2):
        yield plain(**{one: a, other: b})


def addresses(value):
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return tuple(map(addresses, value)) if type(value) is tuple else value


def same_call(direct_call, reference):
    assert direct_call._replace(hooks=None, arguments=None) == reference._replace(hooks=None, arguments=None)
    assert addresses(direct_call.arguments) == addresses(reference.arguments)


def made_ready(launch, arguments):
    for _ in range(2):
        launch(3, **arguments)


def test_every_launch_uses_the_kernel_that_triton_would():
    mine = Kernel()
    launch = direct(mine, tuples=("p_hidden",))
    everything = list(cases())
    functions = set()
    for _ in range(3):
        through_triton = mine.through_triton
        for arguments in everything:
            launch(3, **arguments)
            got = mine.records.last
            same_call(got, mine.what_triton_launches(arguments))
            functions.add(got.function)
        through_triton = mine.through_triton - through_triton - len(everything)
    assert len(functions) > 50  # the cases differ for Triton
    assert 10 < through_triton < len(everything) / 2  # the third time: those that no key describes


def test_the_third_launch_of_a_key_is_direct():
    mine = Kernel()
    launch = direct(mine, tuples=("p_hidden",))
    for times in (1, 2, 2, 2):
        launch(3, **plain())
        assert mine.through_triton == times
    launch(4, **plain(free=16))  # not specialised: the same key
    assert mine.through_triton == 2
    assert mine.records.last.programs == (4, 1, 1)
    assert mine.records.last.arguments[6] == 16


@pytest.mark.parametrize("name", ["p_x", "p_hidden"])
def test_unaligned_addresses_after_aligned_ones(name):
    mine = Kernel()
    launch = direct(mine, tuples=("p_hidden",))
    made_ready(launch, plain())
    other = unaligned(torch.float16)
    arguments = plain(p_hidden=(aligned(torch.float16), other)) if name == "p_hidden" else plain(p_x=unaligned())
    launch(3, **arguments)
    assert mine.through_triton == 3
    same_call(mine.records.last, mine.what_triton_launches(arguments))


def test_the_stream_is_the_current_one(driver):
    mine = Kernel()
    launch = direct(mine, tuples=("p_hidden",))
    made_ready(launch, plain())
    driver.stream = 8
    launch(3, **plain())
    assert (mine.through_triton, mine.records.last.stream) == (2, 8)


class Elsewhere(torch.Tensor):
    """A tensor that says that it is on GPU ``device``."""

    is_cuda = True
    device_index = 0

    def get_device(self):
        return self.device_index


def on_device(index):
    tensor = aligned().as_subclass(Elsewhere)
    tensor.device_index = index
    return {"p_x": tensor, "TILE": Tile(1, 2)}


def test_devices_have_kernels_of_their_own(driver, monkeypatch):
    @contextmanager
    def device(index):
        before, driver.current = driver.current, index
        yield
        driver.current = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", driver.get_current_device)
    mine = Kernel(optional)
    launch = direct(mine)
    driver.current = 0
    functions = []
    for index in (0, 1, 0, 1, 0, 1):
        launch(3, **on_device(index))
        functions.append(mine.records.last.function)
        assert driver.current == 0
    assert functions == [1, 2, 1, 2, 1, 2]
    assert mine.through_triton == 4


def test_another_driver_has_kernels_of_its_own():
    mine = Kernel()
    launch = direct(mine, tuples=("p_hidden",))
    made_ready(launch, plain())
    triton_driver.set_active(Driver())
    launch(3, **plain())
    assert mine.through_triton == 3


def hook(*args, **kwargs):
    pass


@pytest.mark.parametrize(
    "disturb",
    [
        lambda patch, _: patch.setattr(knobs.runtime, "launch_enter_hook", SimpleNamespace(calls=[hook])),
        lambda patch, _: patch.setattr(knobs.runtime, "launch_exit_hook", SimpleNamespace(calls=[hook])),
        lambda patch, _: patch.setattr(knobs.runtime.launch_enter_hook, "calls", [hook]),
        lambda patch, _: patch.setattr(knobs.runtime, "launch_enter_hook", hook),
        lambda patch, _: patch.setattr(knobs.runtime, "launch_exit_hook", hook),
        lambda patch, _: patch.setattr(knobs.runtime, "debug", True),
        lambda patch, _: patch.setattr(knobs.compilation, "instrumentation_mode", "consan"),
        lambda patch, _: patch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda: ("key", "hash")),
        lambda patch, _: patch.setattr(torch.compiler, "is_compiling", lambda: True),
        lambda _, mine: mine.add_pre_run_hook(hook),
    ],
)
def test_what_wants_to_see_launches_sees_them(disturb, monkeypatch):
    mine = Kernel()
    launch = direct(mine, tuples=("p_hidden",))
    made_ready(launch, plain())
    with monkeypatch.context() as patch:
        patch.setattr(CompiledKernel, "launch_metadata", lambda *args: None)
        disturb(patch, mine)
        launch(3, **plain())
        assert mine.through_triton == 3
        assert mine.records.last.hooks == (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    mine.pre_run_hooks.clear()
    launch(3, **plain())
    assert mine.through_triton == 3


def test_chains_without_hooks_are_no_hooks():
    assert not any(chain.calls for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook))


class WantsTensors(Kernel):
    accepts_addresses = False


class AnotherTriton(Kernel):
    """Whose compiled kernels are of another class, or whose launchers are called in another way."""

    def __init__(self, change):
        super().__init__()
        self.change, self.compiled = change, None

    def run(self, *args, grid, warmup, **options):
        self.through_triton += 1
        if self.compiled is None:
            self.compiled = self._do_compile(0, {}, -1, {}, options, {}, warmup)
            self.compiled.__class__ = self.change if isinstance(self.change, type) else CompiledKernel
        compiled = self.compiled
        call = [*grid, 1, 1, 7, compiled.function, compiled.packed_metadata, None, None, None, *args]
        compiled.run(*(call if isinstance(self.change, type) else self.change(call)))
        return compiled


@pytest.mark.parametrize(
    "make",
    [
        WantsTensors,
        lambda: AnotherTriton(type("Future", (CompiledKernel,), {})),
        lambda: AnotherTriton(lambda call: [*call[:5], "metadata", *call[6:]]),
        lambda: AnotherTriton(lambda call: [*call[:4], "function", *call[5:]]),
        lambda: AnotherTriton(lambda call: [call[0] * 2, *call[1:]]),
        lambda: AnotherTriton(lambda call: [*call[:9], "more", *call[9:]]),
        lambda: AnotherTriton(lambda call: [*call, "more"]),
        lambda: AnotherTriton(lambda call: [*call[:9], call[10], call[9], *call[11:]]),
    ],
)
def test_another_form_of_launcher_stays_with_triton(make):
    mine = make()
    launch = direct(mine, tuples=("p_hidden",))
    for times in range(1, 5):
        arguments = plain()
        launch(3, **arguments)
        assert mine.through_triton == times
        assert any(value is arguments["p_x"] for value in mine.records.last.arguments)


def test_a_launcher_of_the_expected_form_is_called_directly():
    mine = AnotherTriton(lambda call: call)
    launch = direct(mine, tuples=("p_hidden",))
    made_ready(launch, plain())
    launch(3, **plain())
    assert mine.through_triton == 2


def test_a_launch_that_a_hook_prevents_is_not_remembered(monkeypatch):
    mine = Kernel()
    launch = direct(mine, tuples=("p_hidden",))
    monkeypatch.setattr(mine, "_do_compile", lambda *args: None)
    made_ready(launch, plain())
    launch(3, **plain())
    assert mine.through_triton == 3


def test_threads():
    mine = Kernel()
    launch = direct(mine, tuples=("p_hidden",))
    everything = list(cases())
    start, wrong = threading.Barrier(8), []

    def work(seed):
        start.wait()
        try:
            for turn in range(4):
                for i in range(len(everything)):
                    arguments = everything[(i + seed * turn) % len(everything)]
                    launch(3, **arguments)
                    same_call(mine.records.last, mine.what_triton_launches(arguments))
        except Exception as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_interpreted_kernels_are_called_by_name():
    calls = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda **arguments: calls.append((grid, arguments))

    direct(Interpreted())(3, p_x=None, C=1, num_warps=4, launch_pdl=None)
    assert calls == [((3,), {"p_x": None, "C": 1, "num_warps": 4})]


def test_options_are_those_of_triton(driver):
    from triton.compiler import make_backend

    known = vars(make_backend(driver.target).parse_options({}))
    assert known.keys() >= set(OPTIONS)


def test_annotated_arguments_are_refused():
    def annotated(p_x: "*fp32"):  # noqa: F722
        pass

    with pytest.raises(ValueError, match="p_x: expected no annotation but constexpr"):
        direct(JITFunction(annotated))


def test_arguments_are_checked():
    launch = direct(Kernel(), tuples=("p_hidden",))
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_stages'"):
        launch(3, **plain(), num_stages=2)
    with pytest.raises(TypeError, match="missing"):
        launch(3, p_x=None)
