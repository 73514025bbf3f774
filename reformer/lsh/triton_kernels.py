"""The kernels of `triton_attention`: attention within chunks of a sorted sequence, fused, forward and backward.

One launch is one round of all heads; a program is a block of places of one chunk.

- Rows are fetched by the sort order and results go to the token's own row, so that nothing exists in sorted order.
- Within a round every token stands at exactly one place. So a program may read, change and write its tokens' rows
  without atomics, and the result does not depend on which program runs first.
- The running maximum, sum of weights and weighted values of a token pass from round to round through memory.
- The backward's program is that of a block both as queries and as keys: the two gradients of a shared query and key
  go to one row, and are added up before they get there. Keys of round r may be seen by queries of round r + 1 (the
  circle); they belong to the launch of round r.
- Scores are in base 2, exp2(score * log2 e - top), which is what the hardware has.

What limits them on an H100 or H200 is memory traffic, not the tensor cores: per round the rows of q and v are read
once (a chunk's neighbours find them in the second-level cache), and so is d_out in the backward; from the second
round on, an fp32 row per token is read and written in the forward, two in the backward. That is why there is one sum
for the gradient of q and of its key, why the last round writes its result in the inputs' dtype, and why the four
numbers that the backward needs of a token stand side by side (one 32-byte sector).
What the compiler makes of them for an H100 at D = 128, L = 64, bf16: the forward takes 168 registers in each of 128
threads (200 if it may) and 48 KiB of shared memory, so that three programs share a multiprocessor; the backward 255 in
each of 256 threads, one program. Fewer registers there are the first thing to try where its memory waits.

Axes: G batch times heads, T tokens, D head dim (BLOCK_D: the next power of two), L chunk length, N places of a
block. `query` and `key` are original positions, [N, 1] and [1, N] or the other way round.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from reformer.lsh.dropout import KEY_TAG, QUERY_TAG

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST_TOP = tl.constexpr(-1e30)
"""The maximum of no score at all: finite, so that differences of maxima are numbers."""
QUERY_WORD, KEY_WORD = tl.constexpr(QUERY_TAG), tl.constexpr(KEY_TAG)


class Rows(NamedTuple):
    """A tensor [G, T, D] whose rows of D are contiguous."""

    start: Any
    group_stride: int
    row_stride: int


class Places(NamedTuple):
    """Positions and visibility; a table that is None restricts nothing."""

    order: Any  # int32 [G, R, S], R*S contiguous
    order_stride: int
    inverse: Any  # int32 [G, R, T], for duplicates only
    query_label: Any  # int32 [G, T]: equal to the key's, or the key is not visible
    key_label: Any
    buckets: Any  # int32 [G, R, T]
    dropout_keys: Any  # int32 [G]
    keep_threshold: int
    keep_scale: float
    n_tokens: int
    n_chunks: int  # of one round
    n_rounds: int


@triton.jit
def _pointers(rows, group, token, n_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [N, BLOCK_D] to these tokens' rows and where there is something."""
    column = tl.arange(0, BLOCK_D)
    start = rows.start + group.to(tl.int64) * rows.group_stride
    pointers = start + token.to(tl.int64)[:, None] * rows.row_stride + column[None, :]
    return pointers, (token < n_tokens)[:, None] & (column < D)[None, :]


@triton.jit
def _load(rows, group, token, n_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """These tokens' rows [N, BLOCK_D], zeros at padding."""
    pointers, exists = _pointers(rows, group, token, n_tokens, D, BLOCK_D)
    return tl.load(pointers, mask=exists, other=0.0).to(DTYPE)


@triton.jit
def _store(rows, group, token, n_tokens, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, exists = _pointers(rows, group, token, n_tokens, D, BLOCK_D)
    tl.store(pointers, x.to(rows.start.dtype.element_ty), mask=exists)


@triton.jit
def _tokens(places, group, first, L: tl.constexpr, BLOCK: tl.constexpr, IS_LSH: tl.constexpr):
    """The tokens [N] at `first` and behind it in the circle of all rounds, T and above where none is; their round."""
    circle = places.n_rounds * places.n_chunks * L
    wrapped = (first + circle) % circle
    start = places.order + group.to(tl.int64) * places.order_stride + wrapped
    token = tl.load(start + tl.arange(0, BLOCK))
    if not IS_LSH:  # nothing stands before the first chunk and behind the last
        token = tl.where(wrapped == first, token, places.n_tokens)
    return token, wrapped // (places.n_chunks * L)


@triton.jit
def _same_bucket(places, group, query, query_round, key, key_round):
    """Whether these keys stand in the queries' round and bucket."""
    row = group.to(tl.int64) * places.n_rounds + query_round
    start = places.buckets + row * places.n_tokens
    query_bucket = tl.load(start + query, mask=query < places.n_tokens, other=-2)
    key_bucket = tl.load(start + key, mask=key < places.n_tokens, other=-1)
    return (query_bucket == key_bucket) & (query_round == key_round)


@triton.jit
def _visible(places, group, query, query_round, key, key_round, CAUSAL: tl.constexpr, IS_LSH: tl.constexpr):
    """Which keys these queries see, by original position, label and bucket."""
    if CAUSAL and IS_LSH:  # key padding, T and above, is behind every query
        visible = key < query
    elif CAUSAL:
        visible = key <= query
    elif IS_LSH:
        visible = (key < places.n_tokens) & (key != query)
    else:
        visible = (key < places.n_tokens) & (query < places.n_tokens)
    if places.query_label is not None:
        row = group.to(tl.int64) * places.n_tokens
        query_label = tl.load(places.query_label + row + query, mask=query < places.n_tokens, other=-2)
        key_label = tl.load(places.key_label + row + key, mask=key < places.n_tokens, other=-1)
        visible = visible & (query_label == key_label)
    if places.buckets is not None:
        visible = visible & _same_bucket(places, group, query, query_round, key, key_round)
    return visible


@triton.jit
def _chunks(places, group, round_, token, L: tl.constexpr):
    """The chunks in which these tokens stand in a round, counted through all rounds."""
    start = places.inverse + (group.to(tl.int64) * places.n_rounds + round_) * places.n_tokens
    return tl.load(start + token, mask=token < places.n_tokens, other=0) // L + round_ * places.n_chunks


@triton.jit
def _multiplicity(
    places, group, query, key, L: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, N_ROUNDS: tl.constexpr
):  # fmt: skip
    """N_ij (eq. 16): how often, over all rounds, these queries have these keys in reach; at least 1."""
    n_total = N_ROUNDS * places.n_chunks
    count = (query + key) * 0
    for query_round in range(N_ROUNDS):
        query_chunk = _chunks(places, group, query_round, query, L)
        for key_round in range(N_ROUNDS):
            key_chunk = _chunks(places, group, key_round, key, L)
            found = (query_chunk - key_chunk + AFTER + n_total) % n_total <= BEFORE + AFTER
            if places.buckets is not None:
                found = found & _same_bucket(places, group, query, query_round, key, key_round)
            count += found.to(tl.int32)
    return tl.maximum(count, 1)


@triton.jit
def _mix(word):
    """`mix` of dropout.py, in the unsigned words that it is defined with."""
    word = tl.mul(word ^ (word >> 16), 0x7FEB352D, sanitize_overflow=False)
    word = tl.mul(word ^ (word >> 15), 0x846CA68B, sanitize_overflow=False)
    return word ^ (word >> 16)


@triton.jit
def _words(key, tag, round_, position):
    stream = _mix(tl.add(_mix(key ^ tag), round_.to(tl.uint32), sanitize_overflow=False))
    return _mix(tl.add(stream, position.to(tl.uint32), sanitize_overflow=False))


@triton.jit
def _keep_factor(places, group, round_, query, key):
    """`keep_factor` of dropout.py: 0 where a weight of this round is dropped, 1 / (1 - dropout) elsewhere."""
    seed = tl.load(places.dropout_keys + group).to(tl.uint32, bitcast=True)
    query_word = _words(seed, QUERY_WORD, round_, query) | 1
    key_word = _words(seed, KEY_WORD, round_, key) & 0xFFFFFFFE
    word = query_word ^ key_word
    hashed = tl.mul(word, word, sanitize_overflow=False).to(tl.int32, bitcast=True)
    return tl.where(hashed >= places.keep_threshold, places.keep_scale, 0.0)


@triton.jit(do_not_specialize=["round_"])
def forward_kernel(
    q, k, v, out, total, top_GT, denom_GT, key_scale_GT, places, round_,
    D: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, CAUSAL: tl.constexpr, IS_LSH: tl.constexpr, DUPLICATE_ROUNDS: tl.constexpr,
    IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One round of the forward: adds what a block of queries finds to `total`, or writes the result to `out`.

    top_GT and denom_GT: what the weights are relative to, in base 2, and their sum, both fp32.
    key_scale_GT: what a score is multiplied by, for each key; 1 / |k| or None.
    OPERAND: dtype of what is multiplied; sums are fp32.
    """
    n_blocks = places.n_chunks * L // BLOCK
    group, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    n_tokens = places.n_tokens
    round_start = round_ * places.n_chunks * L
    token, _ = _tokens(places, group, round_start + block * BLOCK, L, BLOCK, IS_LSH)
    query, exists = token[:, None], token < n_tokens
    row = group.to(tl.int64) * n_tokens
    q_rows = _load(q, group, token, n_tokens, D, BLOCK_D, OPERAND)
    if IS_FIRST:
        top = tl.full([BLOCK], LOWEST_TOP, tl.float32)
        denom = tl.full([BLOCK], 0.0, tl.float32)
        found = tl.full([BLOCK, BLOCK_D], 0.0, tl.float32)
    else:
        top = tl.load(top_GT + row + token, mask=exists, other=LOWEST_TOP)
        denom = tl.load(denom_GT + row + token, mask=exists, other=0.0)
        found = _load(total, group, token, n_tokens, D, BLOCK_D, tl.float32)
    window_start = round_start + block * BLOCK // L * L - BEFORE * L
    for part in tl.range(0, (BEFORE + 1 + AFTER) * L // BLOCK, num_stages=STAGES):
        key_token, key_round = _tokens(places, group, window_start + part * BLOCK, L, BLOCK, IS_LSH)
        key = key_token[None, :]
        k_rows = _load(k, group, key_token, n_tokens, D, BLOCK_D, OPERAND)
        v_rows = _load(v, group, key_token, n_tokens, D, BLOCK_D, OPERAND)
        scores = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee") * LOG2_E
        if key_scale_GT is not None:
            scores *= tl.load(key_scale_GT + row + key, mask=key < n_tokens, other=0.0)
        visible = _visible(places, group, query, round_, key, key_round, CAUSAL, IS_LSH)
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        if DUPLICATE_ROUNDS:
            weights /= _multiplicity(places, group, query, key, L, BEFORE, AFTER, DUPLICATE_ROUNDS)
        decay = tl.exp2(top - new_top)
        denom = denom * decay + tl.sum(weights, 1)
        if places.dropout_keys is not None:
            weights *= _keep_factor(places, group, round_, query, key)
        found = tl.dot(weights.to(OPERAND), v_rows, found * decay[:, None], input_precision="ieee")
        top = new_top
    tl.store(top_GT + row + token, top, mask=exists)
    tl.store(denom_GT + row + token, denom, mask=exists)
    if IS_LAST:
        alone = denom == 0.0
        own = _load(v, group, tl.where(alone, token, n_tokens), n_tokens, D, BLOCK_D, tl.float32)
        found = tl.where(alone[:, None], own, found / tl.where(alone, 1.0, denom)[:, None])
        _store(out, group, token, n_tokens, found, D, BLOCK_D)
    else:
        _store(total, group, token, n_tokens, found, D, BLOCK_D)


@triton.jit
def prepare_kernel(
    out, d_out, top_GT, denom_GT, key_scale_GT, stats_GT4, n_tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the backward needs of every token: top, 1 / denom (0: sees nothing), delta = d_out.out, scale as a key."""
    n_blocks = tl.cdiv(n_tokens, BLOCK)
    group, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    token = block * BLOCK + tl.arange(0, BLOCK)
    exists = token < n_tokens
    row = group.to(tl.int64) * n_tokens + token
    out_rows = _load(out, group, token, n_tokens, D, BLOCK_D, tl.float32)
    d_out_rows = _load(d_out, group, token, n_tokens, D, BLOCK_D, tl.float32)
    denom = tl.load(denom_GT + row, mask=exists, other=0.0)
    stats = stats_GT4 + row * 4
    tl.store(stats, tl.load(top_GT + row, mask=exists, other=0.0), mask=exists)
    tl.store(stats + 1, tl.where(denom == 0.0, 0.0, 1.0 / tl.where(denom == 0.0, 1.0, denom)), mask=exists)
    tl.store(stats + 2, tl.sum(out_rows * d_out_rows, 1), mask=exists)
    if key_scale_GT is not None:
        tl.store(stats + 3, tl.load(key_scale_GT + row, mask=exists, other=0.0), mask=exists)
    else:
        tl.store(stats + 3, tl.full([BLOCK], 1.0, tl.float32), mask=exists)


@triton.jit
def _stat(stats_GT4, group, token, n_tokens, COLUMN: tl.constexpr):
    row = group.to(tl.int64) * n_tokens + token
    return tl.load(stats_GT4 + row * 4 + COLUMN, mask=token < n_tokens, other=0.0)


@triton.jit
def _gradients_by_pair(
    products, d_products, stats_GT4, places, group, query, query_round, key, key_round, L: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, CAUSAL: tl.constexpr, IS_LSH: tl.constexpr,
    DUPLICATE_ROUNDS: tl.constexpr,
):  # fmt: skip
    """The weight of v in the output, and the gradient of the score, from q.k and d_out.v of every pair."""
    n_tokens = places.n_tokens
    scores = products * (_stat(stats_GT4, group, key, n_tokens, 3) * LOG2_E)
    visible = _visible(places, group, query, query_round, key, key_round, CAUSAL, IS_LSH)
    relative = tl.where(visible, scores - _stat(stats_GT4, group, query, n_tokens, 0), float("-inf"))
    weights = tl.exp2(relative) * _stat(stats_GT4, group, query, n_tokens, 1)
    if DUPLICATE_ROUNDS:
        weights /= _multiplicity(places, group, query, key, L, BEFORE, AFTER, DUPLICATE_ROUNDS)
    delta = _stat(stats_GT4, group, query, n_tokens, 2)
    if places.dropout_keys is not None:
        keep = _keep_factor(places, group, query_round, query, key)
        return weights * keep, weights * (d_products * keep - delta)
    return weights, weights * (d_products - delta)


@triton.jit
def _as_queries(
    q_rows, d_out_rows, k, v, stats_GT4, places, group, token, round_, window_start,
    D: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, CAUSAL: tl.constexpr, IS_LSH: tl.constexpr, DUPLICATE_ROUNDS: tl.constexpr,
    OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of queries from the keys that it sees."""
    dq = tl.full([BLOCK, BLOCK_D], 0.0, tl.float32)
    for part in tl.range(0, (BEFORE + 1 + AFTER) * L // BLOCK, num_stages=STAGES):
        key_token, key_round = _tokens(places, group, window_start + part * BLOCK, L, BLOCK, IS_LSH)
        k_rows = _load(k, group, key_token, places.n_tokens, D, BLOCK_D, OPERAND)
        v_rows = _load(v, group, key_token, places.n_tokens, D, BLOCK_D, OPERAND)
        key = key_token[None, :]
        _, d_scores = _gradients_by_pair(
            tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee"),
            tl.dot(d_out_rows, tl.trans(v_rows), input_precision="ieee"),
            stats_GT4, places, group, token[:, None], round_, key, key_round,
            L, BEFORE, AFTER, CAUSAL, IS_LSH, DUPLICATE_ROUNDS,
        )  # fmt: skip
        d_scores *= _stat(stats_GT4, group, key, places.n_tokens, 3)
        dq = tl.dot(d_scores.to(OPERAND), k_rows, dq, input_precision="ieee")
    return dq


@triton.jit
def _as_keys(
    k_rows, v_rows, q, d_out, stats_GT4, places, group, token, round_, window_start,
    D: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, CAUSAL: tl.constexpr, IS_LSH: tl.constexpr, DUPLICATE_ROUNDS: tl.constexpr,
    OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys (of norm 1 in LSH attention) and values from the queries that see them."""
    dk = tl.full([BLOCK, BLOCK_D], 0.0, tl.float32)
    dv = tl.full([BLOCK, BLOCK_D], 0.0, tl.float32)
    for part in tl.range(0, (BEFORE + 1 + AFTER) * L // BLOCK, num_stages=STAGES):
        query_token, query_round = _tokens(places, group, window_start + part * BLOCK, L, BLOCK, IS_LSH)
        q_rows = _load(q, group, query_token, places.n_tokens, D, BLOCK_D, OPERAND)
        d_out_rows = _load(d_out, group, query_token, places.n_tokens, D, BLOCK_D, OPERAND)
        weights, d_scores = _gradients_by_pair(
            tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee"),
            tl.dot(v_rows, tl.trans(d_out_rows), input_precision="ieee"),
            stats_GT4, places, group, query_token[None, :], query_round, token[:, None], round_,
            L, BEFORE, AFTER, CAUSAL, IS_LSH, DUPLICATE_ROUNDS,
        )  # fmt: skip
        dv = tl.dot(weights.to(OPERAND), d_out_rows, dv, input_precision="ieee")
        dk = tl.dot(d_scores.to(OPERAND), q_rows, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["round_"])
def backward_kernel(
    q, k, v, d_out, dq_total, dv_total, dq_to, dk_to, dv_to, stats_GT4, places, round_,
    D: tl.constexpr, BLOCK_D: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, BEFORE: tl.constexpr,
    AFTER: tl.constexpr, CAUSAL: tl.constexpr, IS_LSH: tl.constexpr, DUPLICATE_ROUNDS: tl.constexpr,
    IS_FIRST: tl.constexpr, OPERAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One round of the backward: what a block of tokens gets as queries and as keys, added to the totals so far.

    Written to dq_to and dv_to (the totals again, or the results). Only local attention, which has one round, has a
    dk_to; in LSH attention k = q / |q|, so that dq += (dk - k (k.dk)) / |q|.
    """
    n_blocks = places.n_chunks * L // BLOCK
    group, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    n_tokens = places.n_tokens
    round_start = round_ * places.n_chunks * L
    token, _ = _tokens(places, group, round_start + block * BLOCK, L, BLOCK, IS_LSH)
    chunk_start = round_start + block * BLOCK // L * L
    q_rows = _load(q, group, token, n_tokens, D, BLOCK_D, OPERAND)
    d_out_rows = _load(d_out, group, token, n_tokens, D, BLOCK_D, OPERAND)
    dq = _as_queries(
        q_rows, d_out_rows, k, v, stats_GT4, places, group, token, round_, chunk_start - BEFORE * L,
        D, BLOCK_D, L, BLOCK, BEFORE, AFTER, CAUSAL, IS_LSH, DUPLICATE_ROUNDS, OPERAND, STAGES,
    )  # fmt: skip
    k_rows = q_rows if IS_LSH else _load(k, group, token, n_tokens, D, BLOCK_D, OPERAND)
    v_rows = _load(v, group, token, n_tokens, D, BLOCK_D, OPERAND)
    dk, dv = _as_keys(
        k_rows, v_rows, q, d_out, stats_GT4, places, group, token, round_, chunk_start - AFTER * L,
        D, BLOCK_D, L, BLOCK, BEFORE, AFTER, CAUSAL, IS_LSH, DUPLICATE_ROUNDS, OPERAND, STAGES,
    )  # fmt: skip
    if IS_LSH:
        scale = _stat(stats_GT4, group, token[:, None], n_tokens, 3)
        unit = q_rows.to(tl.float32) * scale
        dq += (dk - unit * tl.sum(unit * dk, 1)[:, None]) * scale
    else:
        _store(dk_to, group, token, n_tokens, dk, D, BLOCK_D)
    if IS_FIRST:
        sees_nothing = _stat(stats_GT4, group, token[:, None], n_tokens, 1) == 0.0
        dv += tl.where(sees_nothing, d_out_rows.to(tl.float32), 0.0)
    else:
        dq += _load(dq_total, group, token, n_tokens, D, BLOCK_D, tl.float32)
        dv += _load(dv_total, group, token, n_tokens, D, BLOCK_D, tl.float32)
    _store(dq_to, group, token, n_tokens, dq, D, BLOCK_D)
    _store(dv_to, group, token, n_tokens, dv, D, BLOCK_D)
