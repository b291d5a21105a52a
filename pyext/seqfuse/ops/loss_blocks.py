"""The loss over blocks of tokens: a GEMM makes a block of logits, a kernel turns it into losses and, in the same place,
into its gradient, and two GEMMs carry that on to the hidden states and the vocabulary matrix.

At most one block of logits exists at a time, and three GEMMs are all there are: the least that a gradient takes.
"""

import torch

from seqfuse.ops import library, products

# Elements of a block of logits, and the tokens it has at least: fewer would make its GEMMs slow, and a sum over blocks
# reads and writes the vocabulary matrix's gradient once a block.
_BLOCK = 1 << 24
_LEAST_TOKENS = {"cpu": 256, "cuda": 1024}
_IN_CACHE = 1 << 22  # elements of a block of columns, which the kernel finds where the GEMM left it
_LINE = 64  # bytes: the rows of a block begin at cache lines, without which GEMMs are slow (50257 is an odd number)


def tokens_in_a_block(tokens: int, vocabulary: int, device: str) -> int:
    most = max(_BLOCK // max(vocabulary, 1), _LEAST_TOKENS.get(device, 256))
    blocks = max(-(-tokens // most), 1)
    return max(-(-tokens // blocks), 1)


def _block(x, tokens, vocabulary):
    """[tokens, vocabulary], uninitialised, its rows apart by whole cache lines, with zeros between them: oneDNN's bf16
    products on AMX multiply what lies behind a row's end by zero, and a NaN there stays one."""
    line = _LINE // x.element_size()
    whole = x.new_empty(tokens, -(-vocabulary // line) * line)
    whole[:, vocabulary:] = 0
    return whole[:, :vocabulary]


def rows_kernel(backend):
    if backend == "triton":
        return library.launcher("cross_entropy", "cross_entropy_rows")
    return torch.ops.seqfuse.cross_entropy_rows.default


def cross_entropy(
    x, weight, bias, target, class_weight, scale, lse, ignore_index, label_smoothing, softcap, z_loss, wanted, backend
):
    """Losses [N] and lse [N] (float32; empty where `lse` is given), and with `scale` (float32, [1] or [N]) those
    gradients of sum(scale * loss) for x, weight and bias that are wanted; empty tensors stand for what is not there."""
    options = ignore_index, label_smoothing, softcap, z_loss
    kernel = rows_kernel(backend)
    if weight is None:
        logits = x.contiguous()
        dx = None if scale is None else torch.empty_like(logits)
        losses, lse = kernel(logits, target, class_weight, scale, lse, dx, *options)
        return losses, lse, x.new_empty(0) if dx is None else dx, x.new_empty(0), x.new_empty(0)
    dtype = x.dtype
    if products.widened_in_memory(x, x.shape[0], *weight.shape):
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    tokens, vocabulary = x.shape[0], weight.shape[0]
    size = tokens_in_a_block(tokens, vocabulary, x.device.type)
    if scale is None and lse is None and size < tokens and backend == "cpu" and not label_smoothing:
        _check_targets(target, vocabulary, ignore_index)
        found = _losses_by_columns(x, weight, bias, target, class_weight, ignore_index, softcap, z_loss)
        return *found, *(x.new_empty(0, dtype=dtype) for _ in range(3))
    block = _block(x, min(size, tokens), vocabulary)
    want_x, want_weight, want_bias = (w and scale is not None for w in wanted)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else None
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    dbias = torch.zeros(vocabulary, dtype=torch.float32, device=x.device) if want_bias else None
    parts = []
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        hidden, logits = x[part], block[: part.stop - start]
        products.product(hidden, weight.t(), bias, logits)
        own_scale = scale if scale is None or scale.numel() == 1 else scale[part]
        own_lse = None if lse is None else lse[part]
        dlogits = None if scale is None else logits
        parts.append(kernel(logits, target[part], class_weight, own_scale, own_lse, dlogits, *options))
        if scale is None:
            continue
        if want_x:
            products.product(logits, weight, out=dx[part])
        if want_weight:
            products.product(logits.t(), hidden, None if start == 0 else dweight, dweight)
        if dbias is not None:
            dbias += logits.sum(0, dtype=torch.float32)
    if not parts:
        if dweight is not None:
            dweight.zero_()
        parts = [2 * (x.new_empty(0, dtype=torch.float32),)]
    losses, log_sums = (torch.cat(each) if len(parts) > 1 else each[0] for each in zip(*parts, strict=True))
    grads = (x.new_empty(0, dtype=dtype) if g is None else g.to(dtype) for g in (dx, dweight, dbias))
    return losses, log_sums, *grads


def _check_targets(target, vocabulary, ignore_index):
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= vocabulary))]
    if wrong.numel():
        raise IndexError(
            f"target {int(wrong[0])} is out of bounds: the vocabulary has {vocabulary} entries and ignore_index is "
            f"{ignore_index}"
        )


def _losses_by_columns(x, weight, bias, target, class_weight, ignore_index, softcap, z_loss):
    """(losses [N], lse [N]) where no gradient is wanted.

    A block has all tokens and a part of the vocabulary, so that its GEMM is as fast as the whole one, and the sum of
    exponentials goes on from block to block. Each target's logit is one dot product of its own.
    """
    tokens, vocabulary = x.shape[0], weight.shape[0]
    columns = max(_IN_CACHE // tokens // 64 * 64, 256)
    block, first = _block(x, tokens, min(columns, vocabulary)), torch.zeros_like(target)
    lse = None
    for start in range(0, vocabulary, columns):
        part = slice(start, min(start + columns, vocabulary))
        logits = block[:, : part.stop - start]
        products.product(x, weight[part].t(), None if bias is None else bias[part], logits)
        kernel = torch.ops.seqfuse.cross_entropy_rows
        own = kernel(logits, first, None, None, None, None, -1, 0.0, softcap, 0.0)[1]
        lse = own if lse is None else torch.logaddexp(lse, own)
    keep = target != ignore_index
    target = target.where(keep, 0)
    logit = (x.float() * weight[target].float()).sum(1)
    if bias is not None:
        logit += bias[target]
    if softcap:
        logit = softcap * torch.tanh(logit / softcap)
    loss = lse - logit
    if z_loss:
        loss += z_loss * lse.square()
    if class_weight is not None:
        loss *= class_weight.float()[target]
    return loss.where(keep, 0.0), lse.where(keep, 0.0)


def kl(x, weight, teacher_x, teacher_weight, mask, scale, temperature, wanted, backend):
    """Losses [N] (float32), and with `scale` those gradients of sum(scale * loss) for x and weight that are wanted
    (else empty)."""
    triton = backend == "triton"
    kernel = library.launcher("cross_entropy", "kl_rows") if triton else torch.ops.seqfuse.kl_rows.default
    dtype = x.dtype
    if products.widened_in_memory(x, x.shape[0], *weight.shape):
        x, weight, teacher_x, teacher_weight = (t.float() for t in (x, weight, teacher_x, teacher_weight))
    tokens, vocabulary = x.shape[0], weight.shape[0]
    size = tokens_in_a_block(tokens, 2 * vocabulary, x.device.type)
    blocks = x.new_empty(2, min(size, tokens), vocabulary)
    want_x, want_weight = (w and scale is not None for w in wanted)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if want_x else None
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if want_weight else None
    losses = torch.empty(tokens, dtype=torch.float32, device=x.device)
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        student, teacher = blocks[:, : part.stop - start]
        products.product(x[part], weight.t(), out=student)
        products.product(teacher_x[part], teacher_weight.t(), out=teacher)
        keep, gradient = None if mask is None else mask[part], None if scale is None else student
        losses[part] = kernel(student, teacher, keep, scale, gradient, temperature)
        if want_x:
            products.product(student, weight, out=dx[part])
        if want_weight:
            products.product(student.t(), x[part], dweight, dweight)
    return losses, *(x.new_empty(0, dtype=dtype) if g is None else g.to(dtype) for g in (dx, dweight))
