"""Compiles every Triton kernel without a GPU and checks the code: no spills, hidden states loaded 128 bits at a time, and in the
kernels that promise bits no arithmetic that the assembler may still fuse.

Run as a script in a process of its own (``test_compile_kernels.py`` does), because it puts a stand-in for the GPU's driver
in place and makes every launch stop after compilation:

    python tests/project/compile_kernels.py 90 "768,4,12" "384,8,6"          # sm_90; D,M,N of each case

Prints a line for each kernel and exits with 1 where one of them spills, loads narrowly, leaves bits to the assembler or takes
more shared memory than some GPUs have.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BATCH, TOKENS, BOTTLENECK = 2, 64, 64
MANY_SENTENCES = 300  # the gate's tile depends on how many sentences there are
# Hidden states, and nothing else, are loaded with this cache policy: it tells their loads from the others. What a loop copies
# ahead into shared memory has no policy; in the kernels that read hidden states it is those, and dv.
HIDDEN_LOAD = re.compile(r"ld\.global\.L1::evict_first\S*|cp\.async\.c[ag]\.shared\.global [^;]*;")
FULL_WIDTH = re.compile(r"\.v4\.b32$|, 0x10, ")
# Without .rn the assembler may contract a product and a sum, in each variant of a kernel another one.
FUSIBLE = re.compile(r"\b(?:add|sub|mul)(?:\.ftz)?\.f(?:32|64)\b")
SHARED_BYTES = 99 << 10  # available to a program on every GPU from sm_80 on; sm_86 and sm_89 have the fewest
READERS = {"squeeze_kernel", "fuse_kernel", "fuse_backward_kernel"}
PROMISE_BITS = READERS | {"sum_groups_kernel", "gate_kernel"}


class StandInDriver:
    """The part of a driver's interface that Triton calls before it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_capability(self, device=None):
        return divmod(self.target.arch, 10)


def compile_instead_of_launching(compiled):
    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            compiled.append((self.fn.__name__, self.run(*args, grid=grid, warmup=True, **kwargs)))

        return launch

    JITFunction.__getitem__ = __getitem__


def launch_all(size, frequencies, num_blocks, dtype):
    """Every launcher, over all variants that differ in what they load: masked and packed, pooled, tokens, backward."""
    from s2sent_kernels import S2SentSelector, kernels

    selector = S2SentSelector(size, num_blocks, BOTTLENECK, frequencies, block_prior=True)
    parameters = selector._parameters_of_gate().each(torch.Tensor.detach)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, TOKENS, BATCH * TOKENS], dtype=torch.int32)
    f, g = torch.zeros(BATCH, size), torch.zeros(BATCH, num_blocks, size)
    padded, packed = (BATCH, TOKENS, size), (BATCH * TOKENS, size)
    for shape, batch in ((padded, (mask, None)), (packed, (None, cu_seqlens))):
        blocks = [torch.zeros(shape, dtype=dtype) for _ in range(num_blocks)]
        kernels.select_pool(blocks, *batch, parameters, frequencies, "mean", "tanh", 1e-6)
        kernels.select(blocks, *batch, parameters, frequencies, "tanh", 1e-6)
        kernels.fuse_backward(blocks[0], blocks, *batch)
        rest = (shape, dtype, torch.device("cpu"), [True] * num_blocks, *batch, frequencies, "paper")
        kernels.squeeze_backward(f, g, None, None, *rest, "mean")
        kernels.squeeze_backward(f, None, blocks[0], g, *rest, None)
    kernels.gate_pool_backward(f.to(dtype), f, g, parameters, "tanh", 1e-6)
    kernels.gate_backward(g, f, parameters, "relu", 1e-6)
    kernels.gate(torch.empty(MANY_SENTENCES, size), parameters, num_blocks, "tanh", 1e-6)
    groups = torch.empty(MANY_SENTENCES, kernels.num_groups(num_blocks), size)
    pooled = torch.empty(MANY_SENTENCES, num_blocks, size)
    kernels.gate_pool(groups, pooled, parameters, frequencies, "tanh", 1e-6, dtype)
    groups = torch.zeros(BATCH, num_blocks, size)
    kernels.squeeze_block(blocks[0], 1, num_blocks, groups, g, *batch, frequencies, "paper", "mean")


def resources(kernel, capability):
    """Registers, and bytes of spills. A stack frame may hold other things than spills, so ptxas runs again where there is one."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = (
            int(n) for n in re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text).groups()
        )
        if not stack + local:
            return registers, 0
        ptx.write_text(kernel.asm["ptx"])
        nvidia = triton.knobs.nvidia
        ptxas = nvidia.ptxas if capability < 100 else nvidia.ptxas_blackwell
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [ptxas.path, "-v", "-arch", architecture, str(ptx), "-o", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", text))


def main(capability, cases):
    capability = int(capability)
    driver.set_active(StandInDriver(capability))
    compiled, failures = [], 0
    compile_instead_of_launching(compiled)
    for case in cases:
        size, frequencies, num_blocks = (int(number) for number in case.split(","))
        launch_all(size, frequencies, num_blocks, torch.bfloat16)
        for name, kernel in {id(kernel): (name, kernel) for name, kernel in compiled}.values():
            registers, spilled = resources(kernel, capability)
            loads = HIDDEN_LOAD.findall(kernel.asm["ptx"]) if name in READERS else []
            narrow = [load for load in loads if not FULL_WIDTH.search(load)]
            fusible = FUSIBLE.findall(kernel.asm["ptx"]) if name in PROMISE_BITS else []
            bad = (
                spilled or narrow or fusible or kernel.metadata.shared > SHARED_BYTES or (name in READERS and not loads)
            )
            failures += bool(bad)
            print(
                f"{'FAILED' if bad else 'ok'} sm_{capability} D,M,N={case} {name}: {registers} registers, "
                f"{spilled} bytes of spills, {kernel.metadata.shared} of shared memory, "
                f"{len(loads) - len(narrow)} wide and {len(narrow)} narrow loads, "
                f"{len(fusible)} fusible operations",
                flush=True,
            )
        compiled.clear()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
