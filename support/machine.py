"""The machine that the programs run on: its device, precision, compiler and memory; the processes of torchrun.

Nothing here needs to be known to follow training: the programs ask for a device and a precision, and get the best there
is, or one line that says what is missing.
"""
import atexit
import contextlib
import ctypes
import dataclasses
import datetime
import math
import os
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager

import torch
import torch.distributed as dist
from tqdm import tqdm

from configurator import UserError, command, first_line, printable


def from_torchrun(key, default):
    """A number that torchrun sets, like WORLD_SIZE. The default where not all that it sets is there, as when one is
    left over in a shell."""
    numbers = [os.environ.get(each, "") for each in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")]
    if not os.environ.get("MASTER_ADDR") or not all(re.fullmatch("[0-9]{1,9}", number) for number in numbers):
        return default
    return int(os.environ[key])


WORLD = max(1, from_torchrun("WORLD_SIZE", 1))
RANK = from_torchrun("RANK", 0) if WORLD > 1 else 0


class Diverged(UserError):
    """A run cannot continue: its loss or its gradient is not finite."""

    code = 3


def pick_device(name):
    """torch.device for "auto", "cpu", "cuda", "cuda:1" or "mps"; of several processes each takes a GPU of its own."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"device must be auto, cpu, cuda, cuda:1 (any number) or mps, got {name!r}: try --device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cpu":
        keep_freed_memory()
    if WORLD > 1 and name.startswith("cuda:"):
        raise UserError(f"device={name} would put all processes on one GPU: leave it out, or use --device=cuda")
    if WORLD > 1 and name == "cuda":
        local, here = (int(os.environ[key]) for key in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        if here > torch.cuda.device_count():
            raise UserError(f"{here} processes need a GPU each, and there are {torch.cuda.device_count()}: "
                            "start fewer with --nproc_per_node, or use --device=cpu")
        name = f"cuda:{local}"
        torch.cuda.set_device(local)
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} is not available here ({first_line(error)}): "
                        "try --device=cpu") from None


def keep_freed_memory():
    """Has glibc reuse large blocks. By default it returns each to the kernel, which maps and zeroes it anew for the
    next tensor: base trained at 441 tokens/s on two cores with that, and at 653 without."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):                                  # not glibc: macOS, Windows, musl
        return
    mallopt(-4, 0), mallopt(-1, -1)                                               # M_MMAP_MAX, M_TRIM_THRESHOLD


def bf16_speedup(device):
    """How many times faster a bf16 matrix product is than an fp32 one. On a CPU without bf16 units: far below 1."""
    matrices = [torch.randn(768, 768, device=device).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    best = [math.inf, math.inf]
    for _ in range(10):                                                           # the best, if others use the machine
        for i, matrix in enumerate(matrices):
            start = time.perf_counter()
            (matrix @ matrix).sum().item()
            best[i] = min(best[i], time.perf_counter() - start)
        if best[1] > 0.5:                                                         # a CPU that emulates bf16
            break
    return best[0] / best[1]


def pick_precision(precision, device):
    """"fp32" or "bf16". A CPU is probed: bf16 is several times faster with AMX or AVX512-BF16, and a trap without."""
    if device.type == "cuda":
        return precision if precision != "auto" else "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp32" or (precision == "auto" and device.type != "cpu"):
        return "fp32"
    speedup = bf16_speedup(device)
    if precision == "bf16" and speedup < 1:
        say(f"warning: bf16 matrix products run at {speedup:.2g} times the speed of fp32 here; "
            "--precision=fp32 is faster")
    return "bf16" if precision == "bf16" or speedup > 1.1 else "fp32"


def use_tf32(device, precision):
    """For the products that autocast leaves in fp32: bf16 values are exact in TF32, which is faster."""
    if device.type == "cuda" and precision == "bf16":
        torch.set_float32_matmul_precision("high")


def autocast(device, precision):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def allow_recompiles(limit):
    """torch.compile specialises a function so often, instead of 8 times, before it falls back to eager."""
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    setattr(config, name, limit)


def compile_blocks(model, wanted, device):
    """Compiles each block (one compilation serves equal ones) and the loss, in place, or says in one line why not."""
    if wanted is False or wanted == "auto" and device.type != "cuda":
        return
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # no C compiler, no Triton, an unsupported Python: all different, all harmless
        say(f"not compiled, which is slower but the same: {first_line(error)}")
        return
    for block in model.blocks:
        block.compile(dynamic=False)
    model.softmax_loss.compile(dynamic=False)


def peak_memory(device):
    """Bytes: the most that tensors took on a GPU, the most that this process took on a CPU (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_of(device):
    """Bytes that the device has; infinity where unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):                                 # Windows
        return float("inf")


def check_memory(make, model_config, config, device):
    """MemoryError, at once, for a model or a batch that cannot fit: what is asked for here is the least they take.

    Args: make, a function from a model_config to a model; config, that of train.py.
    """
    pattern = min(model_config.depth, len(model_config.mixers))
    with torch.device("meta"):                                                    # no memory is taken
        model = make(dataclasses.replace(model_config, depth=pattern))
    in_blocks = sum(p.numel() for p in model.blocks.parameters())
    outside = sum(p.numel() for p in model.parameters()) - in_blocks
    parameters = outside + in_blocks * model_config.depth // pattern
    numbers_each = 3                                                              # the weight, its gradient, a moment
    if config.shard:
        parameters //= WORLD
    least = {"the model": 4 * numbers_each * parameters,
             "a piece of a batch": 4 * config.piece * model_config.seq_len * model_config.dim}
    for what, size in least.items():
        if size > memory_of(device):
            raise MemoryError(f"{what} takes {size / 1e9:,.0f} GB or more")


FULL = ("out of memory", "DefaultCPUAllocator")
# Of a size that no integer of C++ holds.
BEYOND = ("calculation overflowed", "argument 'size' failed to unpack", "Overflow when unpacking long",
          "too large to convert to C")


@contextmanager
def out_of_memory(fix):
    """Turns any of the errors for want of memory into one line that says what helps."""
    try:
        yield
    except (MemoryError, RuntimeError, OverflowError, TypeError) as error:        # numpy's; CUDA's, MPS's, the CPU's
        reason = first_line(error)[:200]
        if any(words in str(error) for words in BEYOND):
            reason = "a size is more than any machine has"
        elif not isinstance(error, MemoryError) and not any(words in str(error) for words in FULL):
            raise
        raise UserError(f"out of memory ({reason}): {fix}") from None


def say(line):
    """A line on stderr, of the first process."""
    if RANK == 0:
        tqdm.write(printable(line), file=sys.stderr)


def progress(*args, **options):
    """A progress bar, of one process and on a terminal only."""
    return tqdm(*args, disable=True if RANK else None, **options)


def device_name(device):
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, torch {torch.__version__}"


# ----------------------------------------------------------------------------------------------------------------------
# Clocks and signals


def seconds(call, device):
    """Wall time of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(calls, device, repeats):
    """Times of each call, `repeats` runs after a warm-up, alternating, so that a drifting machine favours none."""
    for call in calls:
        call(), call()
    times = [[seconds(call, device) for call in calls] for _ in range(repeats)]
    return [list(column) for column in zip(*times)]


def stop_at_signals():
    """A list, empty until Ctrl-C or SIGTERM. A second Ctrl-C leaves at once, with the last checkpoint whole."""
    received = []

    def handler(number, frame):
        received.append(number)
        if WORLD == 1:                                                            # torchrun may pass one on twice
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if RANK == 0:
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping at the end of this step\n")              # print is not safe inside a handler
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return received


# ----------------------------------------------------------------------------------------------------------------------
# The processes that torchrun starts, each of which runs the program on its share of every batch


@contextmanager
def processes():
    """Joins the processes of the run. The first of them that fails says why; the others then end without a word."""
    if WORLD == 1:
        yield
        return
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    by_hand = "TORCHELASTIC_RUN_ID" not in os.environ
    if RANK >= WORLD:
        raise UserError(f"RANK={RANK} must be below WORLD_SIZE={WORLD}: start the processes with torchrun, or unset "
                        "WORLD_SIZE for one process alone")
    if by_hand:
        print(f"process {RANK}: waiting for {WORLD} processes at {where}, as WORLD_SIZE says; for one process alone: "
              "unset WORLD_SIZE", file=sys.stderr, flush=True)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=2 if by_hand else 30)))
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise UserError(f"the {WORLD} processes did not connect at {where} ({first_line(error)[:100]}): start "
                        "them with torchrun, or unset WORLD_SIZE for one process alone") from None
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # old ones left keys
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if store.add("failed", 1) > 1:
            os._exit(1)
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError(f"another process of this run has died ({first_line(error)[:100]}): "
                            "the same command resumes from the last checkpoint") from None
        raise
    dist.destroy_process_group()


def run_and_leave(main):
    """command(main) for one of several processes, without Python's own end.

    A thread of gloo lets go of the tensors of a finished collective a moment after the caller goes on. They are
    Python's too; a thread that asks a Python that is ending for anything is ended, and C++ answers that with abort().
    destroy_process_group does not wait for these threads (torch 2.13).
    """
    try:
        command(main)
        code = 0
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()                                                       # W&B ends its run there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def reduce(value, op=dist.ReduceOp.SUM):
    """The sum (or other op) of a number over all processes."""
    if WORLD == 1:
        return value
    value = torch.as_tensor(value)
    dist.all_reduce(value, op)
    return value.item()


def mean(value):
    """The mean of a tensor over all processes, on its device: nothing waits for it here."""
    if WORLD > 1:
        dist.all_reduce(value)
    return value / WORLD


def shard(model, device):
    """Splits weights and gradients of the model over the processes (FSDP2). Returns their mesh."""
    from torch.distributed.fsdp import fully_shard                                # here: it takes 0.8 s to import
    mesh = dist.init_device_mesh(device.type, (WORLD,))
    try:
        probe = torch.nn.Linear(WORLD, WORLD, device=device)
        fully_shard(probe, mesh=mesh)
        probe(torch.ones(1, WORLD, device=device)).sum().backward()
    except Exception as error:  # of torch 2.6 on a CPU: FSDP2 is young
        raise UserError(f"shard does not work with torch {torch.__version__} on {device.type} ({first_line(error)}): "
                        "install a newer torch, or leave --shard out") from None
    for module in (*model.blocks, model):                                         # a block is whole only while in use
        fully_shard(module, mesh=mesh)
    return mesh


def gather(value):
    """The values that the processes have, in the order of their ranks."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def whole(value):
    """value with its tensors put together from the shards of all processes, in the first of them."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if hasattr(value, "full_tensor"):
        value = value.full_tensor()                                               # all processes take part
        return value.cpu() if RANK == 0 else None
    return value
