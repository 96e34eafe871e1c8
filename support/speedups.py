"""What model.py does, faster or in less memory, in plain PyTorch: nothing here is needed to understand it.

Each function names what it equals: checkpointed(f, *x) is f(*x), project(x, W) is F.linear(x, W), window_attention and
cached_attention are model.naive_softmax_attention, linear_cross_entropy is LM.naive_loss, fast_step(step) is step. The
tests hold each against it.
"""
import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from support import kernels

PRODUCTS_ADD = torch.__version__ >= (2, 9)  # torch.addmm has out_dtype
BF16_UNITS = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # a CPU with AMX has AVX512-BF16 too
MKL = torch.backends.mkl.is_available()  # asked once: the question breaks a graph of torch.compile


# ----------------------------------------------------------------------------------------------------------------------
# Mixers


def checkpointed(attend, q, k, v, *others):
    """attend(q, k, v, *others), with what it computes on the way recomputed for the backward pass.

    The kernels do so themselves, and so does a compiler.
    """
    recomputed_anyway = torch.compiler.is_compiling() or kernels.available(q, v)
    if recomputed_anyway or not torch.is_grad_enabled():
        return attend(q, k, v, *others)
    if q.is_cpu:
        q, k, v = (x.contiguous() for x in (q, k, v))                 # once, not before each product
    return checkpoint(attend, q, k, v, *others, use_reentrant=False, preserve_rng_state=False)


def multiplies_bf16(x):
    """Whether x is bf16, on a CPU that multiplies it several times faster than fp32."""
    return x.is_cpu and x.dtype == torch.bfloat16 and BF16_UNITS


class EluPlusOne(torch.autograd.Function):
    """model.elu in 16 bits. The gradient of clamp alone takes torch longer than this."""

    @staticmethod
    def forward(ctx, x):
        y = x.clamp(max=0).exp_().add_(F.relu(x))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, = ctx.saved_tensors
        return y.clamp(max=1) * grad                                  # the slope is exp(x) = y below 0, and 1 above


class Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin), None, None


def turned(x, cos, sin):
    other_half = x.roll(x.shape[-1] // 2, -1)
    return (x * cos).addcmul_(other_half, sin)


def rotate(x, cos, sin):
    """model.rotate with tables of x's dtype: in bf16, a third of the time of rotating in fp32."""
    cos = torch.cat([cos, cos], dim=-1).to(x.dtype)
    sin = torch.cat([-sin, sin], dim=-1).to(x.dtype)
    return Rotation.apply(x, cos, sin)


def project(x, W):
    """x W^T. For few rows it is bound by reading W.

    MKL reads it with one core. A batched product with 16 pieces of W is read by all. Not with x as columns, W x^T: that
    reads a third as fast (one row, one core: 23 ms for base's output projection, and 9.5 as here or by F.linear).
    """
    rows = x.shape[:-1].numel()
    pieces = 16
    few_rows_of_much = 0 < rows <= 8 and W.numel() >= 2**18 and len(W) % pieces == 0
    by_mkl = W.is_cpu and W.dtype == torch.float32 and MKL
    if not (few_rows_of_much and by_mkl) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, W)
    x_each = x.reshape(rows, -1).expand(pieces, -1, -1)               # (16,rows,in)
    y = torch.bmm(x_each, W.unflatten(0, (pieces, -1)).mT)            # (16,rows,out/16)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


class CausalConv(torch.autograd.Function):
    """sum_i weight_i x_{t-i}, as a few passes in place: torch's own convolution takes twice the time in bf16."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        first, *shifted = shifts(x, len(weight))
        y = first * weight[0]
        for part, w in zip(shifted, weight[1:]):
            y.addcmul_(part, w)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = torch.zeros_like(x)
        for part, w in zip(shifts(grad_x, len(weight)), weight):
            part.addcmul_(grad, w)
        grad_weight = [(grad * part).sum((0, 1)) for part in shifts(x, len(weight))]
        return grad_x, torch.stack(grad_weight)


def shifts(x, size):
    """Views of x (B,size-1+T,channels), each (B,T,channels): the inputs of now, of one token before, and so on."""
    T = x.shape[1] - size + 1
    return [x[:, start:start + T] for start in reversed(range(size))]


def causal_conv(x, weight):
    """sum_i weight_i x_{t-i}, depthwise: x (B,past+T,channels) and weight (past+1,channels) -> (B,T,channels)."""
    return CausalConv.apply(x, weight.to(x.dtype))


def window_attention(q, k, v, w):
    """Softmax attention over the last w tokens, O(T w). q (B,H,T,d) are the last T tokens of k and v (B,H,past+T,d)."""
    T, d = q.shape[2:]
    on_gpu = q.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 0)
    fits = q.dtype in (torch.bfloat16, torch.float16) and d <= 256
    if on_gpu and fits and T == k.shape[2]:
        return flash_window(q, k, v, w)
    return window_in_blocks(q, k, v, w)


def flash_window(q, k, v, w):
    """FlashAttention with a window, as torch has it built in.

    Forward and backward of 65,536 tokens on an H100, 4 heads of 128, w = 256: 1.23 ms at T = 1024 and 1.28 at 8192. In
    blocks 5.0 and 4.9, compiled 3.4 and 3.4; FlexAttention, which runs compiled only, 1.35 and 1.24; varlen_attn, which
    is public, 1.77 and 1.76.
    """
    T = q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                  # (B,T,H,d), as the projection left them
    y, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, T, T, 0.0, True, False, window_size_left=w - 1, window_size_right=0)
    return y.transpose(1, 2)


def window_in_blocks(q, k, v, w):
    """Blocks of n queries, each beside its own n keys and the w before. Keys before the first are zeros, masked."""
    B, H, T, d = q.shape
    past = k.shape[2] - T
    n = min(w, T)
    k, v = (with_neighbours(F.pad(x, (0, 0, w - past, -T % n)), w, n) for x in (k, v))  # (B,H,N,w+n,d)
    q = F.pad(q, (0, 0, 0, -T % n)).unflatten(2, (-1, n))             # (B,H,N,n,d)
    key = torch.arange(w + n, device=q.device)
    age = torch.arange(n, device=q.device)[:, None] + w - key         # (n,w+n), 0 is the token itself
    block_start = torch.arange(0, T, n, device=q.device)[:, None, None]
    exists = block_start + key >= w - past                            # (N,1,w+n)
    seen = (0 <= age) & (age < w) & exists
    if q.is_cpu:                                                      # in half the time of torch's, with a mask
        scores = d ** -0.5 * q @ k.mT + seen.to(q.dtype).log()        # log(0) = -inf
        y = scores.softmax(-1) @ v
    else:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).unflatten(0, (B, H))
    return y.flatten(2, 3)[:, :, :T]


def with_neighbours(x, w, n):
    """Every n tokens of x (B,H,w+N n,d) behind the w before them: (B,H,N,w+n,d)."""
    if x.is_cpu and n == w:                                           # the gradient of unfold is slow there
        blocks = x.unflatten(2, (-1, n))
        return torch.cat([blocks[:, :, :-1], blocks[:, :, 1:]], dim=3)
    return x.unfold(2, w + n, n).mT


def cached_attention(q, k, v):
    """Causal softmax attention of q (B,H,T,d), the last T tokens, over all of k and v (B,H,past+T,d)."""
    T, tokens = q.shape[2], k.shape[2]
    mask = None
    if T > 1:
        mask = torch.ones(T, tokens, dtype=torch.bool, device=q.device).tril(tokens - T)
    # On a GPU cuDNN would plan each new length for 60 ms; on a CPU the choice itself costs a sixth of a small step.
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends) if q.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# ----------------------------------------------------------------------------------------------------------------------
# The loss


class SoftmaxLoss(nn.Module):
    """Summed cross-entropy of logits (rows,vocab_size or more), and its gradient in their dtype. Targets below 0 do not
    count, columns from vocab_size on are no tokens. A module, so that it can be compiled as the blocks are."""

    def forward(self, logits, targets, vocab_size, with_grad):
        dtype = logits.dtype
        counted = (targets >= 0)[:, None]
        targets = targets.clamp(min=0)[:, None]
        logits = logits.to(torch.promote_types(dtype, torch.float32))
        logits[:, vocab_size:] = -math.inf
        log_z = logits.logsumexp(-1, keepdim=True)
        losses = (log_z - logits.gather(1, targets)) * counted
        if not with_grad:
            return losses.sum(), None
        p = (logits - log_z).exp_().mul_(counted).to(dtype)
        p_minus_one = torch.expm1(-losses).to(dtype)                  # at the target, rounded once
        return losses.sum(), p.scatter_(1, targets, p_minus_one)


def in_cache(softmax_loss, logits, targets, vocab_size, with_grad):
    """softmax_loss, by blocks of rows that a CPU's cache holds during its passes: in two thirds of the time."""
    rows = max(1, 2 ** 20 // logits.shape[1])
    blocks = zip(logits.split(rows), targets.split(rows))
    losses, grads = zip(*(softmax_loss(*block, vocab_size, with_grad) for block in blocks))
    return sum(losses), torch.cat(grads) if with_grad else None


class LinearCrossEntropy(torch.autograd.Function):
    """The gradient of each chunk is taken while its logits are there, so backward needs no second product with W."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softmax_loss, chunk, with_grad):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w = weight.to(dtype)
        count = (targets >= 0).sum().clamp(min=1)
        loss = 0.0
        if with_grad:
            grad_x = torch.empty_like(x)
            grad_w = torch.zeros_like(weight)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            part = x[rows].to(dtype)
            logits = part @ w.T
            if kernels.runs_on(logits):
                softmax_loss = kernels.softmax_loss
            if logits.is_cpu:
                part_loss, grad = in_cache(softmax_loss, logits, targets[rows], vocab_size, with_grad)
            else:
                part_loss, grad = softmax_loss(logits, targets[rows], vocab_size, with_grad)
            loss = loss + part_loss
            if with_grad:                                             # grad (chunk,vocab)
                grad_x[rows] = grad @ w
                add_product(grad_w, grad.T, part)
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w, count = ctx.saved_tensors
        return grad_x * (grad / count), grad_w * (grad / count), None, None, None, None, None


def add_product(total, a, b):
    """total += a @ b. On a GPU the product itself adds, in total's dtype: it is not rounded to bf16, nor written."""
    if total.is_cuda and a.dtype != total.dtype and PRODUCTS_ADD:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


def linear_cross_entropy(x, weight, targets, vocab_size, softmax_loss, chunk=None):
    """Mean cross-entropy of softmax(x W^T), its logits never all in memory: O(chunk vocab) instead of O(T vocab).

    Args: x (rows,D); weight (vocab_size or more,D), rows from vocab_size on are padding; targets (rows,), of which
      those below 0 do not count; softmax_loss, a SoftmaxLoss; chunk, rows at once,
      by default the fewest chunks of 1 GB of bf16 at most on a GPU, of 128 MB of fp32.
    """
    if chunk is None:
        most = max(1, (2 ** 29 if x.is_cuda else 2 ** 25) // len(weight))
        chunks = -(-len(x) // most)
        chunk = -(-len(x) // chunks)
    return LinearCrossEntropy.apply(x, weight, targets, vocab_size, softmax_loss, chunk, torch.is_grad_enabled())


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


# Options of torch.compile for decoding, where a step is many short kernels.
DECODING = {
    "coordinate_descent_tuning": True,  # matrix times vector in generated code, at the speed of the memory
    "realize_opcount_threshold": 5,     # what all layers use, such as the angles of rope, is computed once
    "combo_kernels": True,              # independent kernels share a launch
}


def fast_step(step, generator=None, compiled=False):
    """step(idx, state) -> (tokens, state), compiled if asked to, and on a GPU recorded as a CUDA graph.

    Steps are so from the first of one token on that leaves the shapes of its state alone. generator is what step draws
    random numbers from.
    """
    fast = None

    def run(idx, state):
        nonlocal fast
        if fast is not None:
            return fast(idx, state)
        tokens, after = step(idx, state)
        if idx.shape[1] == 1 and recordable(idx, state, after):
            if idx.is_cuda:
                fast = cuda_graph(step, idx, after, generator, compiled)
            elif compiled:
                fast = torch.compile(step, dynamic=False)
        return tokens, after
    return run


def recordable(idx, state, after):
    """Whether a graph may repeat a step from state to after: all of it tensors on the device, of the same shapes.

    A graph freezes what is no tensor: a state that holds a number would be decoded wrongly, without a word.
    """
    old, new = tree_leaves(state), tree_leaves(after)
    tensors = [x for x in new if x is not None]
    if not all(torch.is_tensor(x) and x.device == idx.device for x in tensors):
        return False
    return [getattr(x, "shape", None) for x in old] == [getattr(x, "shape", None) for x in new]


overwriting = False


@contextlib.contextmanager
def overwriting_states():
    """Inside, mixers that read their state once may update it in place: nobody else holds it."""
    global overwriting
    before = overwriting
    overwriting = True
    try:
        yield
    finally:
        overwriting = before


def cuda_graph(step, idx, state, generator=None, compiled=False):
    """step(idx, state) -> (tokens, state) as one CUDA graph: a step is many kernels, shorter than their launches.

    The state stays in one place and is updated there, so its shapes must not change from step to step.
    """
    given = state
    idx, state = tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, (idx, state))
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    autocast = torch.autocast("cuda", dtype, enabled, cache_enabled=False)

    def write(new_state):
        for old, new in zip(tree_leaves(state), tree_leaves(new_state)):
            if torch.is_tensor(old) and new is not old:
                old.copy_(new)

    def advance():
        tokens, after = step(idx, state)
        write(after)
        return tokens
    if compiled:
        advance = torch.compile(advance, dynamic=False, options=DECODING)
    with autocast, overwriting_states():
        graph, tokens = captured(advance, generator=generator)
    write(given)                                                      # back to before the warm-up

    def replay(new_idx, _):
        idx.copy_(new_idx)
        graph.replay()
        return tokens.clone(), state
    return replay


def captured(call, warm_up=None, pool=None, generator=None):
    """(A CUDA graph of call(), and what that call returned), after warm_up() has set up what is set up lazily.

    Replays draw from generator the numbers that call() would have drawn.
    """
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    if generator is not None:
        before = generator.get_state()
        graph.register_generator_state(generator)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        (warm_up or call)()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool):
        result = call()
    if generator is not None:
        generator.set_state(before)
    return graph, result
