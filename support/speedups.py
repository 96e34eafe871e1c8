"""The same numbers in plain PyTorch, faster or in less memory: the loss without all of its logits, a window in blocks,
what is recomputed for backward, products of few rows, decoding as one CUDA graph.

Each function here gives what a plainer one would; the tests say so.
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from support.kernels import linear_attention_triton

MKL = torch.backends.mkl.is_available()                                           # not asked where torch.compile looks


# ----------------------------------------------------------------------------------------------------------------------
# Attention


def checkpointed(attend):
    """attend(mixer, form, *tensors) with activation checkpointing: its results on the way are remade for backward.

    They are cheap, and large to store. The kernels do so themselves, and so does a compiler.
    """
    @functools.wraps(attend)
    def run(mixer, form, *tensors):
        if form is linear_attention_triton or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return attend(mixer, form, *tensors)
        return checkpoint(attend, mixer, form, *tensors, use_reentrant=False, preserve_rng_state=False)
    return run


def window_attention(q, k, v, w, past):
    """Blocks of n queries, each beside the w keys before it and its own n keys. Missing keys are zeros, masked."""
    T, n = q.shape[2], min(w, q.shape[2])
    k, v = (F.pad(part, (0, 0, w - past, -T % n)).unfold(2, w + n, n).mT for part in (k, v))     # (B,H,N,w+n,d)
    q = F.pad(q, (0, 0, 0, -T % n)).unflatten(2, (-1, n))                         # (B,H,N,n,d)
    key = torch.arange(w + n, device=q.device)
    age = torch.arange(n, device=q.device)[:, None] + w - key                     # (n,w+n), 0 is the token itself
    first = torch.arange(0, T, n, device=q.device)[:, None, None]                 # (N,1,1)
    mask = (0 <= age) & (age < w) & (first + key >= w - past)                     # (N,n,w+n)
    y = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask)
    return y.unflatten(0, v.shape[:2]).flatten(2, 3)[:, :, :T]


# ----------------------------------------------------------------------------------------------------------------------
# The loss


def softmax_loss(logits, targets, vocab_size, with_grad):
    """Summed cross-entropy of logits (rows,vocab or more), and its gradient in their dtype; -1 doesn't count."""
    dtype, counted = logits.dtype, (targets >= 0)[:, None]
    targets = targets.clamp(min=0)[:, None]
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    logits[:, vocab_size:] = -math.inf                                            # padding is no token
    log_z = logits.logsumexp(-1, keepdim=True)
    losses = (log_z - logits.gather(1, targets)) * counted
    if not with_grad:
        return losses.sum(), None
    p = (logits - log_z).exp_().mul_(counted).to(dtype)
    return losses.sum(), p.scatter_(1, targets, torch.expm1(-losses).to(dtype))  # p - 1 at the target, rounded once


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of each chunk is taken while its logits are there, so backward costs no second product with W."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softmax_loss, chunk, with_grad):
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        w, count, loss = weight.to(dtype), (targets >= 0).sum().clamp(min=1), 0.0
        if with_grad:
            grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight)
        for start in range(0, len(x), chunk):
            part = x[start:start + chunk].to(dtype)
            part_loss, grad = softmax_loss(part @ w.T, targets[start:start + chunk], vocab_size, with_grad)
            loss = loss + part_loss
            if with_grad:                                                         # grad (chunk,vocab)
                grad_x[start:start + chunk] = grad @ w
                grad_w += grad.T @ part
        if with_grad:
            ctx.save_for_backward(grad_x, grad_w, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_w, count = ctx.saved_tensors
        return grad_x * (grad / count), grad_w * (grad / count), None, None, None, None, None


def linear_cross_entropy(x, weight, targets, vocab_size, softmax_loss=softmax_loss, chunk=None):
    """Mean cross-entropy of softmax(x W^T), its logits never all in memory: O(chunk vocab) instead of O(T vocab).

    Args: x (rows,dim); weight (vocab_size or more,dim), rows past the vocabulary are padding; targets (rows,), of which
      -1 is not counted; softmax_loss, or a compiled one; chunk, rows at once: 512 MB of bf16 on a GPU, 128 of fp32.
    """
    chunk = chunk or max(1, (2 ** 28 if x.is_cuda else 2 ** 25) // len(weight))
    return _LinearCrossEntropy.apply(x, weight, targets, vocab_size, softmax_loss, chunk, torch.is_grad_enabled())


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


class Projection(torch.nn.Linear):
    """x W^T, without a bias.

    For few tokens it is bound by reading W. MKL has a path of its own for them, which reads with one core and not at
    its full speed; as a batched product of 16 pieces of W, base's output projection of one token takes 2.5 ms instead
    of 6.8 on two cores.
    """

    def __init__(self, width_in, width_out):
        super().__init__(width_in, width_out, bias=False)

    def forward(self, x):
        rows, pieces, W = x.shape[:-1].numel(), 16, self.weight
        few_read_much = 0 < rows <= 8 and W.numel() >= 2**18 and len(W) % pieces == 0
        by_mkl = W.is_cpu and W.dtype == torch.float32 and MKL
        if not (few_read_much and by_mkl) or torch.is_autocast_enabled("cpu"):
            return F.linear(x, W)
        x_T = x.reshape(rows, -1).T.expand(pieces, -1, -1)                        # (16,in,rows)
        y = torch.bmm(W.unflatten(0, (pieces, -1)), x_T)                          # (16,out/16,rows)
        return y.flatten(0, 1).T.reshape(*x.shape[:-1], -1)


def recorded(step):
    """step(idx, state) -> (logits, state), a CUDA graph once a step of one token left the shapes of its state alone."""
    graph = None

    def shapes(state):
        return [x.shape for x in tree_leaves(state) if torch.is_tensor(x)]

    def run(idx, state):
        nonlocal graph
        if graph is not None:
            return graph(idx, state)
        logits, after = step(idx, state)
        if idx.shape[1] == 1 and shapes(after) == shapes(state):
            graph = cuda_graph(step, idx, after)
        return logits, after
    return run


def cuda_graph(step, idx, state):
    """step(idx, state) -> (logits, state) as one CUDA graph: a step is many kernels, shorter than their launches.

    The state stays in one place and is updated there, so its shapes must not change from step to step.
    """
    idx, state = tree_map(lambda x: x.clone() if torch.is_tensor(x) else x, (idx, state))
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    autocast = torch.autocast("cuda", dtype, enabled, cache_enabled=False)

    def warm_up():
        with autocast:
            step(idx, state)

    def advance():
        with autocast:
            logits, after = step(idx, state)
            for old, new in zip(tree_leaves(state), tree_leaves(after)):
                if torch.is_tensor(old):
                    old.copy_(new)
        return logits
    graph, logits = captured(advance, warm_up)

    def replay(new_idx, _):
        idx.copy_(new_idx)
        graph.replay()
        return logits, state
    return replay


def captured(call, warm_up=None, pool=None):
    """(A CUDA graph of call(), and what that call returned), after warm_up() has set up what is set up lazily."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        (warm_up or call)()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, pool=pool):
        result = call()
    return graph, result
