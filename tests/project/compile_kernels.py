"""Compiles every Triton kernel without a GPU and checks the code: no register spills, hidden states loaded 128 bits at a time,
and, in kernels that promise bits, no arithmetic that the assembler could still fuse.

Run as a script in a process of its own (as ``test_compile_kernels.py`` does), because it installs a stand-in for the GPU's
driver and makes every launch stop after compilation:

    python tests/project/compile_kernels.py 90 "768,4,12" "384,8,6,float32"  # sm_90; D,M,N of each case, and a dtype but bfloat16

Prints a line for each kernel, and exits with 1 if a kernel spills, loads narrowly, leaves bits to the assembler or uses more
shared memory than some GPUs have.
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
# Only hidden states are loaded with this cache policy, which tells their loads from the others. Prefetches into shared memory
# have no policy; in the kernels that read hidden states, they prefetch hidden states and dv only.
HIDDEN_LOAD = re.compile(r"ld\.global\.L1::evict_first\S*|cp\.async\.c[ag]\.shared\.global [^;]*;")
FULL_WIDTH = re.compile(r"\.v4\.b32$|, 0x10, ")
# Without .rn the assembler may contract a product and a sum, and may choose differently in each variant of a kernel.
FUSIBLE = re.compile(r"\b(?:add|sub|mul)(?:\.ftz)?\.f(?:32|64)\b")
SHARED_BYTES = 99 << 10  # available to a program on every GPU from sm_80 on; sm_86 and sm_89 have the fewest
READERS = {"squeeze_kernel", "fuse_kernel", "fuse_backward_kernel"}
PROMISE_BITS = READERS | {"sum_groups_kernel", "gate_kernel"}


class StandInDriver:
    """The part of a driver that Triton needs to compile."""

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


def launch_all(size, frequencies, num_blocks, dtype, gates):
    """Every launcher, in all variants that differ in what they load: masked and packed, pooled, tokens, backward. ``gates``:
    those that read no hidden states, too, in which M is no more than the length of a loop."""
    from s2sent_kernels import S2SentSelector
    from s2sent_kernels.engines.triton import engine
    from s2sent_kernels.formula.call import Batch, BatchStatistics, Gating, HiddenGradients, PartialSums, Place, Reading

    scale = 4.0 if frequencies in (1, 4) else None  # so that every N is compiled with and without
    options = {"block_prior": True, "gate_scale": scale}
    selector = S2SentSelector(size, num_blocks, BOTTLENECK, frequencies, **options).eval()
    parameters = selector.gate_parameters().each(torch.Tensor.detach)
    tanh, relu = Gating("tanh"), Gating("relu")
    pooled, tokens = Reading(frequencies, pooling="mean"), Reading(frequencies)
    mask = torch.ones(BATCH, TOKENS, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, TOKENS, BATCH * TOKENS], dtype=torch.int32)
    f, p = torch.zeros(BATCH, size), torch.zeros(BATCH, num_blocks, size)
    padded, packed = (BATCH, TOKENS, size), (BATCH * TOKENS, size)
    for shape, where in ((padded, (mask, None)), (packed, (None, cu_seqlens))):
        blocks = [torch.zeros(shape, dtype=dtype) for _ in range(num_blocks)]
        batch, needed = Batch(blocks, *where), [True] * num_blocks
        engine.select_pool(batch, pooled, parameters, tanh)
        engine.select(batch, tokens, parameters, tanh)
        engine.select_pool_in_training(batch, pooled, parameters, tanh)
        engine.fuse_backward(blocks[0], batch)
        engine.squeeze_backward(HiddenGradients(squeezed=f, pooled=p), batch.layout, needed, pooled)
        engine.squeeze_backward(HiddenGradients(squeezed=f, fused=blocks[0], gates=p), batch.layout, needed, tokens)
    sums = PartialSums(torch.zeros(BATCH, num_blocks, size), p)
    engine.squeeze_block(batch._replace(hidden_states=blocks[:1]), Place(1, num_blocks), sums, pooled)
    if not gates:
        return
    engine.gate_pool_backward(f.to(dtype), f, p, parameters, tanh)
    engine.gate_backward(p, f, parameters, relu)
    statistics = BatchStatistics(*(torch.zeros(num_blocks * size) for _ in range(2)))
    engine.gate_in_training(torch.zeros(MANY_SENTENCES, size), None, parameters, relu, dtype)
    engine.gate_in_training_backward(f.to(dtype), f, p, statistics, parameters, tanh)
    many = torch.zeros(MANY_SENTENCES, num_blocks, size)
    engine.gate_in_training_backward(many, many[:, 0], None, statistics, parameters, relu)
    engine.gate(torch.empty(MANY_SENTENCES, size), parameters, num_blocks, tanh)
    groups = torch.empty(MANY_SENTENCES, engine.num_groups(num_blocks), size)
    sums = PartialSums(groups, torch.empty(MANY_SENTENCES, num_blocks, size))
    engine.gate_pool(sums, parameters, frequencies, tanh, dtype)


def resources(kernel, capability):
    """Registers, and bytes of spills. A stack need not be a spill, so for a kernel that has one ptxas is run again with -v."""
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
    compiled, failures, with_gates = [], 0, set()
    compile_instead_of_launching(compiled)
    for case in cases:
        size, frequencies, num_blocks, *dtype = case.split(",")
        num_blocks = int(num_blocks)
        dtype = getattr(torch, dtype[0] if dtype else "bfloat16")
        launch_all(int(size), int(frequencies), num_blocks, dtype, gates=num_blocks not in with_gates)
        with_gates.add(num_blocks)
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
