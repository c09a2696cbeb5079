"""torch.nn.functional: layers, losses, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .harness import program


@program(x="n 3 6 6", w="4 3 3 3", b="4")
def conv2d_uneven_batch(x, w, b):
    return F.conv2d(x, w, b, padding=1)


@program(x="2 3 8", w="k 3 3")
def conv1d_uneven_channels(x, w):
    return F.conv1d(x, w)


@program(x="2 k 8", w="k 3 2")
def conv_transpose1d(x, w):
    return F.conv_transpose1d(x, w, stride=2)


@program(x="k 2 6 6")
def pooling(x):
    return F.max_pool2d(x, 2), F.avg_pool2d(x, 3, 1), F.adaptive_avg_pool2d(x, 2)


@program(x="3 2 4 4")
def interpolate_even(x):
    return F.interpolate(x, scale_factor=2, mode="nearest")


@program(i="n 3, i64 <7", w="7 4")
def embedding(i, w):
    return F.embedding(i, w)


@program(i="k 3, i64 <2", w="k 4")
def embedding_of_uneven_vocabulary(i, w):
    return F.embedding(i, w, padding_idx=1) * 2


@program(x="n 6", w="6", b="6")
def layer_norm(x, w, b):
    return F.layer_norm(x, (6,), w, b)


@program(x="n 6", w="6")
def rms_norm(x, w):
    return F.rms_norm(x, (6,), w)


@program(x="k 4 3", w="4", b="4")
def group_norm(x, w, b):
    return F.group_norm(x, 2, w, b)


@program(x="k 4", mean="4, nograd", var="4, nograd positive", w="4", b="4")
def batch_norm_training(x, mean, var, w, b):
    return F.batch_norm(x, mean, var, w, b, training=True)


@program(x="n 5")
def softmax(x):
    return F.softmax(x, 1), F.log_softmax(x, -1)


@program(x="k 5")
def softmax_over_uneven_dim(x):
    return F.softmax(x, 0)


@program(x="k 5", i="k, i64 <5")
def cross_entropy(x, i):
    return F.cross_entropy(x, i)


@program(x="k 5", i="k, i64 <5")
def cross_entropy_ignoring(x, i):
    return F.cross_entropy(x, i, ignore_index=2, label_smoothing=0.1, reduction="sum")


@program(x="k 5", y="k 5")
def regression_losses(x, y):
    return F.mse_loss(x, y), F.smooth_l1_loss(x, y), F.huber_loss(x, y, reduction="none")


@program(x="k 5", y="k 5, bool")
def binary_cross_entropy(x, y):
    return F.binary_cross_entropy_with_logits(x, y.float())


@program(x="k 5")
def activations(x):
    return F.gelu(x) + F.silu(x) + F.leaky_relu(x) + F.softplus(x) + F.elu(x)


@program(x="k 6", w="12 6", v="6 12", rounds=False)
def mlp(x, w, v):
    return F.linear(F.gelu(F.linear(x, w)), v)


@program(x="k 6", w="e 6", v="6 e")
def mlp_with_uneven_hidden_size(x, w, v):
    return F.linear(F.gelu(F.linear(x, w)), v)


@program(x="k 6", w="12 6", v="6 12")
def swiglu(x, w, v):
    a, b = F.linear(x, w).chunk(2, dim=-1)
    return F.linear(torch.cat([F.silu(a) * b, b], -1), v)


@program(q="2 3 5 4", k="2 3 5 4", v="2 3 5 4")
def attention_even(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@program(q="2 k 5 4", k="2 k 5 4", v="2 k 5 4")
def attention_uneven_heads(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@program(q="2 2 k 4", k="2 2 n 4", v="2 2 n 4", ranks=(0, 1))
def attention_uneven_sequences(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@program(q="1 2 k 4", k="1 2 k 4", v="1 2 k 4", m="k k, bool")
def attention_with_mask(q, k, v, m):
    scores = (q @ k.mT) * 0.5
    scores = scores.masked_fill(m, -1e9)
    return scores.softmax(-1) @ v


@program(x="k 3 6", w="18 6", p="6 6")
def attention_block(x, w, p):
    n, s, _ = x.shape
    q, k, v = F.linear(x, w).view(n, s, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return x + F.linear(y.transpose(1, 2).reshape(n, s, 6), p)


@program(x="k 4", y="k 4")
def cosine_similarity_and_normalize(x, y):
    return F.cosine_similarity(x, y), F.normalize(x, dim=1)


@program(x="k 4", y="n 4")
def cdist(x, y):
    return torch.cdist(x, y)


@program(x="k 4")
def dropout_in_eval(x):
    return F.dropout(x, 0.5, training=False) * 2


@program(x="2 3 k")
def rotary_embedding(x):
    half = x[..., : x.shape[-1] // 2]
    rest = x[..., x.shape[-1] // 2 : 2 * (x.shape[-1] // 2)]
    return torch.cat([half.cos() - rest.sin(), half.sin() + rest.cos()], -1)
